"""Edited checkpoints have the metadata that other programs require."""

import copy

import torch
from safetensors import safe_open

from rlsedit_fast.export import changes_between, write_adapter, write_checkpoint


def test_safetensors_files_name_their_format(model, tokenizer, tmp_path):
    edited = copy.deepcopy(model)
    with torch.no_grad():
        next(p for name, p in edited.named_parameters() if name.endswith(("down_proj.weight", "c_proj.weight"))).add_(
            1.0
        )
    write_checkpoint(edited, tokenizer, tmp_path / "edited")
    write_adapter(changes_between(model, edited), tmp_path / "adapter")
    for path in (tmp_path / "edited" / "model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"
