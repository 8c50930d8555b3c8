"""What was told and what became of it: the records that a user sees, and the rows that removal needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

from rlsedit_fast.editing.edits import EditRecord, EditState
from rlsedit_fast.editing.layers import Told
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.errors import InputError


class Ledger:
    """The edits of one editor, in memory."""

    def __init__(self) -> None:
        self._records: list[EditRecord] = []
        self._requests: dict[int, Request] = {}  # of active edits
        self._told: dict[int, Told] = {}  # of active edits
        self._asking: dict[str, set[int]] = defaultdict(set)  # active edits by what they ask
        self._about: dict[str, set[int]] = defaultdict(set)  # and by the subject whose change they share

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> list[EditRecord]:
        """All of them, oldest first."""
        return list(self._records)

    def check(self, ids: Sequence[int]) -> None:
        """Raises InputError unless the ids are those of active edits, each named once, at least one."""
        wrong = [i for i in ids if i not in self._told]
        if wrong or not ids or len(set(ids)) != len(ids):
            raise InputError(
                f"ids {list(ids)}: {wrong or 'none or repeated ones'} are not those of active edits; see history()"
            )

    def request(self, identity: int) -> Request:
        """An active edit, made ready for a model."""
        return self._requests[identity]

    def requests(self, ids: Sequence[int]) -> list[Request]:
        """Active edits, made ready for a model."""
        return [self._requests[i] for i in ids]

    def told(self, ids: Sequence[int]) -> list[Told]:
        """The rows of active edits."""
        return [self._told[i] for i in ids]

    def but(self, ids: Collection[int]) -> list[Told]:
        """The rows of all active edits except these."""
        return [told for i, told in self._told.items() if i not in ids]

    def asking(self, requests: Sequence[Request]) -> list[int]:
        """Active edits that ask what one of the requests asks."""
        return sorted(set().union(*(self._asking.get(request.asks, ()) for request in requests)))

    def about(self, requests: Sequence[Request]) -> list[int]:
        """Active edits that share their subject's change with one of the requests, or would."""
        subjects = {request.about for request in requests if request.about is not None}
        return sorted(set().union(*(self._about.get(subject, ()) for subject in subjects)))

    def add(self, record: EditRecord, request: Request, told: Told | None) -> None:
        """Enters a new edit; one without rows, which was skipped, is only recorded."""
        self._records.append(record)
        if told is not None:
            self._requests[record.id], self._told[record.id] = request, told
            self._asking[request.asks].add(record.id)
            if request.about is not None:
                self._about[request.about].add(record.id)

    def retell(self, record: EditRecord, told: Told) -> None:
        """Enters what an active edit was told anew."""
        self._records[record.id - 1] = record
        self._told[record.id] = told

    def get(self, ids: Sequence[int]) -> list[EditRecord]:
        """The records of these edits."""
        return [self._records[i - 1] for i in ids]

    def mark(self, ids: Sequence[int], state: EditState) -> list[EditRecord]:
        """Active edits become undone or replaced; their rows are forgotten."""
        for i in ids:
            self._records[i - 1] = replace(self._records[i - 1], state=state, joint_with=())
            request = self._requests.pop(i)
            del self._told[i]
            self._asking[request.asks].discard(i)
            if request.about is not None:
                self._about[request.about].discard(i)
        return self.get(ids)
