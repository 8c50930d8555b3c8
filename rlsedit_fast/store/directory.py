"""The store: a folder with the journal and tensor files, and the order in which they are written."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from rlsedit_fast.errors import StoreError
from rlsedit_fast.store import tensors
from rlsedit_fast.store.journal import Change, Entry, Journal, is_full
from rlsedit_fast.store.lock import Lock

logger = logging.getLogger(__name__)

SNAPSHOTS_KEPT = 2
"""The newest snapshot, and the one before it in case the newest is damaged."""

MAX_REPLAYED = 500
"""Changes after which a snapshot is due regardless of their size, since each costs a pass over C on replay."""

_JOURNAL, _LOCK, _HEAD = "journal.db", "lock", "head"
_CHANGES, _SNAPSHOTS = "changes", "snapshots"


class Store:
    """Crash-safe sequence of changes.

    A change is first *prepared*: its tensors are in a synced file and its entry is in the journal. It is *committed*
    once the caller has applied it. Opening a store removes changes that were prepared but not committed. A snapshot
    contains the state after a change. Everything read is verified by checksums.

    Args:
        directory: folder of the store.
        write: open for writing. If False, open read-only, also while another process writes.

    Raises:
        StoreError: the store does not exist, is damaged, has another version, or is locked by another process.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from rlsedit_fast.store import Change, Store
        >>> folder = tempfile.TemporaryDirectory()
        >>> with Store.create(folder.name, {"model": "demo"}) as store:
        ...     store.prepare([Change("batch", {"edits": 1}, {"keys": torch.ones(1, 2)})])
        ...     store.commit()
        >>> with Store(folder.name, write=False) as store:
        ...     entry = store.entries[-1]
        ...     entry.kind, entry.about, store.tensors(entry)
        ('batch', {'edits': 1}, {'keys': tensor([[1., 1.]])})
        >>> folder.cleanup()
    """

    def __init__(self, directory: str | Path, *, write: bool = True) -> None:
        self.directory = Path(directory)
        self.check_exists(directory)
        self._write = write
        self._prepared: list[Entry] = []
        self._in_doubt = False
        self._lock = Lock(self.directory / _LOCK) if write else None
        try:
            self._journal = Journal(self.directory / _JOURNAL, write=write)
            try:
                self._about = self._journal.about
                noted = self._noted()  # read first: a concurrent writer only adds entries
                self._entries = self._journal.entries()
                self._check_end(noted)
                if write:
                    self._clear()
            except BaseException:
                self._journal.close()
                raise
        except BaseException:
            if self._lock:
                self._lock.close()
            raise

    @classmethod
    def create(cls, directory: str | Path, about: Mapping[str, Any]) -> Store:
        """Creates a store in a folder that is empty or does not exist.

        Args:
            directory: folder of the store.
            about: metadata of the store, JSON-serializable.

        Returns:
            The new store, open for writing.

        Raises:
            StoreError: the folder is not empty or is not writable.

        Example:
            >>> import tempfile
            >>> from rlsedit_fast.store import Store
            >>> with tempfile.TemporaryDirectory() as folder, Store.create(folder, {"model": "demo"}) as store:
            ...     Store.exists(folder), store.about, store.last
            (True, {'model': 'demo'}, 0)
        """
        place = Path(directory)
        try:
            place.mkdir(parents=True, exist_ok=True)
            cls.check_empty(place)
        except OSError as error:
            raise StoreError(f"store {str(place)!r} cannot be created ({error}); choose a writable folder") from error
        lock = Lock(place / _LOCK)
        try:
            for folder in (_CHANGES, _SNAPSHOTS):
                (place / folder).mkdir(exist_ok=True)
            Journal.create(place / _JOURNAL, about)
            tensors.sync_folder(place)
            tensors.sync_folder(place.resolve().parent)
        except OSError as error:
            raise StoreError(f"store {str(place)!r} cannot be created ({error}); choose a writable folder") from error
        finally:
            lock.close()
        return cls(place)

    @staticmethod
    def exists(directory: str | Path) -> bool:
        """Returns whether the folder contains a store, intact or damaged."""
        place = Path(directory)
        # The head file exists after the first commit; an empty journal beside it is damaged.
        return (place / _HEAD).exists() or Journal.is_begun(place / _JOURNAL)

    @classmethod
    def check_exists(cls, directory: str | Path) -> None:
        """Raises StoreError if the folder does not contain a store, with the name of a similar one beside it."""
        if cls.exists(directory):
            return
        place = Path(directory)
        names: list[str] = []
        with suppress(OSError):
            names = [one.name for one in place.absolute().parent.iterdir() if one != place and cls.exists(one)]
        near = get_close_matches(place.name, names, n=1)
        meant = f"; did you mean {str(place.with_name(near[0]))!r}?" if near else "; pass the folder of a store"
        raise StoreError(f"{str(directory)!r} does not contain a store (no {_JOURNAL}){meant}")

    @staticmethod
    def check_empty(directory: str | Path) -> None:
        """Raises StoreError if the folder exists and contains files that are not those of a new store."""
        place = Path(directory)
        own = {_LOCK, _HEAD, _CHANGES, _SNAPSHOTS, _JOURNAL, f"{_JOURNAL}-wal", f"{_JOURNAL}-shm"}
        existing = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
        if foreign := [name for name in existing if name not in own]:
            raise StoreError(
                f"{str(place)!r} contains {', '.join(foreign[:3])} and is not a store; choose an empty folder"
            )

    @property
    def about(self) -> dict[str, Any]:
        """Metadata of the store."""
        return dict(self._about)

    @property
    def entries(self) -> list[Entry]:
        """The committed changes, in order."""
        return list(self._entries)

    @property
    def last(self) -> int:
        """Sequence number of the last committed change; 0 if there is none."""
        return self._entries[-1].seq if self._entries else 0

    def describe(self, about: Mapping[str, Any]) -> None:
        """Replaces the metadata of the store.

        Args:
            about: metadata, JSON-serializable.

        Raises:
            StoreError: the disk cannot be written; nothing was modified.
        """
        self._check_writable()
        self._journal.describe(about)
        self._about = dict(about)

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        """Reads and verifies the tensors of a change.

        Args:
            entry: a change or a snapshot of this store.

        Returns:
            The tensors by name, on the CPU; empty if the entry has none.

        Raises:
            StoreError: the file is damaged or missing.
        """
        return tensors.read(self.directory, entry.file) if entry.file else {}

    def prepare(self, changes: Sequence[Change]) -> None:
        """Writes changes to disk; `commit` or `abort` must follow.

        Args:
            changes: the changes, in order.

        Raises:
            StoreError: the disk cannot be written; nothing was modified.

        Example:
            >>> import tempfile
            >>> from rlsedit_fast.store import Change, Store
            >>> with tempfile.TemporaryDirectory() as folder, Store.create(folder, {}) as store:
            ...     store.prepare([Change("batch", {})])
            ...     store.abort()  # the change could not be applied
            ...     store.entries
            []
        """
        self._check_writable()
        entries: list[Entry] = []
        try:
            for seq, change in enumerate(changes, start=self.last + 1):
                file = None
                if change.tensors:
                    file = tensors.write(self.directory, f"{_CHANGES}/{seq:08d}.safetensors", change.tensors)
                # Through JSON, so that entries written now equal entries read later.
                entries.append(Entry(seq, change.kind, json.loads(json.dumps(change.about)), file))
            self._journal.prepare(entries)
        except BaseException:
            self._remove(entries)
            raise
        self._prepared = entries

    def commit(self) -> None:
        """Commits the prepared changes.

        Raises:
            StoreError: the disk cannot be written. The changes are not committed, or, if that is unknown, the store is
                closed for writing.
        """
        if not self._prepared:
            return
        try:
            self._journal.commit()
        except StoreError as error:
            try:
                self._journal.abort()
            except StoreError:
                if not is_full(error):  # the commit may or may not be on disk; reopening the store decides
                    self._in_doubt = True
                    raise StoreError(
                        f"the journal in {str(self.directory)!r} cannot be written ({error.__cause__}). It is unknown "
                        "whether the last change was committed, so the store is closed for writing; open it again, "
                        "which keeps the last change completely or removes it completely"
                    ) from error
                # The rows stay without a commit mark; the next change or opening removes them.
            self._remove(self._prepared)
            self._prepared = []
            raise
        self._entries += self._prepared
        self._prepared = []
        self._write_head()

    def abort(self) -> None:
        """Removes the prepared changes, if any; if the disk cannot be written, reopening the store removes them.

        If an exception from outside, such as one raised by a signal handler, interrupted `commit` after the commit
        reached the disk, the changes stay and the store is closed for writing until it is opened again.
        """
        if self._prepared and not self._in_doubt:
            with suppress(StoreError):
                self._journal.abort()
                if self._journal.last()[0] >= self._prepared[-1].seq:
                    self._in_doubt = True
                    return
            self._remove(self._prepared)
            self._prepared = []

    def snapshot_due(self, size: int) -> bool:
        """Returns whether a new snapshot is due.

        Args:
            size: bytes of the new snapshot.

        Returns:
            True if the changes since the last snapshot have at least `size` bytes, or are at least `MAX_REPLAYED`.
        """
        newest = max((entry.seq for entry in self._journal.snapshots()), default=0)
        since = list(takewhile(lambda entry: entry.seq > newest, reversed(self._entries)))
        return len(since) >= MAX_REPLAYED or sum(e.file.size for e in since if e.file) >= size

    def snapshot(self, about: Mapping[str, Any], state: Mapping[str, Tensor], *, drop_changes: bool = False) -> None:
        """Writes the state after the last change.

        Args:
            about: metadata, JSON-serializable.
            state: tensors of the state, by name.
            drop_changes: delete the tensors of changes that all kept snapshots include.

        Raises:
            StoreError: the disk cannot be written; earlier snapshots are unchanged.

        Example:
            >>> import tempfile
            >>> import torch
            >>> from rlsedit_fast.store import Change, Store
            >>> with tempfile.TemporaryDirectory() as folder, Store.create(folder, {}) as store:
            ...     store.prepare([Change("batch", {})])
            ...     store.commit()
            ...     store.snapshot({"edits": 1}, {"weight": torch.zeros(1)})
            ...     [(entry.seq, state) for entry, state in store.snapshots()]
            [(1, {'weight': tensor([0.])})]
        """
        self._check_writable()
        file = tensors.write(self.directory, f"{_SNAPSHOTS}/{self.last:08d}.safetensors", state)
        self._journal.add_snapshot(
            Entry(self.last, "snapshot", json.loads(json.dumps(about)), file), keep=SNAPSHOTS_KEPT
        )
        kept = self._journal.snapshots()
        self._remove_files(_SNAPSHOTS, {entry.file.name for entry in kept if entry.file})
        if drop_changes and len(kept) == SNAPSHOTS_KEPT:
            oldest = min(entry.seq for entry in kept)
            first = self._entries[0].seq
            self._remove([entry for entry in self._entries if first < entry.seq <= oldest])

    def newest_snapshot(self) -> Entry | None:
        """Returns the entry of the newest snapshot, without its tensors, or None."""
        return next(iter(self._journal.snapshots()), None)

    def snapshots(self) -> Iterator[tuple[Entry, dict[str, Tensor]]]:
        """Yields the intact snapshots, newest first; logs a warning for each damaged one."""
        for entry in self._journal.snapshots():
            try:
                yield entry, self.tensors(entry)
            except StoreError as error:
                logger.warning("skipping a damaged snapshot and using the one before it: %s", error)

    def compact(self) -> int:
        """Removes all changes except the first and the last, and snapshots before the last.

        The last change must contain everything that is needed from the removed ones.

        Returns:
            Bytes freed on disk.

        Raises:
            StoreError: the disk cannot be written; nothing was modified.
        """
        self._check_writable()
        before = sum(self.sizes().values())
        first, last = self._entries[0], self._entries[-1]
        if first.seq < last.seq:
            self._journal.compact(first.seq, last.seq)
            removed, self._entries = self._entries[1:-1], [first, last]
            self._remove(removed)
            kept = {entry.file.name for entry in self._journal.snapshots() if entry.file}
            self._remove_files(_SNAPSHOTS, kept)
        return before - sum(self.sizes().values())

    def sizes(self) -> dict[str, int]:
        """Returns the bytes on disk of the parts `journal`, `changes` (their tensors) and `snapshots`."""
        return {
            "journal": sum(_size(path) for path in self.directory.glob(f"{_JOURNAL}*")),
            "changes": sum(_size(path) for path in (self.directory / _CHANGES).glob("*")),
            "snapshots": sum(_size(path) for path in (self.directory / _SNAPSHOTS).glob("*")),
        }

    def close(self) -> None:
        """Closes the store and releases the lock."""
        self._write = False
        self._journal.close()
        if self._lock:
            self._lock.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _check_writable(self) -> None:
        if self._in_doubt or not self._write:
            raise StoreError(
                f"the store {str(self.directory)!r} is closed for writing; nothing was modified. Open it again"
            )

    def _clear(self) -> None:
        """Removes uncommitted changes and files without an entry."""
        if self._journal.prepared():
            self._journal.abort()
        self._remove_files(_CHANGES, {entry.file.name for entry in self._entries if entry.file})
        self._remove_files(_SNAPSHOTS, {e.file.name for e in self._journal.snapshots() if e.file})

    def _remove(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.file:
                with suppress(OSError):
                    (self.directory / entry.file.name).unlink()

    def _remove_files(self, folder: str, kept: set[str]) -> None:
        with suppress(OSError):
            for path in (self.directory / folder).iterdir():
                if f"{folder}/{path.name}" not in kept:
                    path.unlink()

    def _write_head(self) -> None:
        """Writes the number of the last change to the head file, which detects a truncated journal.

        The head file is written after the journal was synced, so it is never ahead of an intact journal. It is not
        synced itself, since it only serves to detect damage.
        """
        text = str(self.last)
        with suppress(OSError):
            (self.directory / _HEAD).write_text(f"{text} {zlib.crc32(text.encode()):08x}\n")

    def _noted(self) -> int:
        """Returns the number of the last change that is known to be committed from the head file and the snapshots."""
        path, noted = self.directory / _HEAD, 0
        try:
            text, found = path.read_text().split()
            if f"{zlib.crc32(text.encode()):08x}" != found:
                raise ValueError("its checksum does not match")
            noted = int(text)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            if path.stat().st_size:  # a power failure may leave it empty
                logger.warning("%s is damaged (%s): it cannot be used to detect a truncated journal", path, error)
        return max([noted, *(entry.seq for entry in self._journal.snapshots())])

    def _check_end(self, noted: int) -> None:
        """Rejects a truncated journal, which SQLite itself does not detect."""
        if noted > self.last:
            raise StoreError(
                f"the journal {str(self.directory / _JOURNAL)!r} is damaged: it ends with change {self.last}, but "
                f"{noted} changes were committed. Nothing was modified; restore it and {_JOURNAL}-wal from a backup"
            )


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
