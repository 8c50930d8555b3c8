"""Timing and progress bars of the phases of a run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

from rlsedit_fast.activity import activity_shown


class PhaseProgress(Protocol):
    """Function that reports the progress of a phase."""

    def __call__(self, done: int, total: int | None) -> None:
        """Reports the number of finished units and the total number, or None if the total is unknown."""


class Phases:
    """Measures the time of phases, which may be nested.

    Args:
        shown: whether to show a progress bar on stderr for each phase.
        label: text before the name of a phase in the progress bar.

    Attributes:
        seconds: seconds by phase, without nested phases.
    """

    def __init__(self, *, shown: bool = False, label: str = "") -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._shown = shown
        self._label = label
        self._open: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str, unit: str) -> Iterator[PhaseProgress]:
        """Starts a phase, which ends with the context.

        Args:
            name: name of the phase.
            unit: unit of its progress, such as "prompt".

        Yields:
            The function that reports its progress.
        """
        self._count()
        self._open.append(name)
        bar = tqdm(desc=f"{self._label}{name}", unit=unit, disable=not self._shown, leave=len(self._open) == 1)

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            with bar, activity_shown(bar):
                yield progress
                bar.leave = bar.leave and bar.total is not None  # remove the bar of a phase without work
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        """Adds the time since the last call to the innermost phase."""
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
