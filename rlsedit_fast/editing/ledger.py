"""All edits of an editor: their records, and the rows that are needed to remove them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from rlsedit_fast.data.edits import Edit, normalized, prompt_key
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.records import EditRecord, EditState
from rlsedit_fast.editing.requests import Request, subject_key
from rlsedit_fast.editing.rows import EditRows, aged_weight
from rlsedit_fast.errors import InputError, listed

_HISTORY = "list the edits with `rlsedit history` (Python: history())"
_SHOWN = 5  # number of ids or names that an error lists


@dataclass(frozen=True)
class TransactionRecord:
    """Result of one transaction, as entered into the ledger and the journal.

    Attributes:
        removed: ids of active edits that were removed.
        outcome: new state of the removed edits.
        rewritten_ids: ids of active edits that were removed and written again.
        rebuilt: per layer, whether the removal rebuilt it; empty without a removal.
        edits: the new edits.
        records: records of the new edits, in the same order.
        rewritten: new records of `rewritten_ids`.
        rows: written rows by id, in the order in which they were written; without skipped edits.
        aged: new weight of other active edits by id, in the order in which they were lowered.
        aged_rebuilt: per layer, whether lowering them rebuilt it; empty without any.
    """

    removed: tuple[int, ...] = ()
    outcome: EditState = "undone"
    rewritten_ids: tuple[int, ...] = ()
    rebuilt: tuple[bool, ...] = ()
    edits: tuple[Edit, ...] = ()
    records: tuple[EditRecord, ...] = ()
    rewritten: tuple[EditRecord, ...] = ()
    rows: Mapping[int, EditRows] | None = None
    aged: Mapping[int, float] = field(default_factory=dict)
    aged_rebuilt: tuple[bool, ...] = ()


@dataclass(frozen=True)
class BatchResult:
    """Result of writing a batch, by position in it.

    Attributes:
        rows: rows of the edits that were written.
        results: fields of the record of each edit.
        groups: positions of edits that share a value.
    """

    rows: Mapping[int, EditRows]
    results: Sequence[Mapping[str, Any]]
    groups: Sequence[Sequence[int]]


class Ledger:
    """The edits of one editor, in memory.

    Args:
        config: settings of the editor.
        prepare: tokenizes edits, see `requests.prepare`.
    """

    def __init__(self, config: EditConfig, prepare: Callable[[Sequence[Edit]], list[Request]]) -> None:
        self._config, self._prepare = config, prepare
        self._records: list[EditRecord] = []
        self._edits: dict[int, Edit] = {}  # of active edits, by ascending id
        self._requests: dict[int, Request] = {}  # of active edits, once they were needed
        self._rows: dict[int, EditRows] = {}  # of active edits, if rows are stored
        self._by_prompt: dict[str, set[int]] = defaultdict(set)  # active edits
        self._by_subject: dict[str, set[int]] = defaultdict(set)  # active edits that share a value per subject

    def __len__(self) -> int:
        return len(self._records)

    def copy(self) -> Ledger:
        """Returns a copy that later changes of this ledger do not affect."""
        other = Ledger(self._config, self._prepare)
        other._records, other._edits = list(self._records), dict(self._edits)
        other._requests, other._rows = dict(self._requests), dict(self._rows)
        for mine, theirs in ((self._by_prompt, other._by_prompt), (self._by_subject, other._by_subject)):
            theirs.update({key: set(ids) for key, ids in mine.items()})
        return other

    @property
    def records(self) -> list[EditRecord]:
        """All records, oldest first."""
        return list(self._records)

    @property
    def active(self) -> list[int]:
        """Ids of the active edits, ascending."""
        return list(self._edits)

    def check(self, ids: Sequence[int]) -> None:
        """Raises InputError unless the ids are those of active edits, at least one, each given once."""
        if not ids:
            raise InputError("no ids were given; pass at least one id of an active edit", hint=_HISTORY)
        if wrong := [i for i in ids if i not in self._edits]:
            shown = [
                f"{i} ({self._records[i - 1].state})" if 1 <= i <= len(self._records) else f"{i} (no such edit)"
                for i in wrong
            ]
            raise InputError(
                f"ids {', '.join(listed(shown))}: not active ({self._shown_active()}); nothing was modified",
                hint=_HISTORY,
            )
        if twice := sorted(i for i, count in Counter(ids).items() if count > 1):
            raise InputError(f"ids {', '.join(listed(twice))} given more than once; pass each id once")

    def select(
        self,
        ids: int | Sequence[int] | None = None,
        *,
        name: str | None = None,
        subject: str | None = None,
        last: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[int]:
        """Selects active edits; see `Editor.select`."""
        if all(criterion is None for criterion in (ids, name, subject, last, since, until)):
            raise InputError("no selection given; pass ids, name, subject, last, since or until")
        if last is not None and (not _is_whole(last) or last < 1):
            raise InputError(f"last={last!r}: expected an integer of at least 1")
        for criterion, text in (("name", name), ("subject", subject)):
            if text is not None and not isinstance(text, str):
                raise InputError(f"{criterion}={text!r}: expected a string")
        if name is not None:
            self._check_name(name)
        least, most = _moment("since", since), _moment("until", until)
        if ids is not None:
            ids = _listed(ids)
            self.check(ids)
        chosen = [
            i
            for i in (self.active if ids is None else ids)
            if (name is None or self._edits[i].name == name)
            and (subject is None or normalized(self._edits[i].subject) == normalized(subject))
            and (least is None or self._records[i - 1].time >= least)
            and (most is None or self._records[i - 1].time <= most)
        ]
        if last is not None:
            chosen = sorted(chosen)[-last:]  # ids ascend with time
        if not chosen:
            given = {"ids": ids, "name": name, "subject": subject, "last": last, "since": since, "until": until}
            criteria = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
            raise InputError(f"{criteria}: no active edit matches; nothing was modified", hint=_HISTORY)
        return chosen

    def _check_name(self, name: str) -> None:
        """Raises InputError if no active edit has a name."""
        names = dict.fromkeys(edit.name for edit in self._edits.values() if edit.name is not None)
        if name in names:
            return
        if past := [f"{record.id} ({record.state})" for record in self._records if record.name == name]:
            reason = f"the edits with this name are not active: {', '.join(listed(past, _SHOWN))}"
        elif near := get_close_matches(name, names):
            reason = f"no edit has this name; similar names: {', '.join(map(repr, near))}"
        elif names:
            reason = f"no edit has this name; names of active edits: {', '.join(listed(map(repr, names), _SHOWN))}"
        else:
            reason = f"no active edit has a name ({self._shown_active()})"
        raise InputError(f"name {name!r}: {reason}; nothing was modified", hint=_HISTORY)

    def _shown_active(self) -> str:
        return f"active: {', '.join(listed(self.active, _SHOWN)) or 'none'}"

    def edit(self, identity: int) -> Edit:
        """Returns an active edit."""
        return self._edits[identity]

    def edits(self, ids: Sequence[int]) -> list[Edit]:
        """Returns active edits."""
        return [self._edits[i] for i in ids]

    def requests(self, ids: Sequence[int]) -> list[Request]:
        """Returns the requests of active edits."""
        if lacking := [i for i in ids if i not in self._requests]:
            self._requests.update(zip(lacking, self._prepare(self.edits(lacking)), strict=True))
        return [self._requests[i] for i in ids]

    def rows(self, ids: Sequence[int]) -> list[EditRows]:
        """Returns the rows of active edits."""
        return [self._rows[i] for i in ids]

    def aged(self, later: int, ids: Collection[int]) -> dict[int, EditRows]:
        """Returns the rows of active edits whose weight is to be lowered, with their new weights.

        Args:
            later: number of edits that are being applied.
            ids: edits that are removed or written again.
        """
        after, found = self._config.halve_after, dict[int, EditRows]()
        for i in self._edits if after is not None else ():
            if i not in ids:
                weight = aged_weight(self._edits[i].weight, len(self) + later - i, after)
                if weight < self._rows[i].weight:
                    found[i] = replace(self._rows[i], weight=weight)
        return found

    @property
    def has_rows(self) -> bool:
        """Whether rows of active edits are kept."""
        return bool(self._rows)

    def rows_except(self, ids: Collection[int]) -> list[EditRows]:
        """Returns the rows of all other active edits."""
        return [self._rows[i] for i in self._edits if i not in ids]

    def ids_by_prompt(self, requests: Sequence[Request]) -> list[int]:
        """Returns the ids of active edits with the prompt of one of the requests."""
        return sorted(set().union(*(self._by_prompt.get(request.prompt_key, ()) for request in requests)))

    def ids_by_subject(self, requests: Sequence[Request]) -> list[int]:
        """Returns the ids of active edits that share, or would share, their value with one of the requests."""
        subjects = {request.subject_key for request in requests if request.subject_key is not None}
        return sorted(set().union(*(self._by_subject.get(subject, ()) for subject in subjects)))

    def get(self, ids: Sequence[int]) -> list[EditRecord]:
        """Returns the records of edits."""
        return [self._records[i - 1] for i in ids]

    def transaction(
        self,
        requests: Sequence[Request],
        written: BatchResult,
        *,
        rewritten_ids: Sequence[int],
        time: datetime,
        batch: int,
        **removal: Any,
    ) -> TransactionRecord:
        """Returns the record of a transaction; it is not entered yet.

        Args:
            requests: the new edits.
            written: result of writing these, followed by `rewritten_ids`.
            rewritten_ids: ids of active edits that were written again.
            time: time of the new records.
            batch: number of the new batch.
            **removal: fields of `TransactionRecord` about removed edits.
        """
        first = len(self) + 1
        ids = [*range(first, first + len(requests)), *rewritten_ids]
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
                join=request.edit.join,
                messages=request.edit.messages,
                joint_with=partners.get(at, ()),
                **written.results[at],
            )
            for at, request in enumerate(requests)
        ]
        rewritten = [
            replace(record, joint_with=partners[at], **written.results[at])
            for at, record in enumerate(self.get(rewritten_ids), start=len(requests))
        ]
        return TransactionRecord(
            rewritten_ids=tuple(rewritten_ids),
            edits=tuple(request.edit for request in requests),
            records=tuple(records),
            rewritten=tuple(rewritten),
            rows={ids[at]: rows for at, rows in written.rows.items()},
            **removal,
        )

    def enter(self, transaction: TransactionRecord) -> None:
        """Enters a transaction."""
        kept = transaction.rows or {}
        for i in transaction.removed:
            self._records[i - 1] = replace(self._records[i - 1], state=transaction.outcome, joint_with=())
            self._forget(i)
        for i, weight in transaction.aged.items():
            self._records[i - 1] = replace(self._records[i - 1], lowered_weight=weight)
            if i in self._rows:
                self._rows[i] = replace(self._rows[i], weight=weight)
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
        """Enters an edit with its present record."""
        self._records.append(record)
        if record.state == "active":
            self._edits[record.id] = edit
            self._by_prompt[prompt_key(edit)].add(record.id)
            if (subject := subject_key(edit, self._config)) is not None:
                self._by_subject[subject].add(record.id)
            self._keep(record.id, rows)

    def _keep(self, identity: int, rows: EditRows | None) -> None:
        if rows is not None and self._config.stored_rows is not None:
            self._rows[identity] = rows

    def _forget(self, identity: int) -> None:
        edit = self._edits.pop(identity)
        self._rows.pop(identity, None)
        self._requests.pop(identity, None)
        self._by_prompt[prompt_key(edit)].discard(identity)
        if (subject := subject_key(edit, self._config)) is not None:
            self._by_subject[subject].discard(identity)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _listed(ids: Any) -> list[int]:
    """Returns one or several ids, including NumPy integers, as a list."""
    several = [ids] if _is_whole(ids) or not isinstance(ids, Iterable) or isinstance(ids, str | bytes) else list(ids)
    if wrong := [one for one in several if not _is_whole(one)]:
        raise InputError(
            f"ids: {wrong[0]!r}: expected one id or a list of ids, integers as in history(); select(name=...) "
            "returns the ids of a name"
        )
    return [int(one) for one in several]


def _moment(name: str, time: datetime | None) -> datetime | None:
    """Returns a time with a time zone."""
    if time is None:
        return None
    if not isinstance(time, datetime):
        raise InputError(f"{name}={time!r}: expected a datetime; convert a string with datetime.datetime.fromisoformat")
    if time.utcoffset() is not None:
        return time
    try:
        return time.astimezone()
    except (OverflowError, ValueError, OSError) as error:
        raise InputError(
            f"{name}={time!r}: cannot be converted to local time ({error}); pass a datetime with a time zone"
        ) from error
