"""The phases of a run: the seconds that each takes, and a bar with the time left while it lasts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm


class PhaseProgress(Protocol):
    """Function that reports the progress of a phase."""

    def __call__(self, done: int, total: int | None) -> None:
        """Reports the number of finished units and the total number, or None if the total is unknown."""


class Phases:
    """Times phases, which may lie within one another.

    Args:
        shown: whether a phase has a bar on stderr.
        label: what stands before a phase's name there.

    Attributes:
        seconds: by phase, without those of the phases within it.
    """

    def __init__(self, *, shown: bool = False, label: str = "") -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._shown = shown
        self._label = label
        self._open: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str, unit: str) -> Iterator[PhaseProgress]:
        """Within it the time counts to this phase.

        Args:
            name: of the phase.
            unit: what it does many of.

        Yields:
            The function to call with the progress of the phase.
        """
        self._count()
        self._open.append(name)
        bar = tqdm(desc=f"{self._label}{name}", unit=unit, disable=not self._shown, leave=len(self._open) == 1)

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            with bar:
                yield progress
                bar.leave = bar.leave and bar.total is not None  # of what was known already no bar stays
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        """Adds what has gone by to the innermost phase."""
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
