"""Disk errors, damage, interrupts and arbitrary requests: an operation completes, or fails and modifies nothing."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import contextmanager, suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlsedit_fast as rf
from rlsedit_fast.cli import main
from rlsedit_fast.editing.layers import EditedLayers
from rlsedit_fast.editing.storage import persistence
from rlsedit_fast.editing.storage.recovery import read_history, read_status
from rlsedit_fast.errors import InputError, RequestError, RLSEditError, StoreError
from rlsedit_fast.store import Change, Store
from rlsedit_fast.store.journal import Journal

from .conftest import ANCHORS, assert_same, assert_same_weights, history_of, make_edits, make_tiny, tiny_config, weights

CONFIG = tiny_config(prior={"lam": 0.5, "mu": 2.0})


def make_editor(model, tokenizer, store) -> rf.Editor:
    editor = rf.Editor(model, tokenizer, config=CONFIG, store=store)
    if not editor.priors:
        editor.anchor(ANCHORS)
    return editor


@contextmanager
def unchanged(editor: rf.Editor):
    """Asserts that model, states, history and store do not change."""
    before, history = weights(editor.model), history_of(editor)
    states = [(s.weight.clone(), s.precision_inverse(), s.objective) for s in editor._session.layers.states]
    last = editor._recorder.store.last
    yield
    now = editor.model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in before.items())
    assert history_of(editor) == history
    for state, (weight, inverse, objective) in zip(editor._session.layers.states, states, strict=True):
        assert torch.equal(state.weight, weight)
        assert torch.equal(state.precision_inverse(), inverse)
        assert state.objective == objective
    assert editor._recorder.store.last == last


@pytest.fixture
def used(tiny, tokenizer, tmp_path):
    """A store with edits, an undo and two snapshots, and its closed editor."""
    place = tmp_path / "store"
    editor = make_editor(tiny(), tokenizer, place)
    editor.edit(make_edits(8))
    editor.undo(3)
    editor._recorder.snapshot(editor._session.layers)
    editor.edit(make_edits(4, start=8))
    editor._recorder.snapshot(editor._session.layers)
    editor.edit(make_edits(2, start=12))
    editor.close()
    return place, editor


@contextmanager
def mounted(place, size):
    """Mounts a file system of the given size."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk_rejects_the_batch_until_space_is_freed(tiny, tokenizer, tmp_path):
    """The disk fills up gradually, so that sometimes a tensor file and sometimes the journal cannot be written."""
    disk = tmp_path / "disk"
    with mounted(disk, "500k"):
        editor = make_editor(tiny(), tokenizer, disk / "store")
        editor.edit(make_edits(2))
        made, failures = 2, 0
        while failures < 4 and made < 100:
            with suppress(OSError), (disk / "filler").open("ab") as filler:
                filler.write(b"x" * (20_000 + 97 * made))
            check = unchanged(editor)
            check.__enter__()
            try:
                editor.edit(make_edits(2, start=made))
                made += 2
            except StoreError as error:
                failures += 1
                message = str(error)
                check.__exit__(None, None, None)
                assert message.count("nothing was modified") == 1
                assert "Check the free disk space" in message
        assert failures == 4
        assert len(read_history(disk / "store")) == made
        (disk / "filler").unlink()
        editor.edit(make_edits(2, start=made))
        editor.close()
        assert_same(rf.Editor(tiny(), tokenizer, store=disk / "store"), editor)


@contextmanager
def file_size_limit(size: int):
    """Limits the size of files, like a quota."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("limit", [100, 12_000])
def test_changes_that_cannot_be_written_are_not_applied(tiny, tokenizer, tmp_path, limit):
    """With 100 bytes the rows cannot be written; with 12,000 the rows can be and the journal cannot."""
    editor = make_editor(tiny(), tokenizer, tmp_path)
    editor.edit(make_edits(4))
    actions = [
        lambda: editor.edit(make_edits(2, start=4)),
        lambda: editor.undo(1),
        lambda: editor.replace(2, target="mason"),
        lambda: editor.protect(["Veta speaks Kubeish ."]),
        lambda: editor.consolidate(),
    ]
    for action in actions:
        with unchanged(editor), file_size_limit(limit), pytest.raises(StoreError, match="nothing was modified"):
            action()
    assert len(list((tmp_path / "changes").iterdir())) == 3
    for action in actions:
        action()
    editor.close()
    assert_same(rf.Editor(make_tiny(len(tokenizer)), tokenizer, store=tmp_path), editor)


@pytest.mark.parametrize("doubtful", [False, True])
def test_failed_commit_is_rolled_back(tiny, tokenizer, tmp_path, monkeypatch, doubtful):
    """If the rollback cannot be written either, the store is closed for writing."""
    editor = make_editor(tiny(), tokenizer, tmp_path)
    editor.edit(make_edits(4))
    real_commit, real_abort = Journal.commit, Journal.abort

    def commit(journal):
        with file_size_limit(100):
            real_commit(journal)

    def abort(journal):
        with file_size_limit(100 if doubtful else resource.RLIM_INFINITY):
            real_abort(journal)

    monkeypatch.setattr(Journal, "commit", commit)
    monkeypatch.setattr(Journal, "abort", abort)
    with unchanged(editor), pytest.raises(StoreError, match="It is unknown whether" if doubtful else "nothing was"):
        editor.edit(make_edits(2, start=4))
    monkeypatch.undo()
    if doubtful:
        with unchanged(editor), pytest.raises(StoreError, match="closed for writing"):
            editor.edit(make_edits(2, start=4))
        editor.close()
        editor = rf.Editor(tiny(), tokenizer, store=tmp_path)
        assert len(editor.history()) == 4
    editor.edit(make_edits(2, start=4))
    editor.close()
    assert_same(rf.Editor(tiny(), tokenizer, store=tmp_path), editor)


def test_a_commit_that_fails_on_a_full_disk_leaves_no_doubt(tiny, tokenizer, tmp_path, monkeypatch):
    """SQLite writes the frame that commits last, so a full disk means that there is none."""
    editor = make_editor(tiny(), tokenizer, tmp_path)
    editor.edit(make_edits(4))

    @contextmanager
    def full(journal):
        raise StoreError("no space; nothing was modified") from sqlite3.OperationalError("database or disk is full")
        yield

    for failing in ("commit", "abort"):
        real = getattr(Journal, failing)

        def fails(journal, real=real):
            with monkeypatch.context() as patch:
                patch.setattr(Journal, "_transaction", full)
                real(journal)

        monkeypatch.setattr(Journal, failing, fails)
    with unchanged(editor), pytest.raises(StoreError, match="nothing was modified"):
        editor.edit(make_edits(2, start=4))
    monkeypatch.undo()
    editor.edit(make_edits(2, start=4))
    editor.close()
    assert_same(rf.Editor(tiny(), tokenizer, store=tmp_path), editor)


def test_a_change_is_discarded_even_if_the_layers_cannot_be_restored(tiny, tokenizer, tmp_path, monkeypatch):
    editor = make_editor(tiny(), tokenizer, tmp_path)
    editor.edit(make_edits(4))
    stored = sorted((tmp_path / "changes").iterdir())

    def fails(*_arguments):
        raise RuntimeError("made to fail")

    monkeypatch.setattr(Journal, "commit", fails)
    monkeypatch.setattr(EditedLayers, "restore", fails)
    with pytest.raises(RuntimeError, match="made to fail"):
        editor.edit(make_edits(2, start=4))
    monkeypatch.undo()
    assert sorted((tmp_path / "changes").iterdir()) == stored
    editor.close()
    assert len(rf.Editor(tiny(), tokenizer, store=tmp_path).history()) == 4


def test_failed_snapshot_is_logged_and_the_batch_is_applied(tiny, tokenizer, tmp_path, monkeypatch, caplog):
    from rlsedit_fast.store import directory

    editor = make_editor(tiny(), tokenizer, tmp_path)
    editor.edit(make_edits(2))
    monkeypatch.setattr(directory, "MAX_REPLAYED", 1)
    real = Store.snapshot

    def snapshot(*arguments, **options):
        with file_size_limit(100):
            real(*arguments, **options)

    monkeypatch.setattr(Store, "snapshot", snapshot)
    editor.edit(make_edits(2, start=2))
    assert "the edits are stored, but the snapshot could not be written" in caplog.text
    editor.close()
    assert_same(rf.Editor(tiny(), tokenizer, store=tmp_path), editor)


def test_consolidation_without_compaction_is_logged(tiny, tokenizer, tmp_path, monkeypatch, caplog):
    editor = make_editor(tiny(), tokenizer, tmp_path)
    editor.edit(make_edits(6))
    editor.undo(2)
    real = Journal.compact

    def compact(*arguments):
        with file_size_limit(100):
            real(*arguments)

    monkeypatch.setattr(Journal, "compact", compact)
    editor.consolidate()
    assert "the store was not compacted" in caplog.text
    monkeypatch.undo()
    editor.edit(make_edits(2, start=6))
    editor.close()
    assert_same(rf.Editor(tiny(), tokenizer, store=tmp_path), editor)


def test_read_only_folder_can_be_read_but_not_opened(tiny, tokenizer, tmp_path, used):
    place, editor = used
    with mounted(tmp_path / "disk", "4m"):
        copy = tmp_path / "disk" / "store"
        shutil.copytree(place, copy)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        assert read_history(copy) == editor.history()
        assert read_status(copy).edits["active"] == 13
        model = tiny()
        with pytest.raises(StoreError, match="Make the folder of the store writable"):
            rf.Editor(model, tokenizer, store=copy)
        assert_same_weights(model, tiny())
        with pytest.raises(StoreError, match="cannot be created"):
            rf.Editor(model, tokenizer, config=CONFIG, store=tmp_path / "disk" / "other")


def test_history_is_read_from_a_read_only_folder_with_a_wal(tiny, tokenizer, tmp_path):
    editor = make_editor(tiny(), tokenizer, tmp_path / "store")
    editor.edit(make_edits(4))
    with mounted(tmp_path / "disk", "4m"):
        shutil.copytree(tmp_path / "store", tmp_path / "disk" / "store")
        (tmp_path / "disk" / "store" / "journal.db-shm").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        assert read_history(tmp_path / "disk" / "store") == editor.history()


def damage(path, draw) -> str:
    content = bytearray(path.read_bytes())
    how = draw.choice(["flip", "flip", "truncate"]) if content else "deleted"
    if how == "flip":
        at = draw.randrange(len(content))
        content[at] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        path.unlink()
    return how


def test_damaged_files_are_named_and_not_used(tiny, tokenizer, tmp_path, used, caplog):
    """Every file with one flipped bit or truncated: opening raises an error that names it or gives the full state."""
    place, editor = used
    draw, outcomes = random.Random(5), {"named": 0, "intact": 0}
    names = [path.relative_to(place) for path in sorted(place.rglob("*")) if path.is_file()]
    for name in names:
        for _ in range(24 if name.name == "journal.db" else 3):
            copy = tmp_path / "copy"
            shutil.copytree(place, copy)
            how = damage(copy / name, draw)
            caplog.clear()
            model = tiny()
            opened, message = None, ""
            try:
                opened = rf.Editor(model, tokenizer, store=copy)
            except StoreError as error:
                message = str(error)
            if opened is None:
                outcomes["named"] += 1
                assert name.name in message, (name, how)
                assert_same_weights(model, tiny())
            else:
                outcomes["intact"] += 1
                assert_same(opened, editor)
                if name.parent.name == "snapshots" and "damaged snapshot" in caplog.text:
                    assert name.name in caplog.text
                opened.close()
            shutil.rmtree(copy)
    assert outcomes["named"] > 10
    assert outcomes["intact"] > 10


def test_damaged_snapshot_falls_back_to_the_one_before(tiny, tokenizer, used, caplog):
    place, editor = used
    older, newest = sorted((place / "snapshots").iterdir())
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    opened = rf.Editor(tiny(), tokenizer, store=place)
    assert_same(opened, editor)
    assert newest.name in caplog.text
    opened.close()
    older.unlink()
    assert_same(rf.Editor(tiny(), tokenizer, store=place), editor)
    assert older.name in caplog.text


@pytest.mark.parametrize("how", ["flip", "truncate", "deleted"])
def test_truncated_write_ahead_log_is_detected(tiny, tokenizer, tmp_path, how):
    """SQLite itself silently accepts a damaged log as a shorter one."""
    editor = make_editor(tiny(), tokenizer, tmp_path / "store")
    editor.edit(make_edits(8))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "store", copy)  # like after a kill: the log is not checkpointed
    log = copy / "journal.db-wal"
    content = bytearray(log.read_bytes())
    (copy / "journal.db-shm").unlink()
    if how == "flip":
        content[len(content) // 2] ^= 4
        log.write_bytes(content)
    elif how == "truncate":
        log.write_bytes(content[: len(content) // 2])
    else:
        log.unlink()
    model = tiny()
    with pytest.raises(StoreError, match=r"journal\.db"):
        rf.Editor(model, tokenizer, store=copy)
    assert_same_weights(model, tiny())


def test_one_writer_at_a_time_and_the_lock_holder_is_named(tiny, tokenizer, tmp_path):
    with make_editor(tiny(), tokenizer, tmp_path) as editor:
        editor.edit(make_edits(2))
        model = tiny()
        with pytest.raises(StoreError, match=f"is locked by process {os.getpid()} on .* since .*one writer"):
            rf.Editor(model, tokenizer, store=tmp_path)
        assert_same_weights(model, tiny())
        other = (
            "from rlsedit_fast.store import Store; from rlsedit_fast.errors import StoreError\n"
            f"try: Store({str(tmp_path)!r})\nexcept StoreError as error: print(error)"
        )
        stdout = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True).stdout
        assert f"process {os.getpid()}" in stdout
        assert len(read_history(tmp_path)) == 2, "reading needs no lock"
        editor.edit(make_edits(2, start=2))
        assert len(read_history(tmp_path)) == 4
    with rf.Editor(tiny(), tokenizer, store=tmp_path) as opened:
        assert_same(opened, editor)
    with unchanged(editor), pytest.raises(StoreError, match="closed for writing"):
        editor.edit(make_edits(2, start=4))


@pytest.mark.parametrize(("schema", "advice"), [(7, "wrote it or a newer one$"), (3, "wrote it$"), (1, "wrote it$")])
def test_other_journal_versions_are_rejected(tiny, tokenizer, used, schema, advice):
    place, _ = used
    base = sqlite3.connect(place / "journal.db")
    base.execute(f"PRAGMA user_version = {schema}")
    base.close()
    model = tiny()
    for open_it in (lambda: rf.Editor(model, tokenizer, store=place), lambda: read_history(place)):
        with pytest.raises(StoreError, match=f"schema {schema}, this version of rlsedit_fast reads 5.*{advice}"):
            open_it()
    assert_same_weights(model, tiny())


def test_other_models_are_rejected(tiny, tokenizer, used):
    place, editor = used
    other, finite = tiny(), tiny()
    with torch.no_grad():
        other.model.embed_tokens.weight[5, 3] += 1e-3
        finite.model.embed_tokens.weight[5, 3] = float("nan")
    for model in (other, tiny(torch.bfloat16), editor.model, finite):
        before = weights(model)
        with pytest.raises(StoreError, match=r"was created with the model .*nothing was modified"):
            rf.Editor(model, tokenizer, store=place)
        now = model.state_dict()
        assert all(torch.equal(value.nan_to_num(), now[name].nan_to_num()) for name, value in before.items())


def test_settings_of_a_store_are_checked_before_the_fingerprint(tiny, tokenizer, used, monkeypatch):
    """The fingerprint reads all weights."""
    place, editor = used

    def fails(_model):
        raise AssertionError("the fingerprint was computed")

    monkeypatch.setattr(persistence, "fingerprint", fails)
    with pytest.raises(InputError, match=r"layers=.* these settings are fixed"):
        rf.Editor(tiny(), tokenizer, config=editor.config.replace(layers=[0]), store=place)


def test_nan_in_the_model_rejects_the_batch(tiny, tokenizer, tmp_path):
    editor = rf.Editor(tiny(), tokenizer, config=tiny_config(layers=(0,), prior={"lam": 0.5}), store=tmp_path)
    editor.edit(make_edits(4))
    with torch.no_grad():
        editor.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    last, history = editor._recorder.store.last, history_of(editor)
    with pytest.raises(RLSEditError, match="NaN/Inf"):
        editor.edit(make_edits(2, start=4))
    assert (editor._recorder.store.last, history_of(editor)) == (last, history)
    editor.close()
    opened = rf.Editor(tiny(), tokenizer, store=tmp_path)
    assert history_of(opened) == history


def test_folder_with_other_files_is_rejected(tiny, tokenizer, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"contains thesis\.tex and is not a store"):
        rf.Editor(tiny(), tokenizer, config=CONFIG, store=tmp_path)
    (tmp_path / "journal.db").write_text("not a database, but as long as one" * 30)
    with pytest.raises(StoreError, match=r"journal\.db"):
        rf.Editor(tiny(), tokenizer, config=CONFIG, store=tmp_path)
    assert main(["history", "--store", str(tmp_path / "none")]) == 2


def test_ctrl_c_during_commit_is_deferred(tiny, tokenizer, tmp_path, monkeypatch):
    editor = make_editor(tiny(), tokenizer, tmp_path)
    real = Journal.commit

    def pressed(journal):
        real(journal)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Journal, "commit", pressed)
    for start in (0, 4):  # the first batch, which also sets the priors, and a later one
        with pytest.raises(KeyboardInterrupt):
            editor.edit(make_edits(4, start=start))
        assert len(editor.history()) == (2 if start == 0 else 4), "the batch is applied and the call ends"
    monkeypatch.undo()
    editor.edit(make_edits(2, start=8))
    editor.close()
    assert_same(rf.Editor(tiny(), tokenizer, store=tmp_path), editor)


def test_prepared_changes_are_synced_before_commit(tmp_path, monkeypatch):
    """First the file, then its folder, then the journal, which SQLite syncs at every commit."""
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or real(fd))
    store = Store.create(tmp_path / "store", {})
    assert str(tmp_path / "store") in synced
    assert str(tmp_path) in synced
    real_prepare = Journal.prepare

    def prepare(journal, entries):
        assert synced[-2:] == [str(tmp_path / "store" / entries[0].file.name), str(tmp_path / "store" / "changes")]
        real_prepare(journal, entries)

    monkeypatch.setattr(Journal, "prepare", prepare)
    store.prepare([Change("x", {}, {"rows": torch.ones(3)})])
    assert store._journal._base.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._journal._base.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store.close()
    with Store(tmp_path / "store") as store:
        assert store.entries == []
        assert list((tmp_path / "store" / "changes").iterdir()) == []
        store.prepare([Change("x", {"a": (1, 2)}, {"rows": torch.ones(3)})])
        store.commit()
    with Store(tmp_path / "store") as store:
        (entry,) = store.entries
        assert entry.about == {"a": [1, 2]}
        assert torch.equal(store.tensors(entry)["rows"], torch.ones(3))


BLANKS = st.sampled_from(["", " ", "\t\n", "\u00a0", "\u200b"])
ARBITRARY_TEXT = st.one_of(
    BLANKS,
    st.text(max_size=12),
    st.text(st.characters(categories=["Cc", "Cf", "Cs", "Co"]), max_size=6),
    st.sampled_from(
        ["{}", "{0}", "{{}}", "}{", "%s", "\\", "'; DROP TABLE changes; --", "\x00", "\ud800", "\u202eabc", "\ufeff"]
    ),
    st.sampled_from(["مرحبا", "שלום עולם", "日本", "e\u0301", "👩‍👩‍👧", "speaks " * 10_000, "a" * 20_000]),
)
PROMPT = st.one_of(ARBITRARY_TEXT, st.builds("{}{{}}{}".format, ARBITRARY_TEXT, ARBITRARY_TEXT), st.just("{} speaks"))


def test_arbitrary_requests_are_applied_or_rejected_and_the_store_reopens(tokenizer, tmp_path):
    editor = make_editor(make_tiny(len(tokenizer)), tokenizer, tmp_path / "store")
    editor.edit(make_edits(2))

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(
        prompt=PROMPT,
        subject=st.one_of(ARBITRARY_TEXT, st.just("Lado")),
        target=st.one_of(ARBITRARY_TEXT, st.just("mason")),
    )
    def apply(prompt, subject, target):
        count, message = len(editor.history()), ""
        check = unchanged(editor)
        check.__enter__()
        try:
            (record,) = editor.edit([rf.Edit(prompt, subject, target)])
        except RequestError as error:
            message = str(error)
        if message:
            check.__exit__(None, None, None)
            assert "nothing was modified" in message
            return
        subject = subject if subject.strip() else ""  # no subject
        assert (record.id, record.prompt, record.subject, record.target) == (count + 1, prompt, subject, target)
        assert read_history(tmp_path / "store")[-1] == record

    apply()
    editor.close()
    opened = rf.Editor(make_tiny(len(tokenizer)), tokenizer, store=tmp_path / "store")
    assert_same(opened, editor)
    assert len(opened.history()) > 3


@pytest.mark.parametrize(
    "edit",
    [
        rf.Edit("{} " + "speaks " * 10_000, "Lado", "mason"),
        rf.Edit("{} speaks", "Lado " * 10_000, "mason"),
        rf.Edit("{} speaks", "Lado", "mason " * 10_000),
        rf.Edit("nobody speaks", "Lado", "mason"),
        rf.Edit("{} speaks", "\ud800", "mason"),
        rf.Edit("{} \udfff", "Lado", "mason"),
        rf.Edit("{} speaks", "Lado", "\ud83d"),
    ],
    ids=["prompt", "subject", "target", "missing", "surrogate-subject", "surrogate-prompt", "surrogate-target"],
)
def test_requests_that_no_model_can_read_are_rejected(tiny, tokenizer, tmp_path, edit):
    editor = make_editor(tiny(), tokenizer, tmp_path)
    editor.edit(make_edits(2))
    with unchanged(editor), pytest.raises(RequestError, match="nothing was modified"):
        editor.edit([*make_edits(2, start=2), edit])


def test_reader_during_a_concurrent_commit(tmp_path, monkeypatch):
    """Another change is committed between reading the entries and checking them."""
    writer, real = Store.create(tmp_path / "store", {}), Journal.entries
    writer.prepare([Change("one", {}, {})])
    writer.commit()

    def entries(journal):
        found = real(journal)
        writer.prepare([Change("two", {}, {})])
        writer.commit()
        return found

    monkeypatch.setattr(Journal, "entries", entries)
    with Store(tmp_path / "store", write=False) as reader:
        assert [entry.kind for entry in reader.entries] == ["one"]
    writer.close()


def test_exception_from_outside_after_the_commit_loses_nothing(tiny, tokenizer, tmp_path, monkeypatch):
    """For example raised by a signal handler when the change is on disk but not yet recorded in memory."""
    editor = make_editor(tiny(), tokenizer, tmp_path)
    editor.edit(make_edits(4))
    real = Journal.commit

    def commit(journal):
        real(journal)
        raise SystemExit

    monkeypatch.setattr(Journal, "commit", commit)
    with unchanged(editor), pytest.raises(SystemExit):
        editor.edit(make_edits(2, start=4))
    monkeypatch.undo()
    with unchanged(editor), pytest.raises(StoreError, match="Open it again"):
        editor.edit(make_edits(2, start=4))
    editor.close()
    opened = rf.Editor(tiny(), tokenizer, store=tmp_path)
    assert [record.state for record in opened.history()] == ["active"] * 6


@pytest.mark.parametrize("from_outside", [False, True])
def test_calibration_is_interrupted_before_or_after_its_commit(tiny, tokenizer, tmp_path, monkeypatch, from_outside):
    editor = make_editor(tiny(), tokenizer, tmp_path)
    real = Journal.commit

    def commit(journal):
        real(journal)
        if from_outside:
            raise SystemExit
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Journal, "commit", commit)
    with pytest.raises(SystemExit if from_outside else KeyboardInterrupt):
        editor.calibrate(make_edits(4))
    monkeypatch.undo()
    assert bool(editor.priors) is not from_outside
    if from_outside:
        with pytest.raises(StoreError, match="Open it again"):
            editor.edit(make_edits(4))
    else:
        editor.edit(make_edits(4))
    editor.close()
    opened = rf.Editor(tiny(), tokenizer, store=tmp_path)
    assert len(opened.priors) == 2
    assert len(opened.history()) == (0 if from_outside else 4)


def test_snapshot_out_of_memory_is_logged_and_the_batch_is_applied(tiny, tokenizer, tmp_path, monkeypatch, caplog):
    from rlsedit_fast.store import directory

    editor = make_editor(tiny(), tokenizer, tmp_path)
    monkeypatch.setattr(directory, "MAX_REPLAYED", 1)

    def snapshot(*_arguments, **_options):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(Store, "snapshot", snapshot)
    assert len(editor.edit(make_edits(4))) == 4
    assert "the snapshot could not be written: no more" in caplog.text
