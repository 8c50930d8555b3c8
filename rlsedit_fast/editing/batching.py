"""Division of a call's edits into batches, and the search of several batches together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.ledger import Ledger
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.search.value_search import ValueFinder, Values


def search_ahead(
    requests: Sequence[Request], config: EditConfig, ledger: Ledger, finder: ValueFinder
) -> Iterator[tuple[list[Request], Values | None]]:
    """Yields batches in order, with their values if several batches are searched together.

    Args:
        requests: at least one.
        config: settings of the editor.
        ledger: the edits, up to date whenever the next batch is requested.
        finder: searches values.

    Yields:
        A batch and its values. The values are None if the batch is to be searched when it is written, because it is
        searched alone or shares a subject or a prompt with an active edit or with another batch.
    """
    joint = config.same_subject == "joint"
    window: list[list[Request]] = []
    for batch in _batches(requests, config.batch_size, distinct=joint):
        held = sum(map(len, window))
        if window and held + len(batch) > (config.search.ahead or 0):
            yield from _with_values(window, ledger, finder, joint=joint)
            window = []
        window.append(batch)
    yield from _with_values(window, ledger, finder, joint=joint)


def _with_values(
    batches: Sequence[list[Request]], ledger: Ledger, finder: ValueFinder, *, joint: bool
) -> Iterator[tuple[list[Request], Values | None]]:
    independent = _unrelated(batches, ledger) if joint else list(range(len(batches)))
    found: dict[int, Values] = {}
    if len(batches) > 1 and len(independent) > 1:
        values = finder.find([request for at in independent for request in batches[at]])
        first = 0
        for at in independent:
            found[at] = values.taken(range(first, first + len(batches[at])))
            first += len(batches[at])
    for at, batch in enumerate(batches):
        yield batch, found.get(at)


def _batches(requests: Sequence[Request], size: int, *, distinct: bool) -> Iterator[list[Request]]:
    """Yields batches of at most `size` requests; if `distinct`, a batch has no two requests with the same prompt."""
    batch: list[Request] = []
    prompts: set[str] = set()
    for request in requests:
        if (distinct and request.prompt_key in prompts) or len(batch) == size:
            yield batch
            batch, prompts = [], set()
        batch.append(request)
        prompts.add(request.prompt_key)
    yield batch


def _unrelated(batches: Sequence[Sequence[Request]], ledger: Ledger) -> list[int]:
    """Returns the batches that share no subject and no prompt with an active edit or with another batch."""
    keys = [{key for r in batch for key in (r.subject_key, r.prompt_key) if key} for batch in batches]
    counts = Counter(key for some in keys for key in some)
    return [
        at
        for at, batch in enumerate(batches)
        if not ledger.ids_by_prompt(batch)
        and not ledger.ids_by_subject(batch)
        and all(counts[key] == 1 for key in keys[at])
    ]
