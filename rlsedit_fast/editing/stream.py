"""Applies the edits of a call batch by batch, with checks between the batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from rlsedit_fast.editing.batching import search_ahead
from rlsedit_fast.editing.measurement import check_stated
from rlsedit_fast.editing.records import EditRecord
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.session import PILOT, EditSession
from rlsedit_fast.errors import GateError, InputError, RLSEditError

if TYPE_CHECKING:
    from rlsedit_fast.editing.editor import Editor

logger = logging.getLogger(__name__)


class Guard(Protocol):
    """Checks the model of an editor between batches.

    Attributes:
        every: number of batches between two checks.
        undo: whether a failed check takes back what was changed since the last one.
    """

    @property
    def every(self) -> int:
        """Number of batches between two checks."""

    @property
    def undo(self) -> bool:
        """Whether a failed check takes back what was changed since the last one."""

    def check(self, *, first: int, final: bool) -> None:
        """Checks the present model.

        Args:
            first: id of the first edit since the last check.
            final: whether all edits are applied.

        Raises:
            GateError: the check failed.
        """


class Gated(Protocol):
    """Conditions that can be checked in the model of an editor."""

    def bind(self, editor: Editor) -> Guard:
        """Measures the unedited model and returns the checks."""


def bind_gates(gates: Gated | None, editor: Editor) -> Guard | None:
    """Returns the checks of gates in the model of an editor.

    Raises:
        InputError: the argument is not a `Gates`; or see `Gates.bind`.
    """
    if gates is None:
        return None
    if not callable(getattr(gates, "bind", None)) or isinstance(gates, type):
        raise InputError(f"gates={gates!r:.60}: expected Gates(...), or Gates.load(path) for a gate file")
    return gates.bind(editor)


def apply_stream(
    session: EditSession,
    requests: Sequence[Request],
    on_batch: Callable[[list[EditRecord]], None] | None = None,
    *,
    require_stated: bool = False,
    guard: Guard | None = None,
) -> list[EditRecord]:
    """Applies edits batch by batch and refines those that the model does not state; see `Editor.edit`."""
    if on_batch is not None and not callable(on_batch):
        raise InputError(f"on_batch={on_batch!r}: expected a function of the records of a batch")
    undo, every = (guard.undo, guard.every) if guard else (False, 1)
    ids, applied = list[int](), 0
    fresh, writes = session.layers is None, session.progress.writes
    try:
        if fresh:
            session.start(requests[:PILOT])
        batches = search_ahead(requests, session.config, session.ledger, session.finder)
        while len(ids) < len(requests):
            first, unreported = len(session.ledger) + 1, list[list[int]]()
            with session.atomic() if undo else nullcontext():
                for batch, values in islice(batches, every):
                    with session.atomic() if require_stated and not undo else nullcontext():
                        records = session.apply_batch(batch, values=values)
                        if require_stated:
                            check_stated(records, len(ids))
                    ids += [record.id for record in records]
                    if undo:
                        unreported.append([record.id for record in records])
                        continue
                    applied = len(ids)
                    if on_batch is not None:
                        on_batch(records)
                final = len(ids) == len(requests)
                if final:
                    _refine(session, ids)
                if guard is not None:
                    guard.check(first=first, final=final)
            applied = len(ids)
            if on_batch is not None:
                for some in unreported:
                    on_batch(session.ledger.get(some))
    except BaseException as error:
        unchanged = session.progress.writes == writes
        if unchanged and fresh:
            session.discard_start()
        if isinstance(error, GateError) or (isinstance(error, RLSEditError) and not unchanged):
            error.message += f"\nThe first {applied} of {len(requests)} edits are applied."
        raise
    records = session.ledger.get(ids)
    if failed := sum(not record.success and record.state == "active" for record in records):
        logger.warning(
            "%d of %d edits are applied but the model does not state their targets; see `success` and "
            "`search_converged` of their records",
            failed,
            len(records),
        )
    return records


def _refine(session: EditSession, ids: Sequence[int]) -> None:
    """Refines edits of the call and earlier ones at its end; later batches may have changed their answers."""
    again = list(ids) if len(ids) > session.config.batch_size else []
    session.refiner.refine([*session.refiner.earlier_ids(ids[0], len(ids)), *again])
    session.refiner.update_ranks(again)
