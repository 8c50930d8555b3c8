"""The memory of editing is estimated in advance, and too little memory raises and changes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.baselines import BASELINES, memory
from rlsedit_fast.errors import ResourceError

EDIT = rf.Edit("{} lives in", "Toze Lado Rekuno", "Port Alder")
CONFIG = rf.EditConfig(layers=(1, 2), contexts={"prefixes": ("", "People speak .")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_memory_plan_equals_the_memory_of_the_states(make_model, tokenizer, state_bytes, dtype):
    editor = rf.Editor(make_model("llama", dtype), tokenizer, config=CONFIG)
    plan = editor.context.memory()
    assert [layer.layer for layer in plan] == [1, 2]
    editor.calibrate([EDIT])
    for layer, state, projection in zip(plan, editor._session.layers.states, editor.context.projections, strict=True):
        grown = 4 * editor.config.delay * (96 + 1)  # by pending rows when the buffer is full
        assert layer.state == state_bytes(state, projection.weight) + grown
        assert layer.writing == sum(tensor.nbytes for tensor in state._master.tensors)
    editor.edit([EDIT])
    (kept,) = editor._session.ledger.rows([1])
    for at, layer in enumerate(plan):
        rows = [kept.keys[at], kept.values[at], *([kept.goal] if at == 1 else [])]
        assert layer.per_edit == sum(tensor.nbytes for tensor in rows)
    anchored = rf.Editor(make_model("llama", dtype), tokenizer, config=CONFIG)
    anchored.anchor(["Toze Lado lives in Port Alder ."])
    assert [layer.anchors for layer in plan] == [moment.nbytes for moment in anchored._session.moments]


def tensors_of(value):
    """Returns the tensors in the memory of a rule."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for name in getattr(value, "__dataclass_fields__", ()) for t in tensors_of(getattr(value, name))]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in BASELINES), ("alphaedit", {"null_share": 0.3})])
def test_the_memory_plan_of_another_rule_equals_the_memory_of_its_layers(make_model, tokenizer, name, options):
    config = CONFIG.replace(rule=name, rule_options=options, same_subject="separate")
    editor = rf.Editor(make_model("llama"), tokenizer, config=config)
    editor.anchor(["Toze Lado lives in Port Alder ."])
    plan = editor.context.memory()
    editor.edit([EDIT, rf.Edit("{} lives in", "Lado Toze", "Port Alder")])
    for layer, state in zip(plan, editor._session.layers.states, strict=True):
        kept = [state.original, *tensors_of(state._memory)]
        used = sum(tensor.numel() * tensor.element_size() for tensor in kept)
        if name == "alphaedit" and not options:  # with a threshold, its basis has any size up to the full width
            assert used <= layer.state
        else:
            assert used == layer.state


def test_too_little_memory_raises_before_anything_is_allocated(make_model, tokenizer, monkeypatch):
    editor = rf.Editor(make_model("llama"), tokenizer, config=CONFIG)
    monkeypatch.setattr(memory, "available", lambda _device: 100_000)
    with pytest.raises(ResourceError, match=r"editing needs .* on cpu .* and 100 kB are free"):
        editor.edit([EDIT])
    assert editor.priors == []
    assert editor.history() == []


def test_out_of_memory_in_a_batch_rolls_it_back(make_model, tokenizer, monkeypatch):
    model = make_model("llama")
    editor = rf.Editor(model, tokenizer, config=CONFIG)
    editor.edit([EDIT])
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fails(*_args):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("rlsedit_fast.editing.search.value_search.search_within_memory", fails)
    with pytest.raises(ResourceError, match=r"fewer contexts\.prefixes"):
        editor.edit([rf.Edit("{} speaks", "Lado Toze", "Kubeish")])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_five_layers_of_an_8b_model_take_less_than_eight_gigabytes():
    weight = torch.empty(4096, 14_336, dtype=torch.bfloat16, device="meta")
    fields = {"name": "down_proj", "blocks": [weight], "layout": None, "key_width": 14_336}
    layers = [SimpleNamespace(layer=layer, **fields) for layer in range(4, 9)]
    defaults = rf.EditConfig()
    plan = memory.plan_memory(layers, delay=defaults.delay, rows=len(defaults.contexts.prefixes))
    sizes = [memory.size(sum(layer.state for layer in plan)), memory.size(plan[0].building)]
    sizes += [memory.size(sum(getattr(layer, what) for layer in plan)) for what in ("writing", "anchors", "per_edit")]
    assert sizes == ["5.58 GB", "2.11 GB", "1.17 GB", "4.11 GB", "1.16 MB"], "as docs/python.md states"


def test_sizes_are_formatted_with_readable_units():
    assert [memory.size(n) for n in (12, 3_400, 1_640_000_000)] == ["12 bytes", "3.4 kB", "1.64 GB"]


def test_free_memory_is_positive_or_unknown():
    free = memory.available(torch.device("cpu"))
    assert free is None or free > 0
    assert memory.available(torch.device("meta")) is None
