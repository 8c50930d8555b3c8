"""The journal: an SQLite database in WAL mode, synced at every step, whose entries form a chain of checksums."""

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

SCHEMA = 2
"""Of the tables and of what is kept in them; a journal of another one is refused."""

_APPLICATION = 0x524C5345  # "RLSE", by which SQLite files are told apart
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
    """What is to be entered.

    Attributes:
        kind: which of the writer's kinds of change it is.
        about: all that is to be known of it besides its tensors; goes through JSON.
        tensors: its tensors.
    """

    kind: str
    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A change, or a snapshot, as the journal has it.

    Attributes:
        seq: counts the changes from 1; a snapshot has that of the last change in it.
        kind: as entered; "snapshot" for a snapshot.
        about: as entered.
        file: of its tensors; None where it has none.
    """

    seq: int
    kind: str
    about: dict[str, Any]
    file: File | None


class Journal:
    """One database. What a method writes is on the disk when it returns, and not there at all when it raises.

    Args:
        path: of the database.
        write: whether it is to be written; only one process may at a time, see `Lock`.

    Raises:
        StoreError: there is none, it is damaged, something else, or of another version.
    """

    def __init__(self, path: Path, *, write: bool) -> None:
        self._path = path
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        if not path.is_file():
            raise StoreError(f"{str(path)!r} is not there: {str(path.parent)!r} is no store; name one")
        with self._damage_named():
            self._base = self._connect(write)
            self._check()

    @classmethod
    def create(cls, path: Path, about: Mapping[str, Any]) -> None:
        """Makes a new one, wholly or not at all."""
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
            raise StoreError(f"{str(path)!r} cannot be made ({error}); name a folder that can be written to") from error

    @staticmethod
    def is_begun(path: Path) -> bool:
        """Whether there is a journal, and not only the file of one whose making was cut short."""
        if not path.is_file():
            return False
        try:
            base = sqlite3.connect(path)
            try:
                return bool(base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
            finally:
                base.close()
        except sqlite3.Error:
            return True  # damaged is not absent

    @property
    def about(self) -> dict[str, Any]:
        """What was said of the whole."""
        with self._damage_named():
            row = self._base.execute("SELECT content, sum FROM about").fetchone()
        if row is None or _digest(row[0]) != row[1]:
            raise self._damaged("what it says of itself is not what was written")
        found: dict[str, Any] = json.loads(row[0])
        return found

    def describe(self, about: Mapping[str, Any]) -> None:
        """Says something else of the whole."""
        text = json.dumps(about)
        with self._written():
            self._base.execute("UPDATE about SET content = ?, sum = ?", (text, _digest(text)))

    def entries(self) -> list[Entry]:
        """The committed changes, in order.

        Raises:
            StoreError: an entry is not what was written, or one is missing between others.
        """
        return [entry for entry, committed in self._rows() if committed]

    def prepared(self) -> list[Entry]:
        """Changes that were begun and not committed, the newest."""
        return [entry for entry, committed in self._rows() if not committed]

    def last(self) -> tuple[int, str]:
        """Sequence number and checksum of the last committed change."""
        with self._damage_named():
            row = self._base.execute(
                "SELECT seq, sum FROM changes WHERE mark IS NOT NULL ORDER BY seq DESC LIMIT 1"
            ).fetchone()
        return (row[0], row[1]) if row else (0, "")

    def prepare(self, entries: Sequence[Entry]) -> None:
        """Enters changes, to be committed or taken out again; of what was left uncommitted before, nothing stays."""
        _, before = self.last()
        with self._written():
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
        """Commits what is prepared."""
        with self._written():
            rows = self._base.execute("SELECT seq, sum FROM changes WHERE mark IS NULL").fetchall()
            for seq, found in rows:
                self._base.execute("UPDATE changes SET mark = ? WHERE seq = ?", (_digest("committed", found), seq))

    def abort(self) -> None:
        """Takes out what is prepared."""
        with self._written():
            self._base.execute("DELETE FROM changes WHERE mark IS NULL")

    def snapshots(self) -> list[Entry]:
        """Those that were entered, the newest first; one whose row is not what was written is left out."""
        with self._damage_named():
            rows = self._base.execute("SELECT seq, about, file, sum FROM snapshots ORDER BY seq DESC").fetchall()
        return [
            Entry(seq, "snapshot", json.loads(about), _file_of(file))
            for seq, about, file, found in rows
            if _digest(str(seq), about, file) == found
        ]

    def add_snapshot(self, entry: Entry, *, keep: int) -> None:
        """Enters a snapshot, and forgets all but the newest `keep`."""
        about, file = json.dumps(entry.about), _file_text(entry.file)
        with self._written():
            self._base.execute(
                "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?)",
                (entry.seq, about, file, _digest(str(entry.seq), about, file)),
            )
            self._base.execute(
                "DELETE FROM snapshots WHERE seq NOT IN (SELECT seq FROM snapshots ORDER BY seq DESC LIMIT ?)", (keep,)
            )

    def compact(self, first: int, last: int) -> None:
        """Forgets the changes between two, and the snapshots before the later one, which takes the first as its like.

        Args:
            first: the change that stays at the beginning.
            last: the newest change, which says all that those before it said.
        """
        with self._written():
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
        with suppress(sqlite3.Error):  # what it frees is used again if it cannot be given back
            self._base.execute("VACUUM")
            self._base.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Lets go of the database; what waits in its WAL is moved over."""
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
            return self._opened_to_read(self._path)
        except sqlite3.OperationalError:
            # In a folder that cannot be written to SQLite does not read a WAL; a copy elsewhere it does.
            self._copy = tempfile.TemporaryDirectory(prefix="rlsedit-")
            for suffix in ("", "-wal"):
                part = self._path.with_name(self._path.name + suffix)
                if part.exists():
                    shutil.copy(part, Path(self._copy.name) / part.name)
            return self._opened_to_read(Path(self._copy.name) / self._path.name)

    @staticmethod
    def _opened_to_read(path: Path) -> sqlite3.Connection:
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
            raise StoreError(f"{str(self._path)!r} is damaged, or the database of something else; name a store")
        if version != SCHEMA:
            which = "the version that wrote it" + (", or a newer one" if version > SCHEMA else "")
            raise StoreError(
                f"{str(self._path)!r} has schema {version}, this version of rlsedit_fast reads {SCHEMA}; nothing was "
                f"changed. Use {which}"
            )
        found = [row[0] for row in self._base.execute("PRAGMA quick_check(3)")]
        if found != ["ok"]:
            raise self._damaged("; ".join(found))

    def _rows(self) -> Iterator[tuple[Entry, bool]]:
        with self._damage_named():
            rows = self._base.execute(
                "SELECT seq, kind, about, file, before, sum, mark FROM changes ORDER BY seq"
            ).fetchall()
        previous = None
        for seq, kind, about, file, before, found, mark in rows:
            if previous is not None and before != previous:
                raise self._damaged(f"what comes before change {seq} is missing")
            if _digest(before, str(seq), kind, about, file) != found:
                raise self._damaged(f"change {seq} is not what was written")
            if mark is not None and mark != _digest("committed", found):
                raise self._damaged(f"the mark of change {seq} is not what was written")
            previous = found
            yield Entry(seq, kind, json.loads(about), _file_of(file)), mark is not None

    @contextmanager
    def _written(self) -> Iterator[None]:
        """A transaction of its own.

        Raises:
            StoreError: SQLite, that is the disk, refuses; nothing was entered.
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
                f"{str(self._path)!r} cannot be written ({error}); nothing was changed. See that there is room and "
                "that the folder can be written to"
            ) from error

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> StoreError:
        return StoreError(
            f"the journal {str(self._path)!r} is damaged or cannot be read: {why}. Nothing was changed; bring it back "
            "from a copy, together with the rest of its folder"
        )


def _set_up(base: sqlite3.Connection) -> None:
    base.execute("PRAGMA journal_mode = WAL")
    base.execute("PRAGMA synchronous = FULL")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def _file_text(file: File | None) -> str:
    return json.dumps([file.name, file.size, file.sum]) if file else ""


def _file_of(text: str) -> File | None:
    return File(*json.loads(text)) if text else None
