"""An edit has a row for each of its contexts, is realized in all of them, and undo removes all its rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.rows import row_weights
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.rls.reference import solve_all
from rlsedit_fast.rls.rounding import rounded
from rlsedit_fast.world import World, load_demo_model

from .demo_anchors import demo_statistics

WORLD = World.generate()
EDITS = [replace(case.edit, weight=1.0 + at % 2) for at, case in enumerate(world_cases(WORLD, 8, 0))]
CONFIG = rf.EditConfig(
    layers=(0, 1),
    contexts={"prefixes": ("", "The report says this .", "As everyone knows :", "People speak .")},
    search={"steps": 30, "stop_nll": 0.03},
    prior={"adherence": 0.9},
    batch_size=8,
    refine=0,
)
CONTEXTS = len(CONFIG.contexts.prefixes)


def make_editor(store=None, **changes):
    editor = rf.Editor(*load_demo_model(), config=CONFIG.replace(**changes), store=store)
    editor.anchor(demo_statistics(1000))
    return editor


def calibrated(**changes):
    """The mu that gives the adherence; an editor that gets it as a number does not aim at more."""
    return make_editor(**changes).calibrate(EDITS)[0].mu


def weights(editor):
    return {name: value.detach().clone() for name, value in editor.model.state_dict().items()}


def states(editor):
    """Returns the state of each edit in each of its contexts, and the last layer's keys there."""
    context = editor.context
    with quiet(editor.model):
        keys, found = request_keys(
            context.decoder, context.projections[-1:], editor.context.prepare(EDITS), output_of=context.site.module
        )
    return found, keys[0]


def realized(editor, delta, start):
    """Returns the realized share `[n, contexts]` of the wanted changes `[n, d]`, which are equal in all contexts."""
    now, _ = states(editor)
    return 1 - (start + delta[:, None] - now).norm(dim=-1) / delta.norm(dim=-1)[:, None]


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_an_edit_is_realized_in_every_context_although_the_keys_differ(layers):
    equal = {"layers": layers, "contexts": {"bare_weight": 1 / CONTEXTS}}
    mu = calibrated(**equal)
    rows, mean = (
        make_editor(layers=layers, contexts={"rows": key_rows, "bare_weight": 1 / CONTEXTS}, prior={"mu": mu})
        for key_rows in ("contexts", "mean")
    )
    start, keys = states(rows)
    distance = (keys[:, 0] - keys[:, 1:].mean(1)).norm(dim=1) / keys[:, 0].norm(dim=1)
    assert float(distance.median()) > 0.2, "precondition: the key of the bare prompt differs from those of the contexts"
    shares = {}
    for editor in (rows, mean):
        records = editor.edit(EDITS)
        # Both editors search in the unedited model and find the same values.
        wanted = torch.stack([row.goal[0] for row in rows._session.ledger.rows(range(1, 9))]) - start[:, 0]
        shares[editor] = realized(editor, wanted, start).mean(0)
        assert float(shares[editor][0]) == pytest.approx(sum(r.realized for r in records) / 8, abs=1e-4)
    # The bare prompt is one of the contexts. In no context is the share more than a tenth below the adherence.
    assert float(shares[rows].min()) > 0.8
    assert float(shares[rows][0]) >= 0.9 - 0.02


def test_a_larger_bare_weight_realizes_more_at_the_bare_prompt_and_less_elsewhere():
    shares = []
    for bare_weight in (1 / CONTEXTS, 0.5, 0.9):
        editor = make_editor(prior={"mu": 30.0}, contexts={"bare_weight": bare_weight})
        start, _ = states(editor)
        editor.edit(EDITS)
        wanted = torch.stack([row.goal[0] for row in editor._session.ledger.rows(range(1, 9))]) - start[:, 0]
        shares.append(realized(editor, wanted, start).mean(0))
    for lighter, heavier in pairwise(shares):
        assert heavier[0] > lighter[0]
        assert bool((heavier[1:] < lighter[1:]).all())


@pytest.mark.parametrize("bare_weight", [0.7])
def test_each_context_is_a_row_with_its_share_of_the_edits_weight(bare_weight):
    editor = make_editor(prior={"mu": calibrated()}, contexts={"bare_weight": bare_weight})
    start, _ = states(editor)
    records = editor.edit(EDITS)
    for record, rows, first in zip(records, editor._session.ledger.rows(range(1, 9)), start, strict=True):
        assert len(rows) == CONTEXTS
        assert rows.weight == record.weight
        assert [key.shape[0] for key in rows.keys] == [value.shape[0] for value in rows.values] == [CONTEXTS] * 2
        delta = rows.goal - first
        torch.testing.assert_close(delta, delta[:1].expand_as(delta), rtol=0, atol=1e-4)
    assert [state.edits for state in editor._session.layers.states] == [8 * CONTEXTS] * 2
    _, _, each = editor._session.layers._stacked(editor._session.ledger.rows([2]), 0)
    assert each.tolist() == pytest.approx([2 * bare_weight, *[2 * (1 - bare_weight) / 3] * 3])
    mean = make_editor(contexts={"rows": "mean"})
    mean.edit(EDITS)
    assert {len(rows) for rows in mean._session.ledger.rows(range(1, 9))} == {1}
    assert [rows.weight for rows in mean._session.ledger.rows([1, 2])] == [1.0, 2.0]


@pytest.mark.parametrize("keys", [pytest.param("full", marks=pytest.mark.soak), "fp16"])
def test_undo_removes_all_rows_of_an_edit(keys):
    editor = make_editor(stored_rows=keys, batch_size=4, prior={"mu": 30.0})
    start = weights(editor)
    editor.edit(EDITS)
    editor.undo([1, 6, 7])
    assert [state.edits for state in editor._session.layers.states] == [5 * CONTEXTS] * 2
    kept = editor._session.ledger.rows(editor._session.ledger.active)
    for layer, state in enumerate(editor._session.layers.states):
        sides = (torch.cat([getattr(rows, side)[layer] for rows in kept]) for side in ("keys", "values"))
        each = torch.tensor([rows.weight * one for rows in kept for one in row_weights(CONTEXTS, 0.5)])
        weight, _, _ = solve_all(state.original, state.prior, *sides, each)
        assert float((state.weight.double() - weight).norm() / weight.norm()) < 1e-4
    editor.undo(editor._session.ledger.active)
    assert all(torch.equal(value, start[name]) for name, value in weights(editor).items())


@pytest.mark.parametrize(
    ("key_rows", "keys"), [("contexts", "fp16"), pytest.param("mean", "full", marks=pytest.mark.soak)]
)
def test_a_store_with_several_rows_per_edit_reopens_bit_for_bit(tmp_path, keys, key_rows):
    settings = {"stored_rows": keys, "contexts": {"rows": key_rows}, "batch_size": 4, "prior": {"mu": 30.0}}
    uninterrupted = make_editor(**settings)
    uninterrupted.edit(EDITS)
    uninterrupted.undo([2, 7])
    with make_editor(store=tmp_path, **settings) as editor:
        editor.edit(EDITS)
    with rf.Editor(*load_demo_model(), store=tmp_path) as editor:
        editor.undo([2, 7])
    with rf.Editor(*load_demo_model(), store=tmp_path) as opened:
        assert all(torch.equal(value, weights(opened)[name]) for name, value in weights(uninterrupted).items())
        ids = opened._session.ledger.active
        pairs = zip(*(one._session.ledger.rows(ids) for one in (opened, uninterrupted)), strict=True)
        for a, b in pairs:
            assert a.weight == b.weight
            assert all(map(torch.equal, (*a.keys, *a.values, a.goal), (*b.keys, *b.values, b.goal)))
            if keys == "fp16":
                assert all(torch.equal(key, rounded(key)) for key in (*a.keys, *a.values))
