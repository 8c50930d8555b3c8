"""What an editor has come to beside its layers and its ledger."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import datetime, timezone

from rlsedit_fast.editing.gradient import GradientScale

logger = logging.getLogger(__name__)

TRACED = 1000
"""Points of the objective's course that are kept."""


_BEGINNING = datetime.min.replace(tzinfo=timezone.utc)


@dataclass(frozen=True)
class Point:
    """The objective after a change.

    Attributes:
        edits: how many were active.
        objective: `J` of each layer.
    """

    edits: int
    objective: tuple[float, ...]


@dataclass
class Progress:
    """Counters, and what goes on from batch to batch.

    Attributes:
        batches: how many were made.
        writes: batches and removals, each a rounding of the weights.
        scale: of the gradient values.
        trace: the objective's course.
        protected: the prompts that are protected, as they were given.
        time: of the last record; time that runs backwards stands still here.
    """

    batches: int = 0
    writes: int = 0
    scale: GradientScale = field(default_factory=GradientScale)
    trace: list[Point] = field(default_factory=list)
    protected: list[str] = field(default_factory=list)
    time: datetime = _BEGINNING

    def now(self) -> datetime:
        """The time, never before one that was told already."""
        time = datetime.now(timezone.utc)
        if time < self.time:
            logger.warning("the clock says %s, before the last edit's %s; this is recorded as that", time, self.time)
        self.time = max(time, self.time)
        return self.time

    def reached(self, point: Point) -> None:
        """Adds a point to the course of the objective."""
        self.trace.append(point)
        del self.trace[:-TRACED]
