"""Figures over the seeds of runs: mean and deviation, and who is not beaten in everything at once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsedit_fast.evaluation.runs import value


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        mean: of the runs that have it.
        deviation: their sample standard deviation; NaN of a single run.
        runs: how many.
    """

    mean: float
    deviation: float
    runs: int

    def __str__(self) -> str:
        if self.runs < 2:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and deviation of those that are known; None where none is."""
    known = [found for found in values if found is not None and not math.isnan(found)]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else math.nan, len(known))


def over_seeds(results: Sequence[Mapping[str, Any]], metric: str, form: str, *, of: str = "all") -> Spread | None:
    """One figure at the end of several runs."""
    return spread([value(dict(result), metric, form, of=of) for result in results])


def by_age(result: Mapping[str, Any], metric: str = "efficacy", form: str = "strict") -> dict[str, tuple[float, float]]:
    """By age of edit, `first-last`: what held when it was made, and what holds at the end."""
    made, end = {}, {}
    for row in result["rows"]:
        if row["metric"] == metric and row["form"] == f"made:{form}":
            made[row["of"]] = row["value"]
        elif row["metric"] == metric and row["form"] == f"end:{form}":
            end[row["of"]] = row["value"]
    return {age: (was, end[age]) for age, was in made.items() if age in end}


def retention(result: Mapping[str, Any], metric: str = "efficacy", form: str = "strict") -> dict[str, float]:
    """By age of edit: what holds at the end over what held when it was made; above 1 it has grown.

    Ages of which nothing held when made are left out.
    """
    return {age: end / was for age, (was, end) in by_age(result, metric, form).items() if was}


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Whose point no other one matches in both coordinates and beats in one; higher is better."""
    return [
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a > x or b > y) for other, (a, b) in points.items() if other != name)
    ]
