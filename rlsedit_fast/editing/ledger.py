"""The edits that were made and what became of them: the records that a user sees, and the rows that removal needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from numbers import Integral
from typing import Any

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.conflicts import composed
from rlsedit_fast.editing.edits import Edit, EditRecord, EditState
from rlsedit_fast.editing.layers import EditRows
from rlsedit_fast.editing.requests import Request, asked, shared_subject
from rlsedit_fast.errors import InputError

_HISTORY = "list the edits with `rlsedit history` (Python: history())"


@dataclass(frozen=True)
class TransactionRecord:
    """What one transaction did: it is entered here, and journalled, whole.

    Attributes:
        gone: ids of active edits that were taken out.
        outcome: what became of them.
        again: ids of active edits that were taken out and written again.
        rebuilt: per layer, whether the taking out was a rebuild; empty where nothing was taken out.
        edits: the new ones, as asked for.
        records: the new edits' records, in the same order.
        rewritten: the new records of `again`.
        rows: what was written, by id, in the order written; without the edits that were skipped.
    """

    gone: tuple[int, ...] = ()
    outcome: EditState = "undone"
    again: tuple[int, ...] = ()
    rebuilt: tuple[bool, ...] = ()
    edits: tuple[Edit, ...] = ()
    records: tuple[EditRecord, ...] = ()
    rewritten: tuple[EditRecord, ...] = ()
    rows: Mapping[int, EditRows] | None = None


@dataclass(frozen=True)
class BatchResult:
    """What was written of a batch, by place in it.

    Attributes:
        rows: the rows of those that were written.
        figures: of each, fields of its record.
        groups: those that share a value.
    """

    rows: Mapping[int, EditRows]
    figures: Sequence[Mapping[str, Any]]
    groups: Sequence[Sequence[int]]


class Ledger:
    """The edits of one editor, in memory.

    Args:
        config: the editor's settings.
        ready: makes edits ready for the model.
    """

    def __init__(self, config: EditConfig, ready: Callable[[Sequence[Edit]], list[Request]]) -> None:
        self._config, self._ready = config, ready
        self._records: list[EditRecord] = []
        self._edits: dict[int, Edit] = {}  # the active ones, in the order of their ids
        self._requests: dict[int, Request] = {}  # of active edits that were asked for
        self._rows: dict[int, EditRows] = {}  # of active edits, unless nothing is kept
        self._by_prompt: dict[str, set[int]] = defaultdict(set)  # active edits by what they ask
        self._by_subject: dict[str, set[int]] = defaultdict(set)  # and by the subject whose change they share

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> list[EditRecord]:
        """All of them, oldest first."""
        return list(self._records)

    @property
    def active(self) -> list[int]:
        """Ids of the active edits, ascending."""
        return list(self._edits)

    def check(self, ids: Sequence[int]) -> None:
        """Raises InputError unless the ids are those of active edits, each named once, at least one."""
        wrong = [i for i in ids if i not in self._edits]
        if wrong or not ids or len(set(ids)) != len(ids):
            raise InputError(
                f"ids {list(ids)}: {wrong or 'none or repeated ones'} are not those of active edits; nothing was "
                "modified",
                hint=_HISTORY,
            )

    def select(
        self,
        ids: int | Sequence[int] | None = None,
        *,
        subject: str | None = None,
        last: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[int]:
        """Ids of the active edits that all of what is given fits; of these the `last` so many.

        Args:
            ids: of active edits.
            subject: as asked for, up to white space.
            last: how many, at least 1.
            since: not before this time; local time where it has no time zone.
            until: not after this time.

        Returns:
            Them, ascending, but where ids are given without `last`: then in the order of these.

        Raises:
            InputError: nothing is given, something is given as what it is not, an id is not that of an active edit, or
                nothing fits.
        """
        if ids is None and subject is None and last is None and since is None and until is None:
            raise InputError("which edits? name ids, a subject, the last N, or times")
        if last is not None and (not _is_whole(last) or last < 1):
            raise InputError(f"last={last!r}: expected a whole number of at least 1")
        if subject is not None and not isinstance(subject, str):
            raise InputError(f"subject={subject!r}: expected a text")
        least, most = _moment("since", since), _moment("until", until)
        if ids is not None:
            ids = _listed(ids)
            self.check(ids)
        chosen = [
            i
            for i in (self.active if ids is None else ids)
            if (subject is None or composed(self._edits[i].subject) == composed(subject))
            and (least is None or self._records[i - 1].time >= least)
            and (most is None or self._records[i - 1].time <= most)
        ]
        if last is not None:
            chosen = sorted(chosen)[-last:]  # ids count up with time
        if not chosen:
            given = {"ids": ids, "subject": subject, "last": last, "since": since, "until": until}
            criteria = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
            raise InputError(f"{criteria}: no active edit matches; nothing was modified", hint=_HISTORY)
        return chosen

    def edit(self, identity: int) -> Edit:
        """An active edit, as asked for."""
        return self._edits[identity]

    def edits(self, ids: Sequence[int]) -> list[Edit]:
        """Active edits, as asked for."""
        return [self._edits[i] for i in ids]

    def requests(self, ids: Sequence[int]) -> list[Request]:
        """Active edits, made ready for a model."""
        if lacking := [i for i in ids if i not in self._requests]:
            self._requests.update(zip(lacking, self._ready(self.edits(lacking)), strict=True))
        return [self._requests[i] for i in ids]

    def rows(self, ids: Sequence[int]) -> list[EditRows]:
        """The rows of active edits."""
        return [self._rows[i] for i in ids]

    def rows_except(self, ids: Collection[int]) -> list[EditRows]:
        """The rows of all active edits but these."""
        return [self._rows[i] for i in self._edits if i not in ids]

    def ids_by_prompt(self, requests: Sequence[Request]) -> list[int]:
        """Active edits that ask what one of the requests asks."""
        return sorted(set().union(*(self._by_prompt.get(request.asks, ()) for request in requests)))

    def ids_by_subject(self, requests: Sequence[Request]) -> list[int]:
        """Active edits that share their subject's change with one of the requests, or would."""
        subjects = {request.about for request in requests if request.about is not None}
        return sorted(set().union(*(self._by_subject.get(subject, ()) for subject in subjects)))

    def get(self, ids: Sequence[int]) -> list[EditRecord]:
        """The records of these edits."""
        return [self._records[i - 1] for i in ids]

    def transaction(
        self,
        requests: Sequence[Request],
        written: BatchResult,
        *,
        again: Sequence[int],
        time: datetime,
        batch: int,
        **taken_out: Any,
    ) -> TransactionRecord:
        """What was done, with the records that come of it; nothing is entered yet.

        Args:
            requests: the new edits.
            written: what was written of these and then of `again`.
            again: ids of active edits that were written again.
            time: of the new records.
            batch: number of the new edits' batch.
            **taken_out: the fields of `TransactionRecord` that say what was taken out.
        """
        first = len(self) + 1
        ids = [*range(first, first + len(requests)), *again]
        partners = {
            at: tuple(sorted(ids[other] for other in group if other != at)) for group in written.groups for at in group
        }
        records = [
            EditRecord(
                id=ids[at],
                time=time,
                prompt=request.edit.prompt,
                subject=request.edit.subject,
                target=request.edit.target,
                weight=request.edit.weight,
                state="active" if at in written.rows else "skipped",
                batch=batch,
                name=request.edit.name,
                joint_with=partners.get(at, ()),
                **written.figures[at],
            )
            for at, request in enumerate(requests)
        ]
        rewritten = [
            replace(record, joint_with=partners[at], **written.figures[at])
            for at, record in enumerate(self.get(again), start=len(requests))
        ]
        return TransactionRecord(
            again=tuple(again),
            edits=tuple(request.edit for request in requests),
            records=tuple(records),
            rewritten=tuple(rewritten),
            rows={ids[at]: rows for at, rows in written.rows.items()},
            **taken_out,
        )

    def enter(self, transaction: TransactionRecord) -> None:
        """Enters what a transaction did."""
        kept = transaction.rows or {}
        for i in transaction.gone:
            self._records[i - 1] = replace(self._records[i - 1], state=transaction.outcome, joint_with=())
            self._forget(i)
        for edit, record in zip(transaction.edits, transaction.records, strict=True):
            self.enter_one(edit, record, kept.get(record.id))
        for record in transaction.rewritten:
            self._records[record.id - 1] = record
            self._keep(record.id, kept.get(record.id))

    def revise(self, records: Sequence[EditRecord], rows: Mapping[int, EditRows]) -> None:
        """Replaces the records and rows of active edits."""
        for record in records:
            self._records[record.id - 1] = record
        self.set_rows(rows)

    def set_rows(self, rows: Mapping[int, EditRows]) -> None:
        """Replaces the rows of active edits."""
        for identity, one in rows.items():
            self._keep(identity, one)

    def enter_one(self, edit: Edit, record: EditRecord, rows: EditRows | None) -> None:
        """Enters an edit with what has become of it so far."""
        self._records.append(record)
        if record.state == "active":
            self._edits[record.id] = edit
            self._by_prompt[asked(edit)].add(record.id)
            if (subject := shared_subject(edit, self._config)) is not None:
                self._by_subject[subject].add(record.id)
            self._keep(record.id, rows)

    def _keep(self, identity: int, rows: EditRows | None) -> None:
        if rows is not None and self._config.keys is not None:
            self._rows[identity] = rows

    def _forget(self, identity: int) -> None:
        edit = self._edits.pop(identity)
        self._rows.pop(identity, None)
        self._requests.pop(identity, None)
        self._by_prompt[asked(edit)].discard(identity)
        if (subject := shared_subject(edit, self._config)) is not None:
            self._by_subject[subject].discard(identity)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _listed(ids: Any) -> list[int]:
    """One id or several, NumPy's integers included, as a list."""
    several = [ids] if _is_whole(ids) or not isinstance(ids, Iterable) or isinstance(ids, str | bytes) else list(ids)
    if wrong := [one for one in several if not _is_whole(one)]:
        raise InputError(f"ids: {wrong[0]!r} is none; expected one id or a list of them, whole numbers as in history()")
    return [int(one) for one in several]


def _moment(name: str, time: datetime | None) -> datetime | None:
    """A time with its time zone."""
    if time is None:
        return None
    if not isinstance(time, datetime):
        raise InputError(
            f"{name}={time!r}: expected a datetime; make one of a text with datetime.datetime.fromisoformat"
        )
    if time.utcoffset() is not None:
        return time
    try:
        return time.astimezone()
    except (OverflowError, ValueError, OSError) as error:
        raise InputError(f"{name}={time!r}: no local time there ({error}); give it a time zone") from error
