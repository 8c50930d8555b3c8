"""Runs of a report in groups, and figures of a group as text."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rlsedit_fast.evaluation.figures import Spread, by_age, spread
from rlsedit_fast.evaluation.runs import value

OURS = "rls"

Run = dict[str, Any]


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The recursive rule first."""
    made: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        made[run["plan"]["label"]].append(run)
    return dict(sorted(made.items(), key=lambda item: (not item[0].startswith(OURS), item[0])))


def by_stream(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The plain one first."""
    made: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run["plan"]["stream"] != "plain", run["plan"]["stream"])):
        made[run["plan"]["stream"]].append(run)
    return made


def spread_of(
    runs: Sequence[Run], metric: str, form: str, *, of: str = "all", edits: int | None = None
) -> Spread | None:
    """A figure over runs, at the end of what each made or after some edits; None where no run has it."""
    return spread([value(run, metric, form, of=of, edits=edits) for run in runs])


def figure(runs: Sequence[Run], metric: str, form: str, of: str = "all") -> str:
    return str(spread_of(runs, metric, form, of=of) or "–")


def mean(runs: Sequence[Run], metric: str, form: str) -> float:
    found = spread_of(runs, metric, form)
    return math.nan if found is None else found.mean


STRICT = {
    "efficacy": "efficacy",
    "generalization": "generalization",
    "neighbors": "neighbours unchanged",
    "score": "score",
}
"""What a strict figure is called at the head of a column, by metric."""


def strict(runs: Sequence[Run], *, score: bool = True) -> list[str]:
    """The cells of the columns of `STRICT`, with the score or without."""
    return [figure(runs, metric, "strict") for metric in STRICT if score or metric != "score"]


def strict_heads(*, score: bool = True) -> list[str]:
    return [name for metric, name in STRICT.items() if score or metric != "score"]


def oldest(runs: Sequence[Run]) -> str:
    """What the oldest edits are called, as "first hundred"."""
    ages = [age for run in runs for age in list(by_age(run))[:1]]
    last = int(ages[0].split("-")[1]) if ages else 100
    return "first hundred" if last == 100 else f"first {last}"


def oldest_retained(runs: Sequence[Run]) -> Spread | None:
    """Retention of the oldest edits; of runs of which none of them held when it was made, nothing."""
    return spread([now / was if was else None for run in runs for was, now in list(by_age(run).values())[:1]])


def oldest_said(runs: Sequence[Run]) -> tuple[Spread | None, Spread | None]:
    """Strict efficacy of the oldest edits when they were made, and at the end."""
    pairs = [next(iter(by_age(run).values()), (None, None)) for run in runs]
    return spread([was for was, _ in pairs]), spread([now for _, now in pairs])


def whole(runs: Sequence[Run]) -> bool:
    """Whether no stream broke off."""
    return all(run["failed"] is None for run in runs)


def points_of(groups: dict[str, list[Run]]) -> dict[str, tuple[float, float]]:
    """Strict efficacy and specificity of those whose streams went through to their ends."""
    return {
        label: (mean(runs, "efficacy", "strict"), mean(runs, "neighbors", "strict"))
        for label, runs in groups.items()
        if whole(runs)
    }


def taken(tried: Sequence[Run]) -> int:
    """Which of the runs of a rule's grid, in its order, has the settings that are taken: the highest strict score (a
    stream that broke off has none), and of equal ones the one nearest to the middle of the grid.
    """
    scores = [None if run["failed"] else value(run, "score", "strict") for run in tried]
    middle = (len(tried) - 1) / 2
    return max(range(len(tried)), key=lambda i: (-1.0 if scores[i] is None else scores[i], -abs(i - middle)))


_FACTORS = re.compile(r"mu x([\d.]+) lam x([\d.]+)")


def by_factors(runs: Sequence[Run]) -> dict[tuple[float, float], list[Run]]:
    """Runs of a sweep by the factors on mu and on lam that their labels tell."""
    found = {}
    for label, group in by_label(runs).items():
        mu, lam = map(float, _FACTORS.search(label).groups())  # type: ignore[union-attr]
        found[mu, lam] = group
    return found


def best_of_sweep(runs: Sequence[Run]) -> tuple[tuple[float, str], float]:
    """The best score with its factors, and the score of the calibrated lam and mu."""
    scores = {at: mean(group, "score", "strict") for at, group in by_factors(runs).items() if whole(group)}
    best = max(scores, key=lambda at: scores[at])
    return (scores[best], f"mu x{best[0]:g}, lam x{best[1]:g}"), scores[1.0, 1.0]
