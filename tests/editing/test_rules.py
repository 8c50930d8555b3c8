"""The editor with every rule: the same keys and values, and the operations that each rule supports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.baselines import BASELINES, RULES
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.evaluation.demo import anchor_texts
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.world import World, load_demo_model

from .demo_anchors import demo_statistics

WORLD = World.generate()
EDITS = [case.edit for case in world_cases(WORLD, 12, 0)]
CONFIG = EditConfig(
    layers=(0,),
    contexts={"prefixes": ("",)},
    search={"steps": 40, "stop_nll": 0.03},
    batch_size=6,
    prior={"adherence": 0.95},
)
OPTIONS = {"alphaedit": {"null_share": 0.7, "ridge": 0.01}, "ultraedit": {"rate": 10.0}, "ft-bounded": {"bound": 0.02}}


def make_editor(rule="rls", **changes):
    options = changes.pop("rule_options", OPTIONS.get(rule, {}))
    editor = rf.Editor(*load_demo_model(), config=CONFIG.replace(rule=rule, rule_options=options, **changes))
    editor.anchor(demo_statistics(1000))
    return editor


def weight(editor, layer=0):
    return editor.model.state_dict()[f"model.layers.{layer}.mlp.down_proj.weight"].clone()


def exact_count(editor):
    prompts = [(edit.prompt.format(edit.subject), edit.target) for edit in EDITS]
    return sum(one.exact for one in score(editor.model, editor.tokenizer, prompts))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_edits_the_model_and_it_states_the_targets(rule):
    editor = make_editor(rule)
    start = weight(editor)
    records = editor.edit(EDITS)
    moved = float((weight(editor) - start).norm())
    assert moved > 0
    assert editor.deviation()[0].weight == pytest.approx(moved, rel=1e-5)
    assert (editor.deviation()[0].weight_bound < float("inf")) == (rule == "rls")
    if rule != "ultraedit":  # its normalization statistics are poor in the first batches
        assert exact_count(editor) >= 10
        assert all(record.realized > 0.5 for record in records)


def test_history_aware_memit_with_lam_0_equals_rls():
    one, other = (
        make_editor(rule, prior={"lam": 0.0, "mu": 0.5}, search={"ahead": 12}) for rule in ("rls", "memit-history")
    )
    start = weight(one)
    one.edit(EDITS)
    other.edit(EDITS)
    assert float((weight(one) - weight(other)).norm()) < 1e-3 * float((weight(one) - start).norm())


@pytest.mark.parametrize("rule", BASELINES)
def test_unsupported_operations_raise_and_change_nothing(rule):
    editor = make_editor(rule)
    record, *_ = editor.edit(EDITS[:6])
    before = weight(editor)
    for unsupported in (
        lambda: editor.undo(record.id),
        lambda: editor.replace(record.id, target="organ"),
        lambda: editor.edit([replace(EDITS[0], target="organ")]),  # contradicts an active edit
    ):
        with pytest.raises(InputError, match="cannot remove an edit"):
            unsupported()
    assert torch.equal(weight(editor), before)
    assert [r.state for r in editor.history()] == ["active"] * 6
    editor.edit(EDITS[6:])  # later edits still work


def test_a_subject_edited_separately_needs_no_removal():
    editor = make_editor("memit", same_subject="separate")
    editor.edit(EDITS[:2])
    editor.edit([replace(EDITS[0], target=EDITS[1].target)])
    assert len(editor.history()) == 3


def test_another_rule_edits_several_layers_together():
    both = make_editor("memit-history", layers=(0, 1))
    start = weight(both, 1)
    both.edit(EDITS)
    assert exact_count(both) >= 10
    assert not torch.equal(weight(both, 1), start)


@pytest.mark.parametrize("rule", BASELINES)
def test_settings_of_rls_raise_with_another_rule(rule):
    options = OPTIONS.get(rule, {})
    for name, value, given in (
        ("contexts.rows", "contexts", {"contexts": {"rows": "contexts"}}),
        ("refine", 1, {"refine": 1}),
    ):
        with pytest.raises(InputError, match=f"{name}={value!r} requires rule='rls', got rule='{rule}'; omit {name}"):
            EditConfig(rule=rule, rule_options=options, **given)
    plain = EditConfig(rule=rule, rule_options=options)
    same = EditConfig(rule=rule, rule_options=options, contexts={"rows": "mean"}, refine=0)
    for config in (plain, same):
        assert (config.effective_rows, config.effective_refine) == ("mean", 0)


def test_a_bfloat16_model_has_float32_master_weights_with_another_rule():
    model, tokenizer = load_demo_model()
    editor = rf.Editor(model.to(torch.bfloat16), tokenizer, config=CONFIG.replace(rule="memit"))
    editor.anchor(anchor_texts(WORLD, 0)[:1000])
    editor.edit(EDITS)
    (state,) = editor._session.layers.states
    stored = editor.context.projections[0].weight
    assert state.weight.dtype == torch.float32
    assert not torch.equal(state.weight, stored.float()), "the master has the lower bits"
    assert float((state.weight - stored.float()).abs().max()) <= float(stored.float().abs().max()) * 2**-7


def test_norm_anchoring_gives_every_value_the_mean_norm_of_the_first_batch():
    editor = make_editor(norm_anchor=True)
    first = editor._session.finder.find(editor.context.prepare(EDITS[:6]))
    later = editor._session.finder.find(editor.context.prepare(EDITS[6:]))
    norms = first.goal[:, 0].norm(dim=1)
    assert torch.allclose(norms, norms.mean(), rtol=1e-5)
    assert torch.allclose(later.goal[:, 0].norm(dim=1), norms.mean(), rtol=1e-5)
    other = make_editor()
    plain = other._session.finder.find(editor.context.prepare(EDITS[:6]))
    assert float(norms.mean()) == pytest.approx(float(plain.goal[:, 0].norm(dim=1).mean()), rel=1e-5)
    editor.edit(EDITS)
    assert exact_count(editor) >= 10


def test_unknown_rules_and_rule_options_raise():
    with pytest.raises(InputError, match="expected rls, or a rule"):
        EditConfig(rule="unknown")
    with pytest.raises(InputError, match="no option rate"):
        EditConfig(rule="memit", rule_options={"rate": 1.0})
