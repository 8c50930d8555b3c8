"""A call's edits in batches, and which of these can have their values searched before the others are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rlsedit_fast.editing.ledger import Ledger
from rlsedit_fast.editing.requests import Request


def batches_of(requests: Sequence[Request], size: int, *, apart: bool) -> Iterator[list[Request]]:
    """Batches in order.

    Args:
        requests: at least one.
        size: most of a batch.
        apart: whether one ends early before a request that asks what another one in it asks.
    """
    batch: list[Request] = []
    asked: set[str] = set()
    for request in requests:
        if (apart and request.asks in asked) or len(batch) == size:
            yield batch
            batch, asked = [], set()
        batch.append(request)
        asked.add(request.asks)
    yield batch


def unrelated(batches: Sequence[Sequence[Request]], ledger: Ledger) -> list[int]:
    """Which batches share no subject and no question with an active edit or with another one of them."""
    met = Counter(mark for batch in batches for mark in {m for r in batch for m in (r.about, r.asks) if m})
    return [
        at
        for at, batch in enumerate(batches)
        if not ledger.ids_by_prompt(batch)
        and not ledger.ids_by_subject(batch)
        and all(met[mark] == 1 for request in batch for mark in (request.about, request.asks) if mark)
    ]
