"""Summary of the claims and whether the runs support them."""

from __future__ import annotations

import math

from report_page import Section
from report_runs import (
    OURS,
    Run,
    best_of_sweep,
    by_label,
    by_stream,
    oldest,
    oldest_retained,
    oldest_success,
    points_of,
    spread_of,
    whole,
)

from rlsedit_fast.baselines import RULES
from rlsedit_fast.evaluation.figures import pareto
from rlsedit_fast.evaluation.runs import value


def verdicts(experiments: dict[str, list[Run]]) -> Section:
    """Summary of the claims and whether the runs support them."""
    groups = by_label(experiments["rules"])
    # Variants of a rule, such as with protected prompts, are in the tables but not compared here.
    points = {label: point for label, point in points_of(groups).items() if label in RULES}
    front = pareto(points)
    text: list[str] = []
    if OURS in points:
        x, y = points[OURS]
        above = [name for name, (a, b) in points.items() if a >= x and b >= y and (a > x or b > y)]
        text.append(
            f"**Efficacy against specificity** (strict, after the whole stream): `{OURS}` at {x:.3f} and {y:.3f} "
            + (
                f"is on the Pareto front ({', '.join(front)})."
                if OURS in front
                else f"is worse in both than {', '.join(above)}; the Pareto front is {', '.join(front)}."
            )
        )
        scores = {name: spread_of(runs, "score", "strict") for name, runs in groups.items() if name in points}
        ranked = sorted(((s.mean, name) for name, s in scores.items() if s), reverse=True)
        place = next(at for at, (_, name) in enumerate(ranked, 1) if name == OURS)
        text.append(
            "**Harmonic mean of strict efficacy, generalization and specificity**: "
            + ", ".join(f"{name} {score:.3f}" for score, name in ranked[:5])
            + (f"; `{OURS}` is ranked {place} of {len(ranked)}." if place > 5 else ".")
        )
    kept = {name: oldest_retained(runs) for name, runs in groups.items()}
    rules_alone = {name: found for name, found in kept.items() if name in RULES and whole(groups[name])}
    known = {name: found for name, found in rules_alone.items() if found is not None}
    if OURS in known:
        best = max(known, key=lambda name: known[name].mean)
        gap = known[best].mean - known[OURS].mean
        alike = [name for name in known if name != OURS and known[name].mean == known[OURS].mean]
        allowed = max(d for d in (known[best].deviation, known[OURS].deviation, 0.0) if not math.isnan(d))
        text.append(
            f"**Retention of the {oldest(groups[OURS])} edits**: `{OURS}` {known[OURS]}, "
            + (
                "the best" + (f", with {', '.join(alike)}." if alike else ".")
                if known[OURS].mean == known[best].mean
                else f"the best is {best} with {known[best]}: "
                f"{'within' if gap <= allowed else 'not within'} one standard deviation ({allowed:.3f})."
            )
        )
        success = {name: oldest_success(groups[name]) for name in known}
        most = max(success, key=lambda name: now.mean if (now := success[name][1]) else 0.0)
        both = [
            f"`{name}` states {success[name][1]} at the end and stated {success[name][0]} right after the edits"
            for name in dict.fromkeys((OURS, best))
        ]
        text.append(
            f"**Of the {oldest(groups[OURS])} edits**, {'; '.join(both)}. Retention counts only initially successful "
            f"edits; of all of them, `{most}` states the most at the end."
        )
    if experiments.get("sweep"):
        for stream, swept in by_stream(experiments["sweep"]).items():
            best_swept, calibrated = best_of_sweep(swept)
            gap = best_swept[0] - calibrated
            text.append(
                f"**The calibrated lam and mu** score {calibrated:.3f} on the {stream} stream; the "
                f"best of the sweep ({best_swept[1]}) {best_swept[0]:.3f}: "
                f"{'within' if gap <= 0.02 else 'not within'} two points."
            )
    over = [
        run["plan"]["label"]
        for runs in experiments.values()
        for run in runs
        for metric in ("deviation", "anchors")
        for row in run["rows"]
        if row["metric"] == metric and row["form"] == "bound"
        for measured in [value(run, metric, "measured", of=row["of"], edits=row["edits"])]
        if measured is not None and measured > row["value"] * (1 + 1e-5)
    ]
    text.append(
        "**Bounds**: "
        "" + ("no measured deviation exceeds its bound." if not over else f"exceeded in {len(over)} measurements!")
    )
    if missing := [rule for rule in RULES if rule not in groups]:
        text.append(f"**Missing runs**: {', '.join(missing)}; nothing is claimed about them.")
    if few := [f"{label} {len(runs)}" for label, runs in groups.items() if label in RULES and len(runs) < 3]:
        text.append(f"Fewer than three seeds of: {', '.join(few)}.")
    broken = sorted({run["plan"]["label"] for runs in experiments.values() for run in runs if run["failed"]})
    if broken:
        text.append(f"Failed streams, which are on no Pareto front: {', '.join(broken)}.")
    return Section("Summary", text)
