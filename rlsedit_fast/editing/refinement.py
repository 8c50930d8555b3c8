"""Refinement: edits that the model does not state after a write are searched again, and their values are moved."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.records import EditRecord
from rlsedit_fast.editing.search.objective import Measured
from rlsedit_fast.editing.search.value_search import ValueFinder
from rlsedit_fast.errors import RLSEditError

if TYPE_CHECKING:
    from rlsedit_fast.editing.session import EditSession

logger = logging.getLogger(__name__)

_FRACTION = 0.99  # of the change that the second search finds


class Refiner:
    """Refines edits of a session.

    Args:
        session: the session.
        finder: searches values.
        config: settings of the editor.
    """

    def __init__(self, session: EditSession, finder: ValueFinder, config: EditConfig) -> None:
        self._session, self._finder, self._config = session, finder, config

    def refine(self, ids: Sequence[int], *, measured: bool = False) -> None:
        """Refines active edits that the model does not state, for at most `EditConfig.refine` rounds.

        With contexts in a chat, the edits must be stated there as well.

        Edits whose search did not reach rank 1 are not refined. If refining does not help, nothing changes.

        Args:
            ids: ids of the edits.
            measured: whether their records were measured in the present model.
        """
        ledger = self._session.ledger
        records = [one for one in ledger.get(ids) if one.state == "active" and one.search_rank == 1]
        ids, without_gain = [record.id for record in records], set[int]()
        for attempt in range(self._config.effective_refine if ids else 0):
            requests = ledger.requests(ids)
            if measured and not attempt and not requests[0].chat:
                failed = [record.id for record in records if not record.success]
            else:  # all edits, since refining some of them changes others
                ranks = self._session.measurement.ranks_everywhere(requests).rank.tolist()
                failed = [i for i, rank in zip(ids, ranks, strict=True) if rank > 1 and i not in without_gain]
            if not failed:
                return
            logger.info("refining %d active edits that the model does not state", len(failed))
            partners = {partner for record in ledger.get(failed) for partner in record.joint_with}
            again = sorted(partners.union(failed))
            groups = self._finder.groups(ledger.requests(again))
            for part in _packed(groups, self._config.batch_size):
                some = [again[at] for at in part]
                try:
                    if not self._move_values(some):
                        without_gain.update(some)
                except RLSEditError as error:  # the edits are applied and stay as they are
                    logger.warning("%d edits that the model does not state were not refined: %s", len(failed), error)
                    return

    def update_ranks(self, ids: Sequence[int]) -> None:
        """Measures active edits and updates the records of those whose rank changed."""
        ledger = self._session.ledger
        records = [record for record in ledger.get(ids) if record.state == "active"]
        if not records:
            return
        now = self._session.measurement.ranks(ledger.requests([record.id for record in records]))
        changed = [
            after for before, after in zip(records, _updated(records, now), strict=True) if after.rank != before.rank
        ]
        if changed:
            changed = self._with_answers(changed)
            with self._session.transaction("updating records", "decrease batch_size") as transaction:
                self._session.revise(transaction, changed, {})

    def earlier_ids(self, before: int, most: int) -> list[int]:
        """Draws at most `most` active edits with ids below `before`, ascending; deterministic."""
        ids = [i for i in self._session.ledger.active if i < before]
        return sorted(Random(before).sample(ids, min(most, len(ids))))

    def _move_values(self, ids: list[int]) -> bool:
        """Searches active edits again in the edited model and moves their values by the difference.

        Returns:
            False if neither more edits are stated, at the bare prompt and in a chat, nor their mean NLL is lower, or
            if fewer are stated at the bare prompt; nothing was modified.
        """
        session = self._session
        assert session.layers is not None
        requests, rows = session.ledger.requests(ids), session.ledger.rows(ids)
        before, everywhere = session.measurement.ranks(requests), session.measurement.ranks_everywhere(requests)
        with session.transaction(f"refining {len(ids)} edits", "decrease batch_size") as transaction:
            values = self._finder.find(requests)
            moved = session.layers.move_values(requests, rows, values, self._config.effective_rows, _FRACTION)
            after = session.measurement.ranks(requests)
            lost = int((after.rank == 1).sum()) < int((before.rank == 1).sum())
            if lost or not _is_better(everywhere, session.measurement.ranks_everywhere(requests)):
                return False
            records = self._with_answers(_updated(session.ledger.get(ids), after))
            session.revise(transaction, records, dict(zip(ids, moved, strict=True)))
        return True

    def _with_answers(self, records: Sequence[EditRecord]) -> list[EditRecord]:
        """Returns records with the answers of the present model."""
        requests = self._session.ledger.requests([record.id for record in records])
        answers = self._session.measurement.answer_fields(requests)
        return [replace(record, **fields) for record, fields in zip(records, answers, strict=True)]


def _updated(records: Sequence[EditRecord], now: Measured) -> list[EditRecord]:
    """Returns records with the measured NLL and rank."""
    each = zip(records, now.nll.tolist(), now.rank.tolist(), strict=True)
    return [replace(record, nll=nll, rank=rank) for record, nll, rank in each]


def _is_better(before: Measured, after: Measured) -> bool:
    """Returns whether more edits are stated, or as many with a lower mean NLL."""
    stated = [int((one.rank == 1).sum()) for one in (before, after)]
    return stated[1] > stated[0] or (stated[1] == stated[0] and float(after.nll.mean()) < float(before.nll.mean()))


def _packed(groups: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yields the members of groups, about `size` at a time; a group is not divided."""
    part: list[int] = []
    for group in groups:
        if part and len(part) + len(group) > size:
            yield part
            part = []
        part += group
    yield part
