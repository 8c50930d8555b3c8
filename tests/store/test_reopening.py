"""A reopened editor equals the closed one bit for bit and continues identically."""

from types import SimpleNamespace

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.editing.search import value_search
from rlsedit_fast.errors import InputError, RequestError, StoreError
from rlsedit_fast.store import Store

from .conftest import ANCHORS, assert_same, assert_same_weights, make_edits, tiny_config, weights

CONTEXTS = ("", "People speak .", "Lado speaks")


def run_part(editor: rf.Editor, part: int) -> None:
    """Runs one part of a stream with protection, undo, replacement and several batches."""
    if part == 0:
        editor.anchor(ANCHORS)
        editor.protect(["Lado speaks Kubeish ."] * 2, weight=3.0)
        editor.edit(make_edits(9))
    elif part == 1:
        editor.undo([2, 5])
        editor.protect(["Veta plays the organ ."])
        editor.edit(make_edits(5, start=9))
    elif part == 2:
        editor.replace(4, target="mason")
        editor.undo(editor._session.ledger.active[3])
    else:
        editor.edit(make_edits(3, start=30))


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"contexts": {"bare_weight": 0.7}}),
        (torch.float16, {"stored_rows": "fp16"}),
        (torch.float32, {"contexts": {"prefixes": CONTEXTS}}),
        (torch.bfloat16, {"contexts": {"prefixes": CONTEXTS}, "stored_rows": "fp16"}),
        (torch.float32, {"contexts": {"prefixes": CONTEXTS, "rows": "mean"}}),
    ],
    ids=str,
)
def test_reopened_editor_equals_the_closed_one(tiny, tokenizer, tmp_path, dtype, changes):
    config = tiny_config(**changes)
    whole = rf.Editor(tiny(dtype), tokenizer, config=config)
    for part in range(4):
        run_part(whole, part)
        editor = rf.Editor(tiny(dtype), tokenizer, config=config, store=tmp_path / "store")
        run_part(editor, part)
        editor.close()
        assert_same(editor, whole)
    opened = rf.Editor(tiny(dtype), tokenizer, store=tmp_path / "store")
    assert_same(opened, whole)
    assert opened.config == whole.config
    assert [r.time for r in opened.history()] == [r.time for r in editor.history()]


def test_joint_edits_of_one_subject_are_restored(tiny, tokenizer, tmp_path):
    config = tiny_config(fact_token="subject_last")
    edits = [rf.Edit(prompt, "Toze Lado", target) for prompt, target in zip(("{} is", "{} has"), "ab", strict=True)]
    editors = [rf.Editor(tiny(), tokenizer, config=config, store=store) for store in (None, tmp_path)]
    for editor in editors:
        editor.edit([*make_edits(3), edits[0]])
        editor.edit([edits[1]])
    editors[1].close()
    editors[1] = rf.Editor(tiny(), tokenizer, store=tmp_path)
    assert [r.joint_with for r in editors[1].history()] == [(), (), (), (5,), (4,)]
    for editor in editors:
        editor.edit([rf.Edit("{} is", "Toze Lado", "mason")])
        editor.undo([5])
    assert_same(*editors)
    assert [r.state for r in editors[1].history()][3:] == ["replaced", "undone", "active"]


@pytest.mark.parametrize("changes", [{}, {"stored_rows": "fp16"}, {"stored_rows": None}], ids=str)
def test_snapshot_shortens_the_replay_without_changing_the_state(tiny, tokenizer, tmp_path, monkeypatch, changes):
    from rlsedit_fast.editing.storage import recovery
    from rlsedit_fast.store import directory

    monkeypatch.setattr(directory, "MAX_REPLAYED", 2)
    config = tiny_config(**changes)
    whole = rf.Editor(tiny(), tokenizer, config=config)
    editor = rf.Editor(tiny(), tokenizer, config=config, store=tmp_path)
    for one in (whole, editor):
        one.anchor(ANCHORS)
        one.protect(["Lado speaks Kubeish ."])
        one.edit(make_edits(7))
        if config.stored_rows is not None:
            one.undo([1, 7])
        one.protect(["Veta plays the organ ."])
        one.edit(make_edits(3, start=7))
    editor.close()
    snapshots = sorted((tmp_path / "snapshots").iterdir())
    assert len(snapshots) == directory.SNAPSHOTS_KEPT
    replayed: list[int] = []
    real = recovery.Transaction
    monkeypatch.setattr(recovery, "Transaction", lambda layers: replayed.append(1) or real(layers))
    opened = rf.Editor(tiny(), tokenizer, store=tmp_path)
    assert len(replayed) <= 2
    if config.stored_rows is not None:
        assert_same(opened, whole)
    assert_same_weights(opened.model, whole.model)
    for one in (opened, whole):
        one.edit(make_edits(4, start=40))
    assert_same_weights(opened.model, whole.model)
    assert torch.equal(opened._session.layers.states[0].saved().base, whole._session.layers.states[0].saved().base)


def test_without_keys_the_store_is_small_and_undo_is_rejected(tiny, tokenizer, tmp_path, monkeypatch):
    from rlsedit_fast.store import directory

    monkeypatch.setattr(directory, "MAX_REPLAYED", 2)
    config = tiny_config(stored_rows=None, fact_token="subject_last")
    with rf.Editor(tiny(), tokenizer, config=config, store=tmp_path) as editor:
        editor.edit(make_edits(20))
        before = weights(editor.model)
        assert len(list((tmp_path / "changes").iterdir())) <= 1 + 2 * directory.MAX_REPLAYED
        for unsupported in (
            lambda: editor.undo(3),
            lambda: editor.replace(3, target="mason"),
            lambda: editor.edit(make_edits(1)),
            lambda: editor.edit([rf.Edit("{} sees", make_edits(1)[0].subject, "mason")]),
        ):
            with pytest.raises(RequestError, match=r"not stored \(stored_rows=None\)"):
                unsupported()
        assert all(torch.equal(value, editor.model.state_dict()[name]) for name, value in before.items())
        editor.edit(make_edits(2, start=20))
    (tmp_path / "snapshots").joinpath(max(p.name for p in (tmp_path / "snapshots").iterdir())).write_bytes(b"x")
    opened = rf.Editor(tiny(), tokenizer, store=tmp_path)
    assert_same_weights(opened.model, editor.model)
    opened.close()
    for path in (tmp_path / "snapshots").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(StoreError, match="stored_rows=None"):
        rf.Editor(tiny(), tokenizer, store=tmp_path)


def test_fp16_keys_need_half_the_space_and_undo_is_as_exact(tiny, tokenizer, tmp_path):
    sizes, errors = [], []
    for keys in ("full", "fp16"):
        config = tiny_config(stored_rows=keys, prior={"lam": 1.0}, batch_size=20)
        editor = rf.Editor(tiny(), tokenizer, config=config, store=tmp_path / keys)
        editor.edit(make_edits(12))
        sizes.append(sum(path.stat().st_size for path in (tmp_path / keys / "changes").iterdir()))
        start = [state.original for state in editor._session.layers.states]
        editor.undo(list(range(1, 12)))
        kept = editor._session.ledger.rows([12])[0]
        for layer, (state, weight) in enumerate(zip(editor._session.layers.states, start, strict=True)):
            fresh = rf.RLSState(weight, state.prior)
            fresh.update(kept.keys[layer], kept.values[layer], torch.tensor([kept.weight]))
            errors.append(float((state.weight - fresh.weight).norm() / weight.norm()))
    assert sizes[1] < 0.75 * sizes[0]  # headers and names are large compared to 24 + 16 numbers
    # A removal may lose half the digits of a strongly weighted edit, and fp16 keys do not lose more.
    assert max(errors) < 1e-4


def test_calibration_and_settings_are_restored(tiny, tokenizer, tmp_path):
    config = tiny_config(contexts={"samples": 2})
    with rf.Editor(tiny(), tokenizer, config=config, store=tmp_path) as editor:
        editor.anchor(ANCHORS)
        priors = editor.calibrate(make_edits(6))
    opened = rf.Editor(tiny(), tokenizer, config=config, store=tmp_path)
    assert opened.config == editor.config
    assert opened.config.contexts.prefixes != config.contexts.prefixes
    assert [(p.lam, p.mu) for p in opened.priors] == [(p.lam, p.mu) for p in priors]
    assert all(torch.equal(a.anchor_moment, b.anchor_moment) for a, b in zip(opened.priors, priors, strict=True))
    opened.edit(make_edits(2))
    editor = rf.Editor(tiny(), tokenizer, config=config)
    editor.anchor(ANCHORS)
    editor.calibrate(make_edits(6))
    editor.edit(make_edits(2))
    assert_same(opened, editor)


def test_fixed_settings_are_rejected_and_others_may_change(tiny, tokenizer, tmp_path):
    with rf.Editor(tiny(), tokenizer, config=tiny_config(), store=tmp_path) as editor:
        editor.edit(make_edits(2))
    for changes, message in [
        ({"delay": 9}, "delay=9, the store has 8"),
        ({"layers": (1,)}, "layers"),
        ({"prior": {"lam": 1.0}}, "lam"),
    ]:
        with pytest.raises(InputError, match=message):
            rf.Editor(tiny(), tokenizer, config=tiny_config(**changes), store=tmp_path)
    with rf.Editor(tiny(), tokenizer, config=tiny_config(batch_size=3, search={"steps": 2}), store=tmp_path) as editor:
        assert editor.config.batch_size == 3
    with rf.Editor(tiny(), tokenizer, store=tmp_path) as editor:
        assert editor.config.search.steps == 3, "the store is unchanged until an edit is applied"
    with rf.Editor(tiny(), tokenizer, config=tiny_config(batch_size=3, search={"steps": 2}), store=tmp_path) as editor:
        editor.edit(make_edits(1, start=2))
    assert rf.Editor(tiny(), tokenizer, store=tmp_path).config.search.steps == 2


def test_failed_first_batch_leaves_an_empty_store(tiny, tokenizer, tmp_path, monkeypatch):
    from rlsedit_fast.errors import UpdateError

    editor = rf.Editor(tiny(), tokenizer, config=tiny_config(), store=tmp_path)

    def fails(*_args, **_options):
        raise UpdateError("made to fail")

    monkeypatch.setattr(value_search, "search_within_memory", fails)
    with pytest.raises(UpdateError):
        editor.edit(make_edits(2))
    monkeypatch.undo()
    editor.anchor(ANCHORS)  # the priors are not fixed
    editor.edit(make_edits(2))
    editor.close()
    with Store(tmp_path, write=False) as store:
        assert [entry.kind for entry in store.entries] == ["start", "edit"]


def test_from_pretrained_with_a_store(tiny, tokenizer, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    store = tmp_path / "a" / "store"
    with rf.Editor.from_pretrained(tmp_path / "model", config=tiny_config(), store=store) as editor:
        editor.edit(make_edits(3))
    again = rf.Editor.from_pretrained(tmp_path / "model", store=str(store))
    assert_same(again, editor)


def test_replay_uses_the_backends_of_the_edits(tiny, tokenizer, tmp_path, monkeypatch):
    """Also if they would be chosen differently now: another machine, a deleted cache, other versions."""
    from rlsedit_fast.ops import dispatch, reference

    chosen = {"other": True}
    other = SimpleNamespace(
        OPS={"panel": lambda *given: reference.panel(*given) * (1 + 1e-6)},
        BATCHED=frozenset(),
        unavailable_reason=lambda: None,
        unsupported_reason=lambda op, tensors: None,
        preferred=lambda size: chosen["other"],
    )
    load = dispatch.load
    monkeypatch.setattr(dispatch, "load", lambda name: other if name == "triton" else load(name))
    monkeypatch.setattr(dispatch, "CANDIDATES", {"cpu": ("triton", "reference")})
    monkeypatch.setattr(dispatch, "_used", {})
    monkeypatch.setattr(Store, "snapshots", lambda self: iter(()))  # replays every change
    closed = {}
    for each in (True, False):
        chosen["other"] = each
        closed[each] = rf.Editor(tiny(), tokenizer, config=tiny_config(), store=tmp_path / f"{each}")
        closed[each].anchor(ANCHORS)
        closed[each].edit(make_edits(4))
        closed[each].close()
    first, second = (weights(editor.model) for editor in closed.values())
    assert not all(torch.equal(first[name], second[name]) for name in first), "the backends differ"
    for chosen["other"] in (True, False):
        for each, editor in closed.items():
            opened = rf.Editor(tiny(), tokenizer, store=tmp_path / f"{each}")
            assert_same(opened, editor)
            opened.close()
