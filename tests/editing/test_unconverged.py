"""An edit whose value search does not converge is kept, skipped or raises, as configured; its record has the rank."""

from __future__ import annotations

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.errors import UpdateError
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.world import RELATIONS, World, load_demo_model

PEOPLE = World.generate().people


def fact(person, relation=0):
    name = RELATIONS[relation].name
    target = next(value for value in RELATIONS[relation].values if value != person.facts[name])
    return rf.Edit(RELATIONS[relation].phrasings[0], person.name, target)


def unreachable(person, relation=0):
    """An edit whose value search does not converge within the steps and the clamp."""
    return rf.Edit(RELATIONS[relation].phrasings[0], person.name, "<pad> <pad> <pad>")


def make_editor(unconverged, **changes):
    model, tokenizer = load_demo_model()
    settings = {
        "layers": (0,),
        "contexts": {"prefixes": ("",)},
        "search": {"steps": 25, "stop_nll": 0.03},
        "prior": {"lam": 0.1},
    }
    return rf.Editor(model, tokenizer, config=rf.EditConfig(**settings).replace(unconverged=unconverged, **changes))


def states(editor, edit):
    prompt = edit.prompt.format(edit.subject)
    return score(editor.model, editor.tokenizer, [(prompt, edit.target)])[0].exact


def weight(editor):
    return editor.model.state_dict()["model.layers.0.mlp.down_proj.weight"].clone()


def test_kept_edits_are_applied_and_their_records_have_the_rank():
    editor = make_editor("keep")
    good, bad = editor.edit([fact(PEOPLE[0]), unreachable(PEOPLE[1])])
    assert (good.search_converged, good.search_rank, good.state) == (True, 1, "active")
    assert good.search_nll <= 0.03
    assert (bad.search_converged, bad.state, bad.search_steps) == (False, "active", 25)
    assert bad.search_rank > 1
    assert bad.search_nll > 0.03


def test_the_rank_is_the_worst_of_the_targets_tokens():
    editor = make_editor("keep", search={"steps": 1, "clamp": 1e-9})
    edit = fact(PEOPLE[0])
    (record,) = editor.edit([edit])
    ids = editor.tokenizer(f"{edit.prompt.format(edit.subject)} {edit.target}", return_tensors="pt")["input_ids"]
    model, _ = load_demo_model()
    count = len(edit.target.split())
    with torch.no_grad():
        scores = model(ids).logits[0, -1 - count : -1]
    ranks = [int((row > row[token]).sum()) + 1 for row, token in zip(scores, ids[0, -count:], strict=True)]
    assert record.search_rank == max(ranks)


def test_skipped_edits_are_recorded_and_leave_no_trace():
    editor, without = make_editor("skip"), make_editor("skip")
    records = editor.edit([fact(PEOPLE[0]), unreachable(PEOPLE[1]), fact(PEOPLE[2])])
    without.edit([fact(PEOPLE[0]), fact(PEOPLE[2])])
    assert [r.state for r in records] == ["active", "skipped", "active"]
    assert [r.id for r in editor.history()] == [1, 2, 3]
    assert (records[1].realized, records[1].search_converged) == (0.0, False)
    torch.testing.assert_close(weight(editor), weight(without), rtol=1e-4, atol=1e-5)
    with pytest.raises(rf.errors.InputError, match=r"2 \(skipped\): not active"):
        editor.undo(2)
    editor.undo([1, 3])
    assert torch.equal(weight(editor), weight(make_editor("skip")))


def test_a_batch_of_only_skipped_edits_changes_nothing():
    editor = make_editor("skip")
    start = weight(editor)
    assert [r.state for r in editor.edit([unreachable(PEOPLE[0]), unreachable(PEOPLE[1])])] == ["skipped"] * 2
    assert torch.equal(weight(editor), start)
    assert editor.edit([fact(PEOPLE[0])])[0].state == "active"


def test_an_edit_stays_active_when_its_replacement_is_skipped():
    editor = make_editor("skip")
    first = fact(PEOPLE[0])
    editor.edit([first, fact(PEOPLE[1])])
    before = weight(editor)
    assert [r.state for r in editor.edit([unreachable(PEOPLE[0])])] == ["skipped"]
    assert editor.replace(1, target="<pad> <pad> <pad>").state == "skipped"
    assert [r.state for r in editor.history()] == ["active", "active", "skipped", "skipped"]
    torch.testing.assert_close(weight(editor), before, rtol=1e-4, atol=1e-5)
    assert states(editor, first)
    editor.undo(1)
    assert not states(editor, first)


def test_a_skipped_edit_does_not_affect_others_of_its_subject():
    editor = make_editor("skip")
    good, other = fact(PEOPLE[0], 0), fact(PEOPLE[0], 2)
    editor.edit([good])
    records = editor.edit([unreachable(PEOPLE[0], 1), fact(PEOPLE[3])])
    assert [r.state for r in records] == ["skipped", "active"]
    assert states(editor, good)
    without = make_editor("skip")
    without.edit([good])
    without.edit([fact(PEOPLE[3])])
    moved = (weight(without) - weight(make_editor("skip"))).norm()
    # The searches start from slightly different models. A skipped edit's value would be most of the change.
    assert (weight(editor) - weight(without)).norm() < 0.05 * moved
    editor.edit([other])
    assert states(editor, good)
    assert states(editor, other)
    assert [r.joint_with for r in editor.history()] == [(4,), (), (), (1,)]


def test_batches_that_raise_change_nothing_and_the_error_names_the_edits():
    editor = make_editor("raise", batch_size=2)
    start = weight(editor)
    with pytest.raises(
        UpdateError,
        match=rf"the value search of 1 of 2 edits did not converge.*'{PEOPLE[1].name}' -> '<pad> <pad> <pad>' \(rank",
    ):
        editor.edit([fact(PEOPLE[0]), unreachable(PEOPLE[1])])
    assert torch.equal(weight(editor), start)
    assert editor.history() == []
    with pytest.raises(UpdateError, match="first 2 of 3"):
        editor.edit([fact(PEOPLE[0]), fact(PEOPLE[1]), unreachable(PEOPLE[2])])
    assert [r.state for r in editor.history()] == ["active", "active"]


def test_a_skipped_replacement_changes_no_other_edit_of_the_subject():
    editor = make_editor("skip")
    one, other = fact(PEOPLE[0], 0), fact(PEOPLE[0], 2)
    editor.edit([one, other])
    before, partners = weight(editor), [r.joint_with for r in editor.history()]
    assert partners == [(2,), (1,)]
    assert [r.state for r in editor.edit([unreachable(PEOPLE[0], 0)])] == ["skipped"]
    assert torch.equal(weight(editor), before)
    assert [r.joint_with for r in editor.history()] == [*partners, ()]
    assert [r.state for r in editor.edit([unreachable(PEOPLE[0], 2), fact(PEOPLE[3])])] == ["skipped", "active"]
    assert [r.joint_with for r in editor.history()][:2] == partners
    assert states(editor, one)
    assert states(editor, other)
    editor.undo(2)
    editor.undo(1)
    assert [r.state for r in editor.history()] == ["undone", "undone", "skipped", "skipped", "active"]
    assert editor.history()[3].search_steps == 25, "the record has the figures of its own search"


def test_only_unconverged_edits_of_a_subject_are_skipped():
    """Also when a skipped edit would replace an older one: that one stays and shares its value with the others."""
    editor = make_editor("skip")
    one, new = fact(PEOPLE[0], 0), fact(PEOPLE[0], 2)
    assert [r.state for r in editor.edit([unreachable(PEOPLE[0], 1), one])] == ["skipped", "active"]
    assert states(editor, one)
    assert [r.state for r in editor.edit([unreachable(PEOPLE[0], 0), new])] == ["skipped", "active"]
    assert [r.joint_with for r in editor.history()] == [(), (4,), (), (2,)]
    assert states(editor, one)
    assert states(editor, new)


def test_only_applied_edits_cause_a_warning(caplog):
    make_editor("skip").edit([fact(PEOPLE[0]), unreachable(PEOPLE[1])])
    assert "does not state their targets" not in caplog.text
    make_editor("keep").edit([fact(PEOPLE[0]), unreachable(PEOPLE[1])])
    assert "1 of 2 edits are applied but the model does not state their targets" in caplog.text
