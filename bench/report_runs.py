"""Groups the runs of a report and formats their figures."""

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
    """Groups runs by label, the recursive rule first."""
    made: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        made[run["plan"]["label"]].append(run)
    return dict(sorted(made.items(), key=lambda item: (not item[0].startswith(OURS), item[0])))


def by_stream(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups runs by stream, the plain one first."""
    made: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run["plan"]["stream"] != "plain", run["plan"]["stream"])):
        made[run["plan"]["stream"]].append(run)
    return made


def spread_of(
    runs: Sequence[Run], metric: str, form: str, *, of: str = "all", edits: int | None = None
) -> Spread | None:
    """Returns mean and deviation of a metric over runs, at the end or after `edits`; None if no run has it."""
    return spread([value(run, metric, form, of=of, edits=edits) for run in runs])


def figure(runs: Sequence[Run], metric: str, form: str, of: str = "all") -> str:
    return str(spread_of(runs, metric, form, of=of) or "–")


def mean(runs: Sequence[Run], metric: str, form: str) -> float:
    found = spread_of(runs, metric, form)
    return math.nan if found is None else found.mean


STRICT = {
    "efficacy": "efficacy",
    "generalization": "generalization",
    "neighbors": "neighbors unchanged",
    "score": "score",
}
"""Column titles of strict metrics."""


def strict(runs: Sequence[Run], *, score: bool = True) -> list[str]:
    """Returns the cells of the columns of `STRICT`, with or without the score."""
    return [figure(runs, metric, "strict") for metric in STRICT if score or metric != "score"]


def strict_heads(*, score: bool = True) -> list[str]:
    return [name for metric, name in STRICT.items() if score or metric != "score"]


def oldest(runs: Sequence[Run]) -> str:
    """Returns the name of the oldest edits, such as "first hundred"."""
    ages = [age for run in runs for age in list(by_age(run))[:1]]
    last = int(ages[0].split("-")[1]) if ages else 100
    return "first hundred" if last == 100 else f"first {last}"


def oldest_retained(runs: Sequence[Run]) -> Spread | None:
    """Returns the retention of the oldest edits; runs in which none of them succeeded initially are ignored."""
    return spread([now / was if was else None for run in runs for was, now in list(by_age(run).values())[:1]])


def oldest_success(runs: Sequence[Run]) -> tuple[Spread | None, Spread | None]:
    """Returns strict efficacy of the oldest edits right after editing and at the end."""
    pairs = [next(iter(by_age(run).values()), (None, None)) for run in runs]
    return spread([was for was, _ in pairs]), spread([now for _, now in pairs])


def whole(runs: Sequence[Run]) -> bool:
    """Returns whether all streams completed."""
    return all(run["failed"] is None for run in runs)


def points_of(groups: dict[str, list[Run]]) -> dict[str, tuple[float, float]]:
    """Returns strict efficacy and specificity of the groups whose streams all completed."""
    return {
        label: (mean(runs, "efficacy", "strict"), mean(runs, "neighbors", "strict"))
        for label, runs in groups.items()
        if whole(runs)
    }


def taken(tried: Sequence[Run]) -> int:
    """Returns the index of the selected run of a tuning grid: highest strict score, ties resolved toward the middle.

    Failed streams have no score.
    """
    scores = [None if run["failed"] else value(run, "score", "strict") for run in tried]
    middle = (len(tried) - 1) / 2
    return max(range(len(tried)), key=lambda i: (-1.0 if scores[i] is None else scores[i], -abs(i - middle)))


_FACTORS = re.compile(r"mu x([\d.]+) lam x([\d.]+)")


def by_factors(runs: Sequence[Run]) -> dict[tuple[float, float], list[Run]]:
    """Groups the runs of a sweep by the factors on mu and lam in their labels."""
    found = {}
    for label, group in by_label(runs).items():
        mu, lam = map(float, _FACTORS.search(label).groups())  # type: ignore[union-attr]
        found[mu, lam] = group
    return found


def best_of_sweep(runs: Sequence[Run]) -> tuple[tuple[float, str], float]:
    """Returns the best score with its factors, and the score of the calibrated lam and mu."""
    scores = {at: mean(group, "score", "strict") for at, group in by_factors(runs).items() if whole(group)}
    best = max(scores, key=lambda at: scores[at])
    return (scores[best], f"mu x{best[0]:g}, lam x{best[1]:g}"), scores[1.0, 1.0]
