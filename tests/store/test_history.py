"""History, exact undo, selection, consolidation and status."""

import random
import shutil
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.editing import records
from rlsedit_fast.editing.search.objective import measure
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.models import generate_answers
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.tokens import fill
from rlsedit_fast.world import World, load_demo_model

from .conftest import ANCHORS, assert_same, make_edits, tiny_config


def questions(edits):
    return [(fill(edit.prompt, edit.subject)[0], edit.target) for edit in edits]


EDITS = 100


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    store = tmp_path_factory.mktemp("stream") / "store"
    world = World.generate()
    edits = [case.edit for case in world_cases(world, EDITS, 0)]
    model, tokenizer = load_demo_model()
    before = generate_answers(model, tokenizer, questions(edits))
    with rf.Editor(model, tokenizer, config=CONFIG.replace(batch_size=25), store=store) as editor:
        editor.anchor(anchor_texts(world, 0))
        editor.edit(edits)
    return store, edits, before, sorted(random.Random(3).sample(range(1, EDITS + 1), EDITS // 2))


@pytest.fixture
def stream(made, tmp_path):
    """A copy of a store with `EDITS` edits, the edits, the answers before them, and a random half of the ids."""
    store, *rest = made
    return Path(shutil.copytree(store, tmp_path / "store")), *rest


def test_undoing_a_random_half_equals_applying_only_the_other_half(stream):
    """Undone one by one and in groups, with reopening; the original answers return."""
    store, edits, before, undone = stream
    editor = rf.Editor(*load_demo_model(), store=store)
    order = random.Random(4).sample(undone, len(undone))
    for identity in order[:12]:
        editor.undo(identity)
    editor.close()
    editor = rf.Editor(*load_demo_model(), store=store)
    for at in range(12, len(order), 12):
        editor.undo(order[at : at + 12])

    kept = editor._session.ledger.active
    assert kept == [i for i in range(1, EDITS + 1) if i not in set(undone)]
    (state,) = editor._session.layers.states
    rows = editor._session.ledger.rows(kept)
    only = rf.RLSState(state.original, state.prior)
    for at in range(0, len(rows), 25):
        part = rows[at : at + 25]
        only.update(torch.cat([one.keys[0] for one in part]), torch.cat([one.values[0] for one in part]))
    assert float((state.weight - only.weight).norm() / only.weight.norm()) < 1e-4
    change = float((state.weight - only.weight).norm() / (only.weight - state.original).norm())
    assert change < 1e-3
    assert torch.equal(editor.model.model.layers[0].mlp.down_proj.weight, state.weight)

    now = generate_answers(editor.model, editor.tokenizer, questions(edits))
    as_before = sum(now[i - 1] == before[i - 1] for i in undone)
    assert as_before >= 0.95 * len(undone), "the remaining edits may change a few other answers"
    still = score(editor.model, editor.tokenizer, questions([edits[i - 1] for i in kept]))
    assert sum(one.exact for one in still) >= 0.97 * len(kept)
    states = [record.state for record in editor.history()]
    assert [i for i, state in enumerate(states, start=1) if state == "undone"] == undone
    editor.close()


def test_contradicting_edit_replaces_the_old_one_and_both_are_listed(stream):
    store, edits, *_ = stream
    other = next(edit.target for edit in edits if edit.prompt == edits[0].prompt and edit.target != edits[0].target)
    contradiction = replace(edits[0], target=other)
    with rf.Editor(*load_demo_model(), store=store) as editor:
        (record,) = editor.edit([contradiction])
        assert generate_answers(editor.model, editor.tokenizer, questions([contradiction])) == [other]
    with rf.Editor(*load_demo_model(), store=store) as editor:
        history = {r.id: r for r in editor.history()}
        assert (history[1].state, history[1].target) == ("replaced", edits[0].target)
        assert (history[record.id].state, history[record.id].target) == ("active", other)


def test_edits_are_selected_by_id_subject_number_and_time(tiny, tokenizer, tmp_path):
    with rf.Editor(tiny(), tokenizer, config=tiny_config(), store=tmp_path) as editor:
        editor.anchor(ANCHORS)
        edits = make_edits(6)
        editor.edit(edits)
        middle = datetime.now(timezone.utc)
        editor.edit([rf.Edit("{} sees", edits[1].subject, "mason"), *make_edits(1, start=20)])
        assert editor.select(3) == [3]
        assert editor.select([4, 2]) == [4, 2]
        assert editor.select(subject=f" {edits[1].subject} ") == [2, 7]
        assert editor.select(last=2) == [7, 8]
        assert editor.select(since=middle) == [7, 8]
        assert editor.select(until=middle, last=1) == [6]
        assert editor.select(since=middle.astimezone().replace(tzinfo=None), subject=edits[1].subject) == [7]
        for wrong in ({}, {"ids": 9}, {"ids": [1, 1]}, {"subject": "nobody"}, {"last": 0}):
            with pytest.raises(InputError):
                editor.select(**wrong)
        with pytest.raises(InputError, match="no active edit matches"):
            editor.undo(editor.select(since=datetime.now()) + timedelta(days=1))
        assert [r.id for r in editor.undo(editor.select(subject=edits[1].subject))] == [2, 7]
        made = editor.replace(editor.select(last=2), target="organ")
        subjects = [edits[5].subject, make_edits(1, 20)[0].subject]
        assert [(r.subject, r.target) for r in made] == [(subject, "organ") for subject in subjects]
        assert editor.replace(1, target="organ").id == 11
        states = [r.state for r in editor.history()]
        assert states == "replaced undone active active active replaced undone replaced active active active".split()


def test_undo_removes_all_edits_with_one_removal_per_layer(tiny, tokenizer, monkeypatch):
    editor = rf.Editor(tiny(), tokenizer, config=tiny_config(batch_size=8))
    editor.anchor(ANCHORS)
    editor.edit(make_edits(8))
    counts = []
    for state in editor._session.layers.states:
        real = state.remove
        monkeypatch.setattr(state, "remove", lambda k, v, w, real=real: counts.append(len(k)) or real(k, v, w))
    editor.undo([2, 5, 6])
    assert counts == [3, 3]
    editor.undo(1)
    assert counts == [3, 3, 1, 1]
    assert [r.state for r in editor.history()] == "undone undone active active undone undone active active".split()
    assert {r.batch for r in editor.history()} == {1}


def test_order_is_kept_if_the_clock_goes_backwards(tiny, tokenizer, tmp_path, monkeypatch, caplog):

    class Clock(datetime):
        moment = datetime(2030, 5, 1, tzinfo=timezone.utc)

        @classmethod
        def now(cls, tz=None):
            return cls.moment

    monkeypatch.setattr(records, "datetime", Clock)
    with rf.Editor(tiny(), tokenizer, config=tiny_config(), store=tmp_path) as editor:
        editor.edit(make_edits(2))
    Clock.moment -= timedelta(days=400)
    with rf.Editor(tiny(), tokenizer, store=tmp_path) as editor:
        editor.edit(make_edits(2, start=2))
        times = [record.time for record in editor.history()]
        assert times == sorted(times)
        assert "the clock (2029-03-27" in caplog.text
        assert editor.select(since=times[2]) == [1, 2, 3, 4]
        editor.undo(editor.select(last=2))
    assert [r.state for r in editor.history()] == ["active", "active", "undone", "undone"]


def test_consolidation_keeps_active_edits_compacts_and_is_replayed(tiny, tokenizer, tmp_path, monkeypatch):
    from rlsedit_fast.store import directory

    monkeypatch.setattr(directory, "MAX_REPLAYED", 3)
    config = tiny_config()
    with rf.Editor(tiny(), tokenizer, config=config, store=tmp_path) as editor:
        editor.anchor(ANCHORS)
        editor.protect(["Lado speaks Kubeish ."])
        editor.edit(make_edits(14))
        editor.undo([1, 2, 3, 8])
        editor.protect(["Veta plays the organ ."])
        first = editor._session.layers.states[0].weight.clone()
        aged = distances(editor)
        size = sum(editor.status().sizes.values())
        freed = editor.consolidate()
        assert freed == size - sum(editor.status().sizes.values()) > 0
        # The keys of the first layer are unchanged; those of the second changed and are read again.
        assert float((editor._session.layers.states[0].weight - first).norm() / first.norm()) < 1e-5
        assert float(distances(editor).mean()) < float(aged.mean())
        assert editor.status().sample.key_shift == pytest.approx([0.0, 0.0], abs=1e-5)
        assert all(len(state._pending) == 0 for state in editor._session.layers.states), "no row is pending"
    assert len(list((tmp_path / "changes").iterdir())) == 2
    opened = rf.Editor(tiny(), tokenizer, store=tmp_path)
    assert_same(opened, editor)
    opened.close()
    (snapshot,) = (tmp_path / "snapshots").iterdir()
    snapshot.write_bytes(b"gone")
    opened = rf.Editor(tiny(), tokenizer, store=tmp_path)
    assert_same(opened, editor)
    for one in (opened, rf.Editor(tiny(), tokenizer, config=config)):
        if one is not opened:  # the same without a store
            one.anchor(ANCHORS)
            one.protect(["Lado speaks Kubeish ."])
            one.edit(make_edits(14))
            one.undo([1, 2, 3, 8])
            one.protect(["Veta plays the organ ."])
            assert one.consolidate() == 0
        one.edit(make_edits(3, start=30))
        one.undo([5, 16])
    assert_same(opened, one)
    opened.undo(opened._session.ledger.active)
    opened.consolidate()
    opened.close()
    opened = rf.Editor(tiny(), tokenizer, store=tmp_path)
    assert [state.edits for state in opened._session.layers.states] == [len(opened._session.layers.protected)] * 2
    assert {record.state for record in opened.history()} == {"undone"}
    with pytest.raises(InputError, match="there are no edits"):
        rf.Editor(tiny(), tokenizer, config=config).consolidate()


def test_refinement_after_a_consolidation_is_kept(tmp_path):
    world = World.generate()
    config = CONFIG.replace(prior={"adherence": 0.3}, refine=0)
    with rf.Editor(*load_demo_model(), config=config, store=tmp_path) as editor:
        editor.anchor(anchor_texts(world, 0)[:500])
        records = editor.edit([case.edit for case in world_cases(world, 5, 0)])
    assert not all(record.success for record in records)
    with rf.Editor(*load_demo_model(), config=config.replace(refine=2), store=tmp_path) as editor:
        editor.consolidate()
        _, rebuild, *later = (entry.kind for entry in editor._recorder.store.entries)
        assert (rebuild, set(later)) == ("rebuild", {"revise"})
    opened = rf.Editor(*load_demo_model(), store=tmp_path)
    assert_same(opened, editor)
    opened.undo(1)


@pytest.mark.parametrize("key_rows", ["contexts", "mean"])
def test_consolidation_of_one_layer_only_removes_rounding(tiny, tokenizer, key_rows):
    """The keys of a single layer do not change with later edits, so the same problem is solved again."""
    prefixes = ("", "People speak .")
    config = tiny_config(
        layers=(1,), batch_size=4, contexts={"prefixes": prefixes, "rows": key_rows}, prior={"adherence": 0.7}
    )
    editor = rf.Editor(tiny(), tokenizer, config=config)
    editor.anchor(ANCHORS)
    editor.calibrate(make_edits(4))
    editor.edit(make_edits(12))
    (state,) = editor._session.layers.states
    weight, missing = state.weight.clone(), distances(editor)
    assert editor.status().sample.key_shift == pytest.approx([0.0], abs=1e-5)
    editor.consolidate()
    assert float((state.weight - weight).norm() / weight.norm()) < 1e-4
    torch.testing.assert_close(distances(editor), missing, rtol=1e-3, atol=1e-3)


def active(editor):
    return [record for record in editor.history() if record.state == "active"]


def distances(editor):
    """Returns the relative distance of the hidden state from its target for each active edit, `[active]`."""
    ids = editor._session.ledger.active
    goals = torch.stack([rows.goal[0] for rows in editor._session.ledger.rows(ids)])
    with quiet(editor.model):
        found = measure(
            editor.context.site,
            [one.contexts[0] for one in editor._session.ledger.requests(ids)],
            goals,
            torch.ones(len(ids)),
        )
    return 1 - found.realized


def test_status_reports_counts_bounds_and_capacity(tiny, tokenizer, tmp_path):
    from rlsedit_fast.editing.storage.recovery import read_status

    with rf.Editor(tiny(), tokenizer, config=tiny_config(), store=tmp_path) as editor:
        assert editor.status().edits_left is None
        editor.anchor(ANCHORS)
        editor.edit(make_edits(12))
        editor.undo(3)
        status = editor.status(budget=5.0)
        assert status.edits == {"active": 11, "undone": 1, "replaced": 0, "skipped": 0}
        for layer, state in zip(status.layers, editor._session.layers.states, strict=True):
            moment, original = state.prior.anchor_moment, state.original
            delta = state.weight - original
            moved, whole = (float(((w @ moment) * w).sum()) ** 0.5 for w in (delta, original))
            assert 0 < moved / whole <= layer.anchors_bound
            assert layer.anchors == pytest.approx(moved / whole, rel=1e-4)
            assert 0 < layer.misfit < 1
            assert 0 < layer.weight <= layer.weight_bound
            assert layer.objective == state.objective
        assert status.spent == max(layer.anchors for layer in status.layers) / 5
        assert status.edits_left > 0
        assert status.realized == pytest.approx(sum(r.realized for r in active(editor)) / 11)
        assert status.success == sum(r.success for r in active(editor)) / 11
        assert status.search_converged == sum(r.search_converged for r in active(editor)) / 11
        assert status.sample.edits == 11
        assert len(status.sample.key_shift) == 2
        assert editor.status(sample=3).sample.edits == 3
        assert editor.status(sample=0).sample is None
        assert editor.status(budget=1e-3).edits_left == 0
        assert "exceeds the budget" in " ".join(editor.status(budget=1e-3).warnings)
        assert "did not converge" in " ".join(status.warnings)
        with pytest.raises(InputError, match="budget=0"):
            editor.status(budget=0)
    without = read_status(tmp_path, budget=5.0)
    assert (without.edits, without.spent) == (status.edits, status.spent)
    assert without.edits_left > 0
    assert "a line" in without.edits_left_basis
    assert all(layer.residual > 0 for layer in without.layers), "from the last snapshot"
    opened = rf.Editor(tiny(), tokenizer, store=tmp_path).status(budget=5.0)
    assert opened.layers == status.layers


def test_without_keys_edits_left_continues_a_line():
    from rlsedit_fast.editing.records import Point
    from rlsedit_fast.editing.status import LayerStatus, assess, edits_by_line

    trace = [Point(n, (2.0 * n,)) for n in (10, 20, 30, 50)]
    layer = LayerStatus(0, 100.0, 0.5, None, 0.1, None, None)
    assert edits_by_line(trace, 0, layer, 0.2) == 150  # J may grow from 100 to 400, by 2 per edit
    assert edits_by_line(trace[:1], 0, layer, 0.2) is None
    assert edits_by_line([Point(10, (9.0,)), Point(20, (8.0,))], 0, layer, 0.2) is None
    options = {"batches": 4, "adherence": None, "sizes": {}}
    status = assess([], trace, [layer], budget=0.2, **options)
    assert (status.edits_left, "a line" in status.edits_left_basis) == (150, True)
    assert assess([], trace, [layer], budget=0.1, **options).edits_left == 0
    with_keys = assess([], trace, [layer], budget=0.2, continued=lambda at, growth: (int(growth) + 30, 40), **options)
    assert with_keys.edits_left == 150
    assert "150 to 180 edits" in with_keys.edits_left_basis
    assert "fewer than 1000 edits" in with_keys.edits_left_basis


def test_unused_adherence_is_not_reported():
    from rlsedit_fast.editing.status import calibrated_adherence

    assert calibrated_adherence(rf.EditConfig(prior={"adherence": 0.9}), anchored=True) == 0.9
    assert calibrated_adherence(rf.EditConfig(prior={"lam": 1.0, "adherence": 0.9}), anchored=True) == 0.9
    assert calibrated_adherence(rf.EditConfig(prior={"mu": 1.0}), anchored=True) is None
    assert calibrated_adherence(rf.EditConfig(prior={"lam": 1.0}), anchored=False) is None


def test_drift_warning_recommends_consolidation(tiny, tokenizer, monkeypatch):
    from rlsedit_fast.rls import monitor

    editor = rf.Editor(tiny(), tokenizer, config=tiny_config())
    editor.anchor(ANCHORS)
    editor.edit(make_edits(6))
    assert not [w for w in editor.status().warnings if "drifted" in w]
    with torch.no_grad():
        editor._session.layers.states[0]._base.mul_(1.01)
    (warning,) = [w for w in editor.status().warnings if "drifted" in w]
    assert warning.startswith("layer 0: C has drifted")
    assert "consolidate" in warning
    editor.consolidate()
    assert not [w for w in editor.status().warnings if "drifted" in w]
    assert monitor.LIMITS[torch.float32] > editor.status().layers[0].residual
