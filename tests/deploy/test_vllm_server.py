"""A real vLLM server on a real model: adapter, reload and patch answer like transformers."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from real_models import MissingPackage, checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsedit_fast.export import changes_between, write_adapter, write_patch
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
    assert {"base", "base_beside_the_adapter", "adapter", "reloaded_edited", "reloaded_base", "llm_patched"} <= set(
        compared
    )
    for name, found in compared.items():
        assert found["equal"] == found["asked"] == len(facts), (name, found["different"])
        assert found["largest_logprob_difference"] < 1e-3, name
    assert result["unloaded"] == ["base"]
