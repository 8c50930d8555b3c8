"""Statistics over runs: mean and standard deviation over seeds, and the Pareto front."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsedit_fast.evaluation.runs import value


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a figure over runs.

    Attributes:
        mean: mean over the runs that have the figure.
        deviation: sample standard deviation; NaN for a single run.
        runs: number of these runs.

    Example:
        >>> from rlsedit_fast.evaluation import Spread
        >>> print(Spread(mean=0.9, deviation=0.01, runs=3))
        0.900 ± 0.010
    """

    mean: float
    deviation: float
    runs: int

    def __str__(self) -> str:
        if self.runs < 2:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


def spread(values: Sequence[float | None]) -> Spread | None:
    """Computes mean and standard deviation.

    Args:
        values: one value per run; None and NaN are ignored.

    Returns:
        The statistics, or None if there is no value.

    Example:
        >>> from rlsedit_fast.evaluation import spread
        >>> spread([0.5, None, 0.5])
        Spread(mean=0.5, deviation=0.0, runs=2)
    """
    known = [found for found in values if found is not None and not math.isnan(found)]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else math.nan, len(known))


def over_seeds(results: Sequence[Mapping[str, Any]], metric: str, form: str, *, of: str = "all") -> Spread | None:
    """Computes the statistics of one figure at the end of several runs.

    Args:
        results: contents of result files.
        metric: name of the metric.
        form: form of the metric.
        of: edits, text, task or layer that the figure refers to, as in the rows of result files.

    Returns:
        The statistics, or None if no run has the figure.

    Example:
        >>> from rlsedit_fast.evaluation import over_seeds
        >>> row = {"edits": 10, "of": "all", "metric": "efficacy", "form": "strict"}
        >>> results = [{"made": 10, "rows": [row | {"value": value}]} for value in (1.0, 0.8)]
        >>> print(over_seeds(results, "efficacy", "strict"))
        0.900 ± 0.141
    """
    return spread([value(dict(result), metric, form, of=of) for result in results])


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Finds the Pareto front; higher is better in both coordinates.

    Args:
        points: points by name.

    Returns:
        The names of the points that no other point dominates, in order. A point dominates another one if it is at least
        as high in both coordinates and higher in one.

    Example:
        >>> from rlsedit_fast.evaluation import pareto
        >>> pareto({"a": (1.0, 0.5), "b": (0.5, 1.0), "c": (0.5, 0.5)})
        ['a', 'b']
    """
    return [
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a > x or b > y) for other, (a, b) in points.items() if other != name)
    ]
