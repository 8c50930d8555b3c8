"""Ranks of adapters for vLLM."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from rlsedit_fast import EditConfig, Editor
from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.export import VLLM_RANKS, WeightChange, write_adapter
from rlsedit_fast.export.engines import padded_rank


def low_rank(rank, size=600, name="layers.0.down_proj"):
    torch.manual_seed(rank)
    original = torch.zeros(size, size)
    stored = torch.randn(size, rank) @ torch.randn(rank, size) if rank else original
    return WeightChange(name, original, stored, stored, transposed=False)


@pytest.mark.parametrize(("needed", "taken"), [(1, 1), (2, 8), (8, 8), (9, 16), (50, 64), (257, 320), (512, 512)])
def test_rank_is_the_smallest_that_fits(needed, taken):
    assert padded_rank(needed, "vllm") == taken
    assert taken in VLLM_RANKS
    assert padded_rank(needed, None) == needed


def test_padding_does_not_change_the_product(tmp_path):
    changes = [low_rank(3), low_rank(20, name="layers.1.down_proj")]
    report = write_adapter(changes, tmp_path, engine="vllm")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (report.rank, config["r"], config["lora_alpha"]) == (32, 32, 32)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for change in changes:
        down = tensors[f"base_model.model.{change.name}.lora_A.weight"]
        up = tensors[f"base_model.model.{change.name}.lora_B.weight"]
        assert (down.shape[0], up.shape[1]) == (32, 32)
        torch.testing.assert_close(up @ down, change.delta, atol=1e-4, rtol=1e-4)


def test_edits_of_higher_rank_are_refused_or_truncated_with_their_error(tmp_path):
    change = low_rank(540)
    with pytest.raises(InputError, match="rank 540, and vLLM takes adapters of rank 512") as raised:
        write_adapter([change], tmp_path / "adapter", engine="vllm")
    assert "rlsedit deploy --checkpoint" in raised.value.hint
    assert "--rank 512" in raised.value.hint
    assert not (tmp_path / "adapter").exists() or not any((tmp_path / "adapter").iterdir())
    (module,) = write_adapter([change], tmp_path / "adapter", engine="vllm", rank=512).modules
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{change.name}.lora_{part}.weight"] for part in "AB")
    error = float((up @ down - change.delta).norm() / change.delta.norm())
    assert module.error == pytest.approx(error, rel=1e-3)
    assert 0 < module.error < 0.1


def test_unknown_server_is_refused(tmp_path):
    with pytest.raises(InputError, match="engine='tgi': expected 'vllm', or None"):
        write_adapter([low_rank(1)], tmp_path, engine="tgi")


def test_model_that_vllm_serves_without_adapters_is_refused(make_model, tokenizer, tmp_path):
    model = make_model("gpt2")
    editor = Editor(copy.deepcopy(model), tokenizer, config=EditConfig(layers=[0], prior={"lam": 1.0}))
    with pytest.raises(ModelError, match="vLLM serves GPT2LMHeadModel without LoRA") as raised:
        editor.save_adapter(tmp_path / "adapter", engine="vllm")
    assert "rlsedit deploy --checkpoint" in raised.value.hint
    assert not (tmp_path / "adapter").exists()
