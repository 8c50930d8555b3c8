"""Edits whose keys active edits already use: what is flagged, and what the setting `overlap` does with them."""

from __future__ import annotations

import logging

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.errors import InputError, UpdateError
from rlsedit_fast.world import load_demo_model

FIRST = [rf.Edit("{} speaks", "Toze Lado Rekuno", "Kubeish"), rf.Edit("{} speaks", "Fado Veta Voluvu", "Nafiish")]
ALIAS = rf.Edit("{} speaks", "the Toze Lado Rekuno", "Nafiish")  # another text with nearly the same key
CONFIG = rf.EditConfig(
    layers=[0], prior={"lam": 0.05}, contexts={"prefixes": ("", "In short:")}, search={"steps": 2}, overlap_share=0.8
)


@pytest.fixture
def edited(tokenizer):
    def make(**changes):
        editor = rf.Editor(load_demo_model()[0], tokenizer, config=CONFIG.replace(**changes))
        editor.edit(FIRST)
        return editor

    return make


def test_a_repeated_key_is_flagged_and_a_new_one_is_not(edited):
    editor = edited()
    before = [weight.clone() for weight in editor.model.parameters()]
    repeated, new, known, twice = editor.overlaps(
        [ALIAS, rf.Edit("{} plays the", "Voluvu Fado", "organ"), FIRST[0], rf.Edit("{} is", "a Voluvu Fado", "organ")]
    )
    assert repeated.flagged
    assert repeated.nearest == 1
    assert repeated.used > 0.8
    assert new.used < repeated.used
    assert not new.flagged
    assert known.used > 0.9
    assert not known.flagged  # shares its value with the active edit of the subject
    assert twice.used > new.used  # the edits before it in the list count
    assert all(map(torch.equal, before, editor.model.parameters()))
    records = editor.history()
    assert [record.used for record in records] == pytest.approx([0.0, records[1].used])
    assert sum(record.innovation for record in records) == pytest.approx(2.0, rel=1e-4)  # the mean is 1


def test_warning_and_record(edited, caplog):
    editor = edited(overlap="warn")
    with caplog.at_level(logging.WARNING):
        (record,) = editor.edit([ALIAS])
    assert record.state == "active"
    assert record.used > 0.8
    assert "'the Toze Lado Rekuno speaks' -> 'Nafiish'" in caplog.text
    assert "most similar to edit 1" in caplog.text


def test_skip_leaves_the_others_and_raise_leaves_everything(edited):
    editor = edited(overlap="skip")
    new = rf.Edit("{} plays the", "Voluvu Fado", "organ")
    skipped, applied = editor.edit([ALIAS, new])
    assert (skipped.state, applied.state) == ("skipped", "active")
    assert skipped.used > 0.8
    assert skipped.innovation is None
    assert editor._session.layers.states[0].edits == 3 * 2
    (alone,) = editor.edit([ALIAS])
    assert alone.state == "skipped"
    editor = edited(overlap="raise")
    before = {name: value.clone() for name, value in editor.model.state_dict().items()}
    with pytest.raises(UpdateError, match=r"1 of 2 edits repeat or contradict.*most similar to edit 1"):
        editor.edit([new, ALIAS])
    assert len(editor.history()) == 2
    assert all(torch.equal(value, editor.model.state_dict()[name]) for name, value in before.items())


def test_a_replacement_is_not_compared_with_the_edit_that_it_replaces(edited):
    editor = edited(overlap="raise", same_subject="separate")
    assert editor.replace(1, "Nafiish").state == "active"


def test_by_default_used_shares_are_only_recorded(edited, caplog):
    editor = edited()
    with caplog.at_level(logging.WARNING):
        (record,) = editor.edit([ALIAS])
    assert record.state == "active"
    assert record.used > 0.8
    assert "repeat or contradict" not in caplog.text


def test_a_contradiction_adds_much_to_the_objective_and_a_repetition_little(tokenizer):
    config = CONFIG.replace(same_subject="separate", prior={"lam": None, "adherence": 0.9}, search={"steps": 25})
    editor = rf.Editor(load_demo_model()[0], tokenizer, config=config)
    first = [rf.Edit("{} plays the", name, "harp") for name in ("Toze Lado Rekuno", "Fado Veta Voluvu")]
    editor.edit(first)
    (again,) = editor.edit(first[:1])
    (against,) = editor.edit([rf.Edit("{} plays the", "Toze Lado Rekuno", "organ")])
    assert 3 * again.innovation < against.innovation
    assert again.used > 0.7
    assert against.used > 0.7


def test_a_baseline_knows_no_used_shares(tokenizer):
    editor = rf.Editor(load_demo_model()[0], tokenizer, config=CONFIG.for_rule("memit"))
    (record, _) = editor.edit(FIRST)
    assert (record.used, record.innovation) == (None, None)
    with pytest.raises(InputError, match="rule='memit'"):
        editor.overlaps([ALIAS])


def test_before_the_first_edit_nothing_is_used(tokenizer):
    editor = rf.Editor(load_demo_model()[0], tokenizer, config=CONFIG)
    assert [one.used for one in editor.overlaps([ALIAS])] == [0.0]
