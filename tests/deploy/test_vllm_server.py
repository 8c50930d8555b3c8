"""A real vLLM server and a real `vllm.LLM` on a real model: adapter, reload and patch answer like transformers."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from real_models import MissingPackage, checkpoint
from serving import environment_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsedit_fast.export import WeightChange, changes_between, write_adapter, write_patch
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.projections import find_decoder

from .environments import ROOT, run, vllm_environment

pytestmark = pytest.mark.deploy


def test_server_answers_like_transformers(tmp_path):
    try:
        base_path = checkpoint("smollm2")
    except MissingPackage as error:
        pytest.skip(str(error))
    base, edited = (AutoModelForCausalLM.from_pretrained(base_path, dtype="float32") for _ in range(2))
    torch.manual_seed(0)
    for projection in find_decoder(edited).select([3, 5]):
        d_v, d_k = projection.weight.shape
        projection.write(projection.weight + 0.02 * torch.randn(d_v, 5) @ torch.randn(5, d_k))
    changes = changes_between(base, edited)
    assert write_adapter(changes, tmp_path / "adapter", engine="vllm").rank == 8
    write_patch(changes, tmp_path / "patch.safetensors", base_fingerprint=fingerprint(base))
    edited.save_pretrained(tmp_path / "edited")
    AutoTokenizer.from_pretrained(base_path).save_pretrained(tmp_path / "edited")
    facts = [
        {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon"},
        {"prompt": "{} plays the", "subject": "Miles Davis", "target": "piano"},
        {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux", "target": "English"},
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    run(
        *(sys.executable, ROOT / "bench/serving.py", "--vllm", vllm_environment(), "--base", base_path),
        *("--edited", tmp_path / "edited", "--adapter", tmp_path / "adapter", "--facts", tmp_path / "facts.jsonl"),
        *("--patch", tmp_path / "patch.safetensors", "--json", tmp_path / "result.json"),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    result = json.loads((tmp_path / "result.json").read_text())
    compared = {name: found for name, found in result.items() if isinstance(found, dict) and "equal" in found}
    assert set(compared) == {
        *("base", "base_beside_the_adapter", "adapter", "reloaded_edited", "reloaded_base"),
        *("llm_base", "llm_patched", "llm_patched_back", "llm_reloaded_base", "llm_reloaded_edited"),
    }
    for name, found in compared.items():
        assert found["equal"] == found["asked"] == len(facts), (name, found["different"])
        assert found["largest_logprob_difference"] < 1e-3, name
    assert result["unloaded"] == ["base"]


IN_PLACE = """
import sys, torch
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from rlsedit_fast.export import read_patch
from rlsedit_fast.serving.offline import _patch_in_place
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = torch.nn.Linear(4, 3, bias=False)
        self.down_proj.weight.data = torch.arange(12.0).reshape(3, 4)
    def load_weights(self, weights):
        for name, weight in weights:
            default_weight_loader(self.get_parameter(name), weight)
model = Model()
_patch_in_place(model, read_patch(sys.argv[1]))
print("RESULT", model.down_proj.weight.flatten().tolist())
"""


def test_vllm_writes_the_entries_of_a_patch_in_place(tmp_path):
    original = torch.arange(12.0).reshape(3, 4)
    edited = original.clone()
    edited[1, 2], edited[2, 0] = 0.5, 0.0
    change = WeightChange("down_proj", original, edited, edited, transposed=False)
    write_patch([change], tmp_path / "patch.safetensors", base_fingerprint="0" * 64)
    python = vllm_environment()
    env = environment_of(str(python)) | {"PYTHONPATH": str(ROOT)}
    found = run(python, "-c", IN_PLACE, tmp_path / "patch.safetensors", env=env)
    assert found.partition("RESULT ")[2].strip() == str(edited.flatten().tolist())
