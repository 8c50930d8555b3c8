"""Edits of like age: groups of whole batches, over which forgetting is reported."""

from __future__ import annotations

AGE = 100
"""Edits of like age, about."""


def age_groups(count: int, batch_size: int) -> list[tuple[int, int]]:
    """[start, stop) of groups of whole batches: `AGE` edits each, or about a tenth of a shorter stream."""
    size = max(1, round(min(AGE, count / 10) / batch_size)) * batch_size
    return [(start, min(start + size, count)) for start in range(0, count, size)]
