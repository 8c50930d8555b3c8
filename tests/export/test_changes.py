"""Changed weights are found, and other differences are rejected by name."""

import copy

import pytest
import torch

from rlsedit_fast.errors import InputError
from rlsedit_fast.export import WeightChange, changes_between
from rlsedit_fast.models.projections import find_decoder


def edit(model, *layers, rank=3):
    edited = copy.deepcopy(model)
    for projection in find_decoder(edited).select(layers):
        d_v, d_k = projection.weight.shape
        change = torch.randn(d_v, rank) @ torch.randn(rank, d_k) * 0.05
        projection.write(projection.weight.float() + change)
    return edited


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_changed_weights_are_found_in_model_order(name, dtype, make_model):
    base = make_model(name, dtype)
    edited = edit(base, 3, 1)
    changes = changes_between(base, edited)
    before, after = (find_decoder(model).select([1, 3]) for model in (base, edited))
    assert [change.name for change in changes] == [projection.name for projection in after]
    for change, was, now in zip(changes, before, after, strict=True):
        assert torch.equal(change.original, was.weight)
        assert torch.equal(change.stored, now.weight)
        assert torch.equal(change.current, now.weight)
        assert change.transposed == (name == "gpt2")
        assert torch.equal(change.delta, now.weight.float() - was.weight.float())
        assert change.delta.dtype == torch.float32


def test_equal_models_have_no_changes(model):
    assert changes_between(model, copy.deepcopy(model)) == []


def test_sign_of_zero_counts_as_a_change(model):
    edited = copy.deepcopy(model)
    for changed, sign in ((model, 0.0), (edited, -0.0)):
        find_decoder(changed).select([2])[0].weight[5, 7] = sign
    (change,) = changes_between(model, edited)
    assert change.name == find_decoder(model).select([2])[0].name


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "model.norm.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("gpt2", "transformer.wte.weight"),
        ("gpt2", "transformer.h.2.mlp.c_proj.bias"),
        ("gpt2", "transformer.h.2.ln_1.bias"),
    ],
)
def test_other_changes_are_rejected_by_name(architecture, name, make_model):
    base = make_model(architecture)
    edited = edit(base, 1)
    edited.get_parameter(name).data.view(-1)[-1] += 1
    with pytest.raises(InputError, match=f"differ in {name.replace('.', '[.]')}; only changes of nn.Linear"):
        changes_between(base, edited)


def test_mismatched_models_are_rejected(make_model):
    base = make_model("llama")
    with pytest.raises(InputError, match=r"configs .*hidden_size|configs .*n_embd"):
        changes_between(base, make_model("gpt2"))
    with pytest.raises(InputError, match=r"float32 and .*bfloat16"):
        changes_between(base, make_model("llama", torch.bfloat16))
    lacking = copy.deepcopy(base)
    del lacking.model.layers[1].mlp.up_proj
    with pytest.raises(InputError, match=r"only one .*layers\.1\.mlp\.up_proj\.weight"):
        changes_between(base, lacking)
    wider = copy.deepcopy(base)
    wider.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 97, bias=False)
    with pytest.raises(InputError, match=r"up_proj\.weight \(\[96, 64\] .*\[97, 64\]"):
        changes_between(base, wider)


def test_untied_head_is_rejected(make_model):
    base = make_model("gpt2")
    edited = copy.deepcopy(base)
    edited.lm_head.weight = torch.nn.Parameter(base.lm_head.weight + 1)
    with pytest.raises(InputError, match=r"only one .*lm_head\.weight"):
        changes_between(base, edited)


def test_mismatched_tensors_are_rejected():
    original = torch.randn(4, 6).bfloat16()
    master = original.float() + 0.1 * torch.randn(4, 6)
    stored = master.bfloat16()
    assert torch.equal(WeightChange("m", original, stored, master, False).delta, master - original.float())
    with pytest.raises(InputError, match=r"m: original, stored and current have shapes .*\[6, 4\]"):
        WeightChange("m", original, stored, master.T, False)
    with pytest.raises(InputError, match=r"stored is torch\.float32"):
        WeightChange("m", original, master, master, False)
    with pytest.raises(InputError, match=r"current is torch\.float64"):
        WeightChange("m", original, stored, master.double(), False)
    stale = master.clone()
    stale[2, 3] *= 1.02
    with pytest.raises(InputError, match="from the same state"):
        WeightChange("m", original, stored, stale, False)
    for at in range(3):
        given = [original.clone(), stored.clone(), master.clone()]
        given[at][1, 1] = float("nan")
        with pytest.raises(InputError, match=f"m: {('original', 'stored', 'current')[at]} contains NaN or Inf"):
            WeightChange("m", *given, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_may_be_rounded_either_way(dtype):
    # Split master weights round ties up, a cast rounds them to even.
    eps = torch.finfo(dtype).eps
    stored = torch.tensor([[1.0, 1 + eps, 1 + 2 * eps, 2.0, -1.0, 0.0]]).to(dtype)
    with pytest.raises(InputError, match="from the same state"):
        WeightChange("m", stored, stored, stored.float() + 0.6 * eps * (stored == 1), False)
    for side in (0.5, -0.5):
        master = stored.float() + side * eps * (stored != 0)
        WeightChange("m", stored, stored, master, False)
