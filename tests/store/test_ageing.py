"""Weights of old edits are halved exactly, also across undo, replay and consolidation (`halve_after`)."""

from __future__ import annotations

import shutil

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.editing.rows import aged_weight
from rlsedit_fast.editing.storage.recovery import read_history
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls.reference import solve_all

from .conftest import ANCHORS, assert_same, make_edits, tiny_config


def test_weights_are_halved_at_one_two_four_times_the_age():
    ages = [aged_weight(1.0, age, 10) for age in (0, 9, 10, 19, 20, 39, 40, 79, 80)]
    assert ages == [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 16]
    assert aged_weight(3.0, 1000, None) == 3.0


def check_solution(editor):
    """Every layer is the minimizer for the rows with their present weights, and J is the objective there.

    The editor computes in float64: in float32 an undo amplifies rounding errors by a factor that depends on the
    values.
    """
    ledger, layers = editor._session.ledger, editor._session.layers
    rows = [*layers.protected, *ledger.rows(ledger.active)]
    for at, state in enumerate(layers.states):
        keys, values, weights = layers._stacked(rows, at)
        weight, _, objective = solve_all(state.original, state.prior, keys, values, weights)
        torch.testing.assert_close(state.weight, weight, rtol=1e-8, atol=1e-9 * float(weight.norm()))
        assert state.objective == pytest.approx(objective, rel=1e-8)
        assert state.edits == len(rows)


def test_old_edits_are_the_solution_with_halved_weights(tiny, tokenizer, tmp_path):
    config = tiny_config(halve_after=3, same_subject="separate")
    store = tmp_path / "store"
    with rf.Editor(tiny().double(), tokenizer, config=config, store=store) as editor:
        editor.anchor(ANCHORS)
        editor.protect(["Toze Lado Rekuno"])
        editor.edit(make_edits(11))
        expected = [aged_weight(1 + i % 2, age, 3) for i, age in enumerate(range(10, 0, -1))]
        # The last batch has one edit and is written with the weights that belong to eleven edits.
        assert [record.present_weight for record in editor.history()[:10]] == expected
        assert expected[0] == 1 / 4
        check_solution(editor)
        editor.undo([2, 9])
        check_solution(editor)
        editor.replace(5, "organ")  # the twelfth edit, which ages the others
        assert editor.history()[3].present_weight == aged_weight(2, 8, 3)
        assert editor.history()[11].present_weight == 1.0
        assert editor.history()[11].lowered_weight is None
        assert [record.weight for record in editor.history()[:4]] == [1, 2, 1, 2]  # as given
        check_solution(editor)
        copied = tmp_path / "copied"
        shutil.copytree(store, copied)
        for snapshot in (copied / "snapshots").iterdir():  # replays every change
            snapshot.unlink()
        with rf.Editor(tiny().double(), tokenizer, store=copied) as replayed:
            assert_same(editor, replayed)
        editor.consolidate()
        check_solution(editor)
        weights = [record.present_weight for record in editor.history()]
        live = editor.model.state_dict()
    assert [record.present_weight for record in read_history(store)] == weights
    with rf.Editor(tiny().double(), tokenizer, store=store) as opened:
        assert all(torch.equal(value, opened.model.state_dict()[name]) for name, value in live.items())
        check_solution(opened)
        opened.edit(make_edits(4, start=20))
        check_solution(opened)


def test_a_failed_batch_leaves_the_weights(tiny, tokenizer):
    editor = rf.Editor(tiny(), tokenizer, config=tiny_config(halve_after=1, unconverged="raise"))
    with pytest.raises(rf.RLSEditError):
        editor.edit(make_edits(4))
    loose = rf.Editor(tiny(), tokenizer, config=tiny_config(halve_after=1))
    loose.edit(make_edits(4))
    before = [record.present_weight for record in loose.history()]
    objective = [state.objective for state in loose._session.layers.states]
    loose._session.config = loose.config.replace(unconverged="raise")
    loose._session.finder._config = loose._session.config
    with pytest.raises(rf.RLSEditError):
        loose.edit(make_edits(2, start=10))
    assert [record.present_weight for record in loose.history()] == before
    assert [row.weight for row in loose._session.ledger.rows([1, 2, 3, 4])] == before
    assert [state.objective for state in loose._session.layers.states] == objective


@pytest.mark.parametrize("changes", [{"rule": "memit"}, {"stored_rows": None}, {"experts": "separate"}])
def test_unsupported_combinations_are_rejected(changes):
    with pytest.raises(InputError, match=f"halve_after=5 requires {next(iter(changes))}"):
        rf.EditConfig(halve_after=5, **changes)
