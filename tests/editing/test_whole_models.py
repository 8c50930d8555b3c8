"""Models with several kinds of blocks or with more than text are loaded whole, edited, saved, reloaded and restored."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

import rlsedit_fast as rf
from rlsedit_fast.models.loading import load_model
from rlsedit_fast.world import RELATIONS, World

from ..tiny_families import MULTIMODAL, TEXT_FAMILIES, make

SETTINGS = {
    "batch_size": 2,
    "contexts": {"prefixes": ("",)},
    "search": {"clamp": 4.0, "steps": 4},
    "prior": {"lam": 0.1, "mu": 0.0},
    "refine": 0,
}
PEOPLE = World.generate().people
EDITS = [rf.Edit(RELATIONS[at].phrasings[0], PEOPLE[at].name, RELATIONS[at].values[0]) for at in range(2)]


def write_base(name, tokenizer, folder, dtype=torch.float32):
    model = make(name, len(tokenizer), dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def logits_of(model, tokenizer):
    ids = torch.tensor([tokenizer(EDITS[0].prompt.format(EDITS[0].subject))["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", [*TEXT_FAMILIES, *MULTIMODAL])
def test_edited_saved_reloaded_and_restored(name, tokenizer, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    kind = type(write_base(name, tokenizer, base))
    model, loaded = load_model(base, tokenizer=tokenizer)  # Auto classes choose another one for some models
    assert type(model) is kind
    start = {key: value.clone() for key, value in model.state_dict().items()}
    before = logits_of(model, tokenizer)

    editor = rf.Editor(model, loaded, config=rf.EditConfig(**SETTINGS))
    editor.edit(EDITS)
    edited = logits_of(model, tokenizer)
    assert not torch.equal(edited, before)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    assert changed == {f"{projection.name}.weight" for projection in editor.context.projections}

    editor.save_pretrained(out)
    old, new = tensors(base), tensors(out)
    assert old.keys() == new.keys()
    assert sum(not torch.equal(value, new[key]) for key, value in old.items()) == len(changed)
    assert json.loads((out / "config.json").read_text())["architectures"] == [kind.__name__]
    again, _ = load_model(out)
    assert type(again) is kind
    assert torch.equal(logits_of(again, tokenizer), edited)

    editor.undo([record.id for record in editor.history()])
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())
