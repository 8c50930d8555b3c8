"""Edits that the model does not state after the write are refined, and a round without gain changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.editing import refinement, stream
from rlsedit_fast.editing.layers import EditedLayers
from rlsedit_fast.editing.search import value_search
from rlsedit_fast.errors import ResourceError, UpdateError
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.store import Store
from rlsedit_fast.world import World, load_demo_model

from .demo_anchors import demo_statistics

WORLD = World.generate()
EDITS = [case.edit for case in world_cases(WORLD, 12, 0)]
BATCH = 6
FIRST, SECOND = EDITS[:BATCH], EDITS[BATCH:]
# With this large mu, the model does not state some edits whose value search converged.
CONFIG = rf.EditConfig(
    layers=(0, 1),
    contexts={"prefixes": ("", "People speak .")},
    search={"steps": 40, "stop_nll": 0.03},
    prior={"mu": 80.0},
)


def make_editor(store=None, **changes):
    editor = rf.Editor(*load_demo_model(), config=CONFIG.replace(**{"batch_size": BATCH, **changes}), store=store)
    editor.anchor(demo_statistics(600))
    return editor


def weights(editor):
    return {name: value.detach().clone() for name, value in editor.model.state_dict().items()}


def failed(records):
    return [record.id for record in records if not record.success and record.search_rank == 1]


def exact(editor, edits):
    prompts = [(edit.prompt.format(edit.subject), edit.target) for edit in edits]
    return [one.exact for one in score(editor.model, editor.tokenizer, prompts)]


def assert_same(one, other):
    """Compares weights, states, rows, and the records without their times, bit for bit."""
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())
    for a, b in zip(one._session.layers.states, other._session.layers.states, strict=True):
        first, second = a.saved(), b.saved()
        for name in ("weight", "base", "pending", "signs", "image"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert (first.objective, first.edits) == (second.objective, second.edits)
    ids = one._session.ledger.active
    assert ids == other._session.ledger.active
    for a, b in zip(one._session.ledger.rows(ids), other._session.ledger.rows(ids), strict=True):
        assert a.weight == b.weight
        assert all(map(torch.equal, (*a.keys, *a.values, a.goal), (*b.keys, *b.values, b.goal)))
    for a, b in zip(one.history(), other.history(), strict=True):
        assert replace(a, time=b.time) == b


def test_only_edits_that_are_not_stated_are_refined():
    plain, refined = make_editor(refine=0), make_editor(refine=1)
    before, after = plain.edit(FIRST), refined.edit(FIRST)
    unstated = failed(before)
    assert 0 < len(unstated) < BATCH
    assert sum(r.success for r in after) > sum(r.success for r in before)
    assert [record.success for record in after] == exact(refined, FIRST)
    assert refined.history() == after
    plain_rows, refined_rows = (e._session.ledger.rows(range(1, BATCH + 1)) for e in (plain, refined))
    for at, (one, other) in enumerate(zip(plain_rows, refined_rows, strict=True)):
        # Rows keep their keys and weights. Only the values of the last layer change.
        assert all(map(torch.equal, one.keys, other.keys))
        assert one.weight == other.weight
        assert torch.equal(one.values[0], other.values[0])
        assert torch.equal(one.values[1], other.values[1]) == (at + 1 not in unstated)
    for one, other in zip(plain._session.layers.states, refined._session.layers.states, strict=True):
        assert torch.equal(one.precision_inverse(), other.precision_inverse())
    assert torch.equal(plain.context.projections[0].weight, refined.context.projections[0].weight)


def test_a_later_call_refines_as_many_earlier_edits_as_it_applies(monkeypatch):
    editor = make_editor(refine=1)
    with monkeypatch.context() as patch:
        patch.setattr(refinement, "_is_better", lambda *_: False)
        unstated = failed(editor.edit(FIRST))
    assert unstated
    editor.edit(SECOND)
    records = editor.history()[:BATCH]
    assert len(failed(records)) < len(unstated)
    assert [record.success for record in records] == exact(editor, FIRST)
    assert [record.rank == 1 for record in records] == exact(editor, FIRST)


def test_records_of_a_call_of_several_batches_are_measured_at_its_end(tmp_path):
    batches, edits = [], [case.edit for case in world_cases(WORLD, 20, 0)]
    with make_editor(tmp_path, refine=0, batch_size=10, prior={"mu": 111.0}) as editor:
        records = editor.edit(edits, on_batch=batches.extend)
        assert [record.rank == 1 for record in records] == exact(editor, edits)
        assert [one.rank for one in batches] != [one.rank for one in records], "the second batch affects the first"
    with rf.Editor(*load_demo_model(), store=tmp_path) as opened:
        assert opened.history() == records
        assert_same(opened, editor)


def test_the_same_earlier_edits_are_checked_after_reopening(tmp_path):
    with make_editor(tmp_path, refine=0) as editor:
        editor.edit(EDITS[:7])
        editor.undo(3)
        drawn = [editor._session.refiner.earlier_ids(than, 3) for than in range(1, 30)]
    with rf.Editor(*load_demo_model(), store=tmp_path) as opened:
        assert [opened._session.refiner.earlier_ids(than, 3) for than in range(1, 30)] == drawn
        assert opened._session.refiner.earlier_ids(5, 10) == [1, 2, 4]
    assert drawn[0] == []
    assert set().union(*drawn) == {1, 2, 4, 5, 6, 7}
    assert all(len(ids) == 3 for ids in drawn[5:])


def test_the_number_of_rounds_is_the_setting(monkeypatch):
    sizes, real = [], value_search.search_within_memory

    def spy(site, requests, *rest):
        sizes.append(len(requests))
        return real(site, requests, *rest)

    monkeypatch.setattr(value_search, "search_within_memory", spy)
    monkeypatch.setattr(refinement, "_is_better", lambda *_: True)
    monkeypatch.setattr(refinement, "_FRACTION", 0.01)  # so that no round helps
    for rounds in (0, 1, 3):
        sizes.clear()
        editor = make_editor(refine=rounds)
        editor.edit(FIRST)
        assert len(sizes) == 1 + rounds


def test_a_round_without_gain_changes_nothing_and_is_the_last(monkeypatch, tmp_path):
    plain = make_editor(tmp_path / "plain", refine=0)
    plain.edit(FIRST)
    assert failed(plain.history())
    comparisons = []
    monkeypatch.setattr(refinement, "_is_better", lambda *measured: comparisons.append(measured))
    refined = make_editor(tmp_path / "refined", refine=3)
    refined.edit(FIRST)
    assert len(comparisons) == 1, "a round without gain is the last one"
    assert_same(refined, plain)
    monkeypatch.undo()
    for editor in (plain, refined):
        editor.close()
    with Store(tmp_path / "refined", write=False) as store:
        assert [entry.kind for entry in store.entries] == ["start", "edit"]


@pytest.mark.parametrize("error", [UpdateError, pytest.param(ResourceError, marks=pytest.mark.soak)])
def test_a_failed_round_keeps_the_applied_edits_and_warns(monkeypatch, caplog, error):
    plain, refined = make_editor(refine=0), make_editor(refine=1)
    plain.edit(EDITS)
    real, calls = refinement.Refiner._move_values, []

    def fails(self, ids):
        calls.append(list(ids))
        monkeypatch.setattr(value_search, "search_within_memory", raising)
        try:
            return real(self, ids)
        finally:
            monkeypatch.setattr(value_search, "search_within_memory", search)

    def raising(*_args):
        raise error("made to fail")

    search = value_search.search_within_memory
    monkeypatch.setattr(refinement.Refiner, "_move_values", fails)
    batches = []
    records = refined.edit(EDITS, on_batch=batches.append)
    assert len(calls) == 3, "after each batch and at the end of the call"
    assert [len(batch) for batch in batches] == [BATCH, BATCH]
    assert "were not refined: made to fail" in caplog.text
    assert [record.state for record in records] == ["active"] * len(EDITS)
    assert_same(refined, plain)


def test_ctrl_c_in_a_round_keeps_the_applied_edits(monkeypatch):
    plain, refined = make_editor(refine=0), make_editor(refine=1)
    plain.edit(FIRST)

    def pressed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(EditedLayers, "move_values", pressed)
    with pytest.raises(KeyboardInterrupt):
        refined.edit(FIRST)
    assert_same(refined, plain)


@pytest.mark.parametrize(("keys", "snapshot"), [pytest.param("full", False, marks=pytest.mark.soak), ("fp16", True)])
def test_a_refined_stream_is_reopened_and_undone_bit_for_bit(tmp_path, keys, snapshot):
    uninterrupted = make_editor(stored_rows=keys)
    start = weights(uninterrupted)
    uninterrupted.edit(EDITS)
    with make_editor(tmp_path, stored_rows=keys) as editor:
        editor.edit(EDITS)
        if snapshot:
            editor._recorder.snapshot(editor._session.layers)
    with Store(tmp_path, write=False) as store:
        assert [entry.kind for entry in store.entries].count("revise") >= 2
    with rf.Editor(*load_demo_model(), store=tmp_path) as opened:
        assert_same(opened, uninterrupted)
        for one in (opened, uninterrupted):
            one.undo([2, 5, 8, 9])
        assert_same(opened, uninterrupted)
    with rf.Editor(*load_demo_model(), store=tmp_path) as opened:
        assert_same(opened, uninterrupted)
        opened.undo(opened._session.ledger.active)
        assert all(torch.equal(value, start[name]) for name, value in weights(opened).items())


def test_an_edit_whose_search_did_not_converge_is_not_refined(monkeypatch):
    monkeypatch.setattr(
        refinement.Refiner, "_move_values", lambda *_: pytest.fail("refined an edit whose search did not converge")
    )
    editor = make_editor(search={"clamp": 0.01})
    assert all(record.search_rank > 1 and not record.success for record in editor.edit(EDITS[:4]))


def test_a_batch_and_its_refinement_are_stored_together(tmp_path, monkeypatch):
    """With `require_stated`, nothing is stored before the batch was refined and checked."""
    stored = []

    def check(records, _earlier):
        stored.append(editor._recorder.store.last)

    monkeypatch.setattr(stream, "check_stated", check)
    with make_editor(tmp_path, refine=1) as editor:
        records = editor.edit(FIRST, require_stated=True)
        kinds = [entry.kind for entry in editor._recorder.store.entries]
        assert kinds[:2] == ["start", "edit"]
        assert "revise" in kinds
        assert stored == [0]
    with rf.Editor(*load_demo_model(), store=tmp_path) as opened:
        assert opened.history() == records
        assert_same(opened, editor)
