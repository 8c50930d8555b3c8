"""Groups of consecutive edits, over which retention is reported."""

from __future__ import annotations

AGE = 100
"""Approximate number of edits per group.

Example:
    >>> from rlsedit_fast.evaluation import AGE
    >>> AGE
    100
"""


def age_groups(count: int, batch_size: int) -> list[tuple[int, int]]:
    """Divides a stream into groups of whole batches.

    Args:
        count: number of edits in the stream.
        batch_size: number of edits per batch.

    Returns:
        `[start, stop)` of each group; a group has about `AGE` edits, or a tenth of a shorter stream.
    """
    size = max(1, round(min(AGE, count / 10) / batch_size)) * batch_size
    return [(start, min(start + size, count)) for start in range(0, count, size)]
