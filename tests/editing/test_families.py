"""Every architecture is edited, saved, reloaded and restored."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.models.sites import find_site
from rlsedit_fast.world import RELATIONS, World

NORMALIZED = {"gemma2", "gemma3", "olmo2"}
OLD_TRANSFORMERS = version("transformers").startswith("4.")
DTYPES = [torch.float32, torch.bfloat16]
IDS = ["fp32", "bf16"]


def facts(count):
    """False facts about the given number of people, with alternating relations."""
    edits = []
    for i, person in enumerate(World.generate().people[:count]):
        relation = RELATIONS[i % len(RELATIONS)]
        target = next(value for value in relation.values[i % 7 :] if value != person.facts[relation.name])
        edits.append(rf.Edit(relation.phrasings[0], person.name, target))
    return edits


EDITS = facts(20)


def make_editor(model, tokenizer, **changes):
    config = rf.EditConfig(
        **{
            "layers": (2,) if changes.pop("single", False) else (1, 2),
            "batch_size": 5,
            "contexts": {"prefixes": ("",)},
            "search": {"clamp": 4.0, "steps": 15, "stop_nll": 1.0},
            "fact_token": "last",
            "prior": {"adherence": 0.9},
        }
    ).replace(**changes)
    editor = rf.Editor(model, tokenizer, config=config)
    editor.anchor([edit.prompt.format(edit.subject) for edit in facts(60)[20:]])
    return editor


def nlls(model, tokenizer):
    return [s.nll for s in score(model, tokenizer, [(e.prompt.format(e.subject), e.target) for e in EDITS])]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.soak)], ids=["fp32", "bf16"]
)
def test_the_adapter_gives_the_logits_of_the_edited_model(make_model, tokenizer, family, dtype, tmp_path):
    """In float32, like the master weights: a bfloat16 model rounds its edited weights, and peft does not."""
    peft = pytest.importorskip("peft")
    # Refinement writes rows a second time. Their directions differ by rounding, which may count as additional rank.
    editor = make_editor(make_model(family, dtype), tokenizer, single=family in NORMALIZED, refine=0)
    editor.edit(EDITS)
    report = editor.save_adapter(tmp_path)
    assert all(module.used == module.needed <= len(EDITS) for module in report.modules)
    edited, base = (make_model(family, dtype).float() for _ in range(2))
    for change in editor.changes():
        weight = edited.get_submodule(change.name).weight
        weight.data = (change.current.T if change.transposed else change.current).clone()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.tensor([tokenizer(EDITS[3].prompt.format(EDITS[3].subject))["input_ids"]])
    with torch.no_grad():
        plain = make_model(family, dtype).float()(ids).logits
        torch.testing.assert_close(adapted(ids).logits, edited(ids).logits, rtol=0, atol=1e-4)
    assert (edited(ids).logits - plain).abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_edits_work_are_saved_in_a_checkpoint_and_undone(make_model, tokenizer, family, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(family, dtype)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    before = nlls(model, tokenizer)
    editor = make_editor(model, tokenizer, single=family in NORMALIZED)
    records = editor.edit(EDITS)
    assert [record.batch for record in records] == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5
    after = nlls(model, tokenizer)
    assert all(new < old for new, old in zip(after, before, strict=True))

    editor.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ids = torch.tensor([tokenizer(EDITS[3].prompt.format(EDITS[3].subject))["input_ids"]])
    reloaded = again.state_dict()
    assert all(torch.equal(value, reloaded[name]) for name, value in model.state_dict().items())
    if not (OLD_TRANSFORMERS and family == "gptj" and dtype == torch.bfloat16):  # rounds its sine table on loading
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)

    for at in (2, 0, 3, 1):
        editor.undo([record.id for record in records[5 * at : 5 * at + 5]])
    now = model.state_dict()
    edited = [f"{projection.name}.weight" for projection in editor.context.projections]
    for name, value in start.items():
        if name not in edited:
            assert torch.equal(now[name], value), f"{name} is not one of the edited weights"
        else:
            # The last undo removes all edits and restores the original weight.
            assert torch.equal(now[name], value)


def test_a_normalized_projection_is_detected_by_its_behavior(make_model, tokenizer, family):
    model = make_model(family)
    decoder = find_decoder(model)
    with quiet(model):
        site = find_site(decoder, decoder.select((1, 2)))
    assert site.direct == (family not in NORMALIZED)
    if family in NORMALIZED:
        with pytest.raises(rf.errors.ModelError, match="pass one layer"):
            rf.Editor(model, tokenizer, config=rf.EditConfig(layers=(1, 2)))
        assert rf.Editor(model, tokenizer).layers == (1,)
