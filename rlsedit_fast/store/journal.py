"""The journal: an SQLite database in WAL mode, synced at every commit, whose entries form a chain of checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rlsedit_fast.errors import StoreError
from rlsedit_fast.store.tensors import File

SCHEMA = 5
"""Version of the tables and their contents; journals of other versions are rejected."""

_APPLICATION = 0x524C5345  # "RLSE", identifies the database
_TABLES = """
CREATE TABLE about (id INTEGER PRIMARY KEY CHECK (id = 0), content TEXT NOT NULL, sum TEXT NOT NULL);
CREATE TABLE changes (
    seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, about TEXT NOT NULL, file TEXT NOT NULL,
    before TEXT NOT NULL, sum TEXT NOT NULL, mark TEXT
);
CREATE TABLE snapshots (seq INTEGER PRIMARY KEY, about TEXT NOT NULL, file TEXT NOT NULL, sum TEXT NOT NULL);
"""


@dataclass(frozen=True, eq=False)
class Change:
    """A change to be written.

    Attributes:
        kind: type of the change, defined by the writer.
        about: metadata, JSON-serializable.
        tensors: tensors by name.

    Example:
        >>> import torch
        >>> from rlsedit_fast.store import Change
        >>> Change("batch", {"edits": 1}, {"keys": torch.ones(1, 2)}).kind
        'batch'
    """

    kind: str
    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A change or a snapshot in the journal.

    Attributes:
        seq: sequence number of the change, from 1; for a snapshot, that of the last change that it includes.
        kind: type of the change; "snapshot" for a snapshot.
        about: metadata.
        file: file of the tensors; None if there are none.

    Example:
        >>> from rlsedit_fast.store import Entry
        >>> Entry(seq=1, kind="batch", about={"edits": 1}, file=None)
        Entry(seq=1, kind='batch', about={'edits': 1}, file=None)
    """

    seq: int
    kind: str
    about: dict[str, Any]
    file: File | None


class Journal:
    """The journal database. When a method returns, its changes are on disk; when it raises, nothing was modified.

    Args:
        path: database file.
        write: open for writing; only one process may do so at a time, see `Lock`.

    Raises:
        StoreError: the file does not exist, is damaged, is not a journal, or has another version.
    """

    def __init__(self, path: Path, *, write: bool) -> None:
        self._path = path
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        if not path.is_file():
            raise StoreError(
                f"{str(path)!r} does not exist: {str(path.parent)!r} is not a store; pass the folder of a store"
            )
        with self._sqlite_errors():
            self._base = self._connect(write)
            self._check()

    @classmethod
    def create(cls, path: Path, about: Mapping[str, Any]) -> None:
        """Creates a journal in one transaction.

        Args:
            path: database file.
            about: metadata of the store, JSON-serializable.

        Raises:
            StoreError: the file cannot be written.
        """
        text = json.dumps(about)
        try:
            base = sqlite3.connect(path, isolation_level=None)
            try:
                _set_up(base)
                base.execute("BEGIN IMMEDIATE")
                for statement in _TABLES.split(";"):
                    base.execute(statement)
                base.execute("INSERT INTO about VALUES (0, ?, ?)", (text, _digest(text)))
                base.execute(f"PRAGMA application_id = {_APPLICATION}")
                base.execute(f"PRAGMA user_version = {SCHEMA}")
                base.execute("COMMIT")
            finally:
                base.close()
        except sqlite3.Error as error:
            raise StoreError(f"{str(path)!r} cannot be created ({error}); choose a writable folder") from error

    @staticmethod
    def is_begun(path: Path) -> bool:
        """Returns whether there is a journal; False for an empty file left by an interrupted `create`."""
        if not path.is_file():
            return False
        try:
            base = sqlite3.connect(path)
            try:
                return bool(base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
            finally:
                base.close()
        except sqlite3.Error:
            return True  # a damaged journal exists

    @property
    def about(self) -> dict[str, Any]:
        """Metadata of the store."""
        with self._sqlite_errors():
            row = self._base.execute("SELECT content, sum FROM about").fetchone()
        if row is None or _digest(row[0]) != row[1]:
            raise self._damaged("the checksum of its metadata does not match")
        found: dict[str, Any] = json.loads(row[0])
        return found

    def describe(self, about: Mapping[str, Any]) -> None:
        """Replaces the metadata of the store."""
        text = json.dumps(about)
        with self._transaction():
            self._base.execute("UPDATE about SET content = ?, sum = ?", (text, _digest(text)))

    def entries(self) -> list[Entry]:
        """Returns the committed changes, in order.

        Raises:
            StoreError: the checksum of an entry does not match, or an entry is missing.
        """
        return [entry for entry, committed in self._rows() if committed]

    def prepared(self) -> list[Entry]:
        """Returns the prepared changes that are not committed."""
        return [entry for entry, committed in self._rows() if not committed]

    def last(self) -> tuple[int, str]:
        """Returns sequence number and checksum of the last committed change; `(0, "")` if there is none."""
        with self._sqlite_errors():
            row = self._base.execute(
                "SELECT seq, sum FROM changes WHERE mark IS NOT NULL ORDER BY seq DESC LIMIT 1"
            ).fetchone()
        return (row[0], row[1]) if row else (0, "")

    def prepare(self, entries: Sequence[Entry]) -> None:
        """Writes prepared changes, to be committed or aborted; removes earlier uncommitted changes."""
        _, before = self.last()
        with self._transaction():
            self._base.execute("DELETE FROM changes WHERE mark IS NULL")
            for entry in entries:
                about, file = json.dumps(entry.about), _file_text(entry.file)
                found = _digest(before, str(entry.seq), entry.kind, about, file)
                self._base.execute(
                    "INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, NULL)",
                    (entry.seq, entry.kind, about, file, before, found),
                )
                before = found

    def commit(self) -> None:
        """Commits the prepared changes."""
        with self._transaction():
            rows = self._base.execute("SELECT seq, sum FROM changes WHERE mark IS NULL").fetchall()
            for seq, found in rows:
                self._base.execute("UPDATE changes SET mark = ? WHERE seq = ?", (_digest("committed", found), seq))

    def abort(self) -> None:
        """Removes the prepared changes."""
        with self._transaction():
            self._base.execute("DELETE FROM changes WHERE mark IS NULL")

    def snapshots(self) -> list[Entry]:
        """Returns the snapshots, newest first, without rows whose checksum does not match."""
        with self._sqlite_errors():
            rows = self._base.execute("SELECT seq, about, file, sum FROM snapshots ORDER BY seq DESC").fetchall()
        return [
            Entry(seq, "snapshot", json.loads(about), _file_of(file))
            for seq, about, file, found in rows
            if _digest(str(seq), about, file) == found
        ]

    def add_snapshot(self, entry: Entry, *, keep: int) -> None:
        """Adds a snapshot and removes all but the newest `keep`."""
        about, file = json.dumps(entry.about), _file_text(entry.file)
        with self._transaction():
            self._base.execute(
                "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?)",
                (entry.seq, about, file, _digest(str(entry.seq), about, file)),
            )
            self._base.execute(
                "DELETE FROM snapshots WHERE seq NOT IN (SELECT seq FROM snapshots ORDER BY seq DESC LIMIT ?)", (keep,)
            )

    def compact(self, first: int, last: int) -> None:
        """Removes the changes between two changes, and the snapshots before the later one.

        Args:
            first: sequence number of the change to keep at the beginning.
            last: sequence number of the last change, which replaces the removed ones.
        """
        with self._transaction():
            (before,) = self._base.execute("SELECT sum FROM changes WHERE seq = ?", (first,)).fetchone()
            kind, about, file = self._base.execute(
                "SELECT kind, about, file FROM changes WHERE seq = ?", (last,)
            ).fetchone()
            found = _digest(before, str(last), kind, about, file)
            self._base.execute("DELETE FROM changes WHERE seq > ? AND seq < ?", (first, last))
            self._base.execute("DELETE FROM snapshots WHERE seq < ?", (last,))
            self._base.execute(
                "UPDATE changes SET before = ?, sum = ?, mark = ? WHERE seq = ?",
                (before, found, _digest("committed", found), last),
            )
        with suppress(sqlite3.Error):  # freed pages are reused if the file cannot be shrunk
            self._base.execute("VACUUM")
            self._base.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Checkpoints the WAL and closes the database."""
        with suppress(sqlite3.Error):
            if self._copy is None:
                self._base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._base.close()
        if self._copy is not None:
            self._copy.cleanup()

    def _connect(self, write: bool) -> sqlite3.Connection:
        if write:
            base = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=30)
            _set_up(base)
            return base
        try:
            return self._open_read_only(self._path)
        except sqlite3.OperationalError:
            # SQLite cannot read a WAL in a folder that is not writable; read a temporary copy.
            self._copy = tempfile.TemporaryDirectory(prefix="rlsedit-")
            for suffix in ("", "-wal"):
                part = self._path.with_name(self._path.name + suffix)
                if part.exists():
                    shutil.copy(part, Path(self._copy.name) / part.name)
            return self._open_read_only(Path(self._copy.name) / self._path.name)

    @staticmethod
    def _open_read_only(path: Path) -> sqlite3.Connection:
        base = sqlite3.connect(path.resolve().as_uri() + "?mode=ro", uri=True, isolation_level=None, timeout=30)
        try:
            base.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error:
            base.close()
            raise
        return base

    def _check(self) -> None:
        (application,) = self._base.execute("PRAGMA application_id").fetchone()
        (version,) = self._base.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION:
            raise StoreError(
                f"{str(self._path)!r} is damaged or not a journal of rlsedit_fast; pass the folder of a store"
            )
        if version != SCHEMA:
            version_to_use = "the version that wrote it" + (" or a newer one" if version > SCHEMA else "")
            raise StoreError(
                f"{str(self._path)!r} has schema {version}, this version of rlsedit_fast reads {SCHEMA}; nothing was "
                f"modified. Use {version_to_use}"
            )
        found = [row[0] for row in self._base.execute("PRAGMA quick_check(3)")]
        if found != ["ok"]:
            raise self._damaged("; ".join(found))

    def _rows(self) -> Iterator[tuple[Entry, bool]]:
        with self._sqlite_errors():
            rows = self._base.execute(
                "SELECT seq, kind, about, file, before, sum, mark FROM changes ORDER BY seq"
            ).fetchall()
        previous = None
        for seq, kind, about, file, before, found, mark in rows:
            if previous is not None and before != previous:
                raise self._damaged(f"the entry before change {seq} is missing")
            if _digest(before, str(seq), kind, about, file) != found:
                raise self._damaged(f"the checksum of change {seq} does not match")
            if mark is not None and mark != _digest("committed", found):
                raise self._damaged(f"the commit mark of change {seq} does not match")
            previous = found
            yield Entry(seq, kind, json.loads(about), _file_of(file)), mark is not None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Runs the block in a transaction.

        Raises:
            StoreError: SQLite cannot write; the transaction is rolled back.
        """
        try:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._base.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._base.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreError(
                f"{str(self._path)!r} cannot be written ({error}); nothing was modified. Check the free disk space and "
                "that the folder is writable"
            ) from error

    @contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> StoreError:
        return StoreError(
            f"the journal {str(self._path)!r} is damaged or cannot be read: {why}. Nothing was modified; restore the "
            "whole folder from a backup"
        )


def is_full(error: StoreError) -> bool:
    """Returns whether a write failed because the disk is full, before the frame that commits it was written."""
    return "disk is full" in str(error.__cause__)  # the text of SQLITE_FULL


def _set_up(base: sqlite3.Connection) -> None:
    base.execute("PRAGMA journal_mode = WAL")
    base.execute("PRAGMA synchronous = FULL")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def _file_text(file: File | None) -> str:
    return json.dumps([file.name, file.size, file.sum]) if file else ""


def _file_of(text: str) -> File | None:
    return File(*json.loads(text)) if text else None
