"""What was told and what became of it: the records that a user sees, and the rows that removal needs."""

from __future__ import annotations

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
        asked = {request.asks for request in requests}
        return [i for i, request in self._requests.items() if request.asks in asked]

    def about(self, requests: Sequence[Request]) -> list[int]:
        """Active edits that share their subject's change with one of the requests, or would."""
        subjects = {request.about for request in requests} - {None}
        return [i for i, request in self._requests.items() if request.about in subjects]

    def add(self, record: EditRecord, request: Request, told: Told | None) -> None:
        """Enters a new edit; one without rows, which was skipped, is only recorded."""
        self._records.append(record)
        if told is not None:
            self._requests[record.id], self._told[record.id] = request, told

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
            del self._told[i], self._requests[i]
        return self.get(ids)
