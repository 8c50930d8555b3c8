"""A store: the folder with the journal, the files that it speaks of, and the order in which they are written."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from rlsedit_fast.errors import StoreError
from rlsedit_fast.store import tensors
from rlsedit_fast.store.journal import Change, Entry, Journal
from rlsedit_fast.store.lock import Lock

logger = logging.getLogger(__name__)

SNAPSHOTS_KEPT = 2
"""The newest, and the one before it for when that is damaged."""

REPLAYED_AT_MOST = 500
"""Changes after the newest snapshot, however small: one of a single row still costs a pass over C on replay."""

_JOURNAL, _LOCK, _HEAD = "journal.db", "lock", "head"
_CHANGES, _SNAPSHOTS = "changes", "snapshots"


class Store:
    """Changes that outlive the process, in order.

    A change is *prepared*: its tensors lie in a synced file and its entry in the journal; then, when whoever makes it
    has made it, *committed*. On opening, what is committed is there, and what is prepared alone is taken out. A
    snapshot says up to which change everything is *applied* in it. Nothing is believed that does not bear its checksum.

    Args:
        directory: of the store.
        write: False reads alone, also while another process writes.

    Raises:
        StoreError: it is none, is damaged, of another version, or is being written by somebody else.
    """

    def __init__(self, directory: str | Path, *, write: bool = True) -> None:
        self.directory = Path(directory)
        if not self.exists(directory):
            raise StoreError(f"{str(directory)!r} is no store: it has no {_JOURNAL}; name one")
        self._write = write
        self._prepared: list[Entry] = []
        self._in_doubt = False
        self._lock = Lock(self.directory / _LOCK) if write else None
        try:
            self._journal = Journal(self.directory / _JOURNAL, write=write)
            try:
                self._about = self._journal.about
                noted = self._noted()  # first: whoever writes meanwhile only adds to the entries
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
        """Makes a new store, in a folder that is empty or not there yet.

        Args:
            directory: of the store.
            about: what is to be known of the whole; goes through JSON.

        Raises:
            StoreError: the folder holds something, or cannot be written to.
        """
        place = Path(directory)
        try:
            place.mkdir(parents=True, exist_ok=True)
            held = sorted(path.name for path in place.iterdir())
        except OSError as error:
            raise StoreError(f"store {str(place)!r} cannot be made ({error}); name a folder that can be") from error
        own = {_LOCK, _HEAD, _CHANGES, _SNAPSHOTS, _JOURNAL, f"{_JOURNAL}-wal", f"{_JOURNAL}-shm"}
        if foreign := [name for name in held if name not in own]:
            raise StoreError(f"{str(place)!r} holds {', '.join(foreign[:3])} and is no store; name an empty folder")
        lock = Lock(place / _LOCK)
        try:
            for folder in (_CHANGES, _SNAPSHOTS):
                (place / folder).mkdir(exist_ok=True)
            Journal.create(place / _JOURNAL, about)
            tensors.sync_folder(place)
            tensors.sync_folder(place.resolve().parent)
        except OSError as error:
            raise StoreError(f"store {str(place)!r} cannot be made ({error}); name a folder that can be") from error
        finally:
            lock.close()
        return cls(place)

    @staticmethod
    def exists(directory: str | Path) -> bool:
        """Whether there is a store, whole or damaged."""
        place = Path(directory)
        # Something was committed once: an empty journal is then a damaged one.
        return (place / _HEAD).exists() or Journal.is_begun(place / _JOURNAL)

    @property
    def about(self) -> dict[str, Any]:
        """What was said of the whole."""
        return dict(self._about)

    @property
    def entries(self) -> list[Entry]:
        """The committed changes, in order."""
        return list(self._entries)

    @property
    def last(self) -> int:
        """Sequence number of the last of them; 0 where there are none."""
        return self._entries[-1].seq if self._entries else 0

    def describe(self, about: Mapping[str, Any]) -> None:
        """Says something else of the whole."""
        self._check_writable()
        self._journal.describe(about)
        self._about = dict(about)

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of a change, checked.

        Raises:
            StoreError: their file is damaged or gone.
        """
        return tensors.read(self.directory, entry.file) if entry.file else {}

    def prepare(self, changes: Sequence[Change]) -> None:
        """Writes changes down; they are on the disk when it returns, and count once they are committed.

        Raises:
            StoreError: the disk refuses; nothing was written.
        """
        self._check_writable()
        entries: list[Entry] = []
        try:
            for seq, change in enumerate(changes, start=self.last + 1):
                file = None
                if change.tensors:
                    file = tensors.write(self.directory, f"{_CHANGES}/{seq:08d}.safetensors", change.tensors)
                # Through JSON, so that what was written now and what is read later are the same.
                entries.append(Entry(seq, change.kind, json.loads(json.dumps(change.about)), file))
            self._journal.prepare(entries)
        except BaseException:
            self._remove(entries)
            raise
        self._prepared = entries

    def commit(self) -> None:
        """Makes what was prepared count, from here on.

        Raises:
            StoreError: the disk refuses; it does not count.
        """
        if not self._prepared:
            return
        try:
            self._journal.commit()
        except StoreError as error:
            try:
                self._journal.abort()
            except StoreError:
                # The mark may have reached the disk or not; opening the store again tells.
                self._in_doubt = True
                raise StoreError(
                    f"{error} The store takes nothing more until it is opened again; the last change is wholly there "
                    "then, or wholly absent"
                ) from error
            self._remove(self._prepared)
            self._prepared = []
            raise
        self._entries += self._prepared
        self._prepared = []
        self._write_head()

    def abort(self) -> None:
        """Takes out what was prepared; nothing if nothing was. Where the disk refuses that, opening takes it out.

        What an exception from outside, such as a signal handler's, has kept from being counted behind its commit is in
        the store: it then takes nothing more until it is opened again.
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
        """Whether so much has been written since the last snapshot that one of `size` bytes is worth its writing."""
        newest = max((entry.seq for entry in self._journal.snapshots()), default=0)
        since = list(takewhile(lambda entry: entry.seq > newest, reversed(self._entries)))
        return len(since) >= REPLAYED_AT_MOST or sum(e.file.size for e in since if e.file) >= size

    def snapshot(self, about: Mapping[str, Any], held: Mapping[str, Tensor], *, drop_changes: bool = False) -> None:
        """Writes down what everything up to the last change has led to.

        Args:
            about: what is to be known of it besides its tensors.
            held: its tensors.
            drop_changes: whether the tensors of changes that all kept snapshots contain are needed no more.

        Raises:
            StoreError: the disk refuses; the snapshots from before are there as they were.
        """
        self._check_writable()
        file = tensors.write(self.directory, f"{_SNAPSHOTS}/{self.last:08d}.safetensors", held)
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
        """What is known of the newest snapshot besides its tensors."""
        return next(iter(self._journal.snapshots()), None)

    def snapshots(self) -> Iterator[tuple[Entry, dict[str, Tensor]]]:
        """Whole snapshots, the newest first; a damaged one is passed over, with a warning that names it."""
        for entry in self._journal.snapshots():
            try:
                yield entry, self.tensors(entry)
            except StoreError as error:
                logger.warning("a snapshot is passed over, and the one before it used: %s", error)

    def compact(self) -> int:
        """Forgets all changes but the first and the last, which says all that those before it said.

        Returns:
            The bytes that were freed.
        """
        self._check_writable()
        before = sum(self.sizes().values())
        first, last = self._entries[0], self._entries[-1]
        if first.seq < last.seq:
            self._journal.compact(first.seq, last.seq)
            gone, self._entries = self._entries[1:-1], [first, last]
            self._remove(gone)
            kept = {entry.file.name for entry in self._journal.snapshots() if entry.file}
            self._remove_files(_SNAPSHOTS, kept)
        return before - sum(self.sizes().values())

    def sizes(self) -> dict[str, int]:
        """Bytes on the disk: of the journal, of the changes' tensors, of the snapshots."""
        return {
            "journal": sum(_size(path) for path in self.directory.glob(f"{_JOURNAL}*")),
            "changes": sum(_size(path) for path in (self.directory / _CHANGES).glob("*")),
            "snapshots": sum(_size(path) for path in (self.directory / _SNAPSHOTS).glob("*")),
        }

    def close(self) -> None:
        """Lets others write."""
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
                f"the store {str(self.directory)!r} is closed for writing; nothing was changed. Open it again"
            )

    def _clear(self) -> None:
        """Takes out what was prepared and never committed, and files that nothing speaks of."""
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
        """Notes the last change beside the journal, so that a journal that has lost its end is told from a whole one.

        It is written after the journal was synced, so it never says more than a whole journal has; what it says is
        needed against damage alone, so it is not waited for.
        """
        text = str(self.last)
        with suppress(OSError):
            (self.directory / _HEAD).write_text(f"{text} {zlib.crc32(text.encode()):08x}\n")

    def _noted(self) -> int:
        """The last change that is known to have been committed, by what is noted beside the journal's entries."""
        path, noted = self.directory / _HEAD, 0
        try:
            text, found = path.read_text().split()
            if f"{zlib.crc32(text.encode()):08x}" != found:
                raise ValueError("its checksum is another")
            noted = int(text)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            if path.stat().st_size:  # a power cut may leave it empty
                logger.warning(
                    "%s is damaged (%s): whether the journal has lost its end cannot be told by it", path, error
                )
        return max([noted, *(entry.seq for entry in self._journal.snapshots())])

    def _check_end(self, noted: int) -> None:
        """Refuses a journal that has lost its end: SQLite itself takes a damaged log for a shorter one."""
        if noted > self.last:
            raise StoreError(
                f"the journal {str(self.directory / _JOURNAL)!r} is damaged: it ends with change {self.last}, and "
                f"{noted} were committed. Nothing was changed; bring it, or {_JOURNAL}-wal beside it, back from a copy"
            )


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
