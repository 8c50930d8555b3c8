"""Compiled models are edited in place: the compiled code runs with the edited weights."""

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.errors import ModelError
from rlsedit_fast.export import apply_delta
from rlsedit_fast.models import find_decoder, fingerprint
from rlsedit_fast.models.compiled import unwrapped

SETTINGS = {"layers": (1,), "contexts": {"prefixes": ("",)}, "search": {"clamp": 4.0, "steps": 4}, "refine": 0}
EDIT = rf.Edit("{} speaks", "Toze Lado Rekuno", "Kubeish")
IDS = torch.tensor([[1, 7, 9, 12]])


def compiled(model):
    return torch.compile(model, backend="eager")


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.clone()


@pytest.fixture
def plain(make_model, tokenizer):
    """A model and its logits after the same edit, without compilation."""
    model = make_model("llama")
    rf.Editor(model, tokenizer, config=rf.EditConfig(prior={"lam": 0.1, "mu": 0.0}, **SETTINGS)).edit([EDIT])
    return model


def test_a_compiled_model_runs_with_the_edited_weights(make_model, tokenizer, plain, tmp_path):
    model = make_model("llama")
    wrapper = compiled(model)
    before = logits_of(wrapper)
    editor = rf.Editor(wrapper, tokenizer, config=rf.EditConfig(prior={"lam": 0.1, "mu": 0.0}, **SETTINGS))
    assert editor.model is model
    editor.edit([EDIT])
    assert not torch.equal(logits_of(wrapper), before)
    assert torch.equal(logits_of(wrapper), logits_of(plain))
    editor.save_pretrained(tmp_path / "out")
    assert not any("_orig_mod" in change.name for change in editor.changes())
    editor.save_delta(tmp_path / "delta.safetensors")
    editor.undo([1])
    assert torch.equal(logits_of(wrapper), before)
    apply_delta(wrapper, tmp_path / "delta.safetensors")
    assert torch.equal(logits_of(wrapper), logits_of(plain))


@pytest.mark.parametrize("where", ["model", "blocks"])
def test_modules_compiled_in_place_run_the_hooks_of_the_search(make_model, tokenizer, plain, where):
    model = make_model("llama")
    for module in [model] if where == "model" else model.model.layers:
        module.compile(backend="eager")
    logits_of(model)  # compiled before the editor registers hooks
    rf.Editor(model, tokenizer, config=rf.EditConfig(prior={"lam": 0.1, "mu": 0.0}, **SETTINGS)).edit([EDIT])
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, plain.model.layers[1].mlp.down_proj.weight)
    assert torch.equal(logits_of(model), logits_of(plain))


def test_structure_and_fingerprint_are_those_of_the_model(make_model):
    model = make_model("llama")
    wrapper = compiled(model)
    assert unwrapped(wrapper) is model
    assert find_decoder(wrapper).blocks_name == "model.layers"
    assert fingerprint(wrapper) == fingerprint(model)


def test_wrapped_blocks_are_refused(make_model, tokenizer):
    model = make_model("llama")
    model.model.layers[2] = compiled(model.model.layers[2])
    with pytest.raises(ModelError, match=r"model\.layers\.2 is wrapped by torch\.compile(?s:.*)module\.compile\(\)"):
        rf.Editor(model, tokenizer)
