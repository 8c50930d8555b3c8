"""The report of a folder of results of `bench/paper.py`: one page of HTML with its charts in it, and Markdown.

    python bench/report.py bench/results/paper/demo

writes `report.html` and `report.md` beside the results. Every figure is computed from the files; what could not be
computed, since its runs are not there, is left out and named.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charts import Series, lines, scatter

from rlsedit_fast.evaluation.figures import Spread, over_seeds, pareto, retention, spread
from rlsedit_fast.evaluation.grounds import DEMO
from rlsedit_fast.evaluation.runs import value
from rlsedit_fast.rules import RULES

OURS = "rls"
SHOWN_IN_LINES = ("rls", "memit", "memit-history", "alphaedit", "rome", "emmet")
"""Whose lines are drawn where a line for everyone would hide everyone."""

FAR = 0.25
"""From the best in either direction: a rule beyond is told in words, or it would press all others together."""

Run = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table; cells of numbers are right-aligned, the row of `OURS` is marked."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, tables and charts."""

    title: str
    parts: Sequence[str | Table | tuple[str, str]]  # text; table; (SVG, what it shows)


def load(folder: Path) -> dict[str, list[Run]]:
    """The runs by experiment, the folder that their files lie in."""
    found: dict[str, list[Run]] = defaultdict(list)
    for path in sorted(folder.glob("*/*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in run and "plan" in run:
            found[path.parent.name].append(run)
    return found


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
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


def build(experiments: dict[str, list[Run]]) -> list[Section]:
    """The sections, in order; an experiment without runs is named in the last one."""
    made: list[tuple[str, Callable[[list[Run]], Section]]] = [
        ("rules", rules),
        ("rules", ages),
        ("sweep", sweep),
        ("rules", bounds),
        ("orders", orders),
        ("hard", hard),
        ("batches", batches),
        ("rules", capability),
        ("rules", costs),
        ("tuning", tuning),
    ]
    sections = [make(experiments[name]) for name, make in made if experiments.get(name)]
    lacking = sorted({name for name, _ in made if not experiments.get(name)})
    if experiments.get("rules"):
        sections.insert(0, verdicts(experiments))
    sections.append(how(experiments, lacking))
    return sections


def _figure(runs: Sequence[Run], metric: str, form: str, of: str = "all") -> str:
    found = over_seeds(runs, metric, form, of=of)
    return "–" if found is None else _text(found)


def _text(found: Spread) -> str:
    return f"{found.mean:.3f}" if found.runs < 2 else f"{found.mean:.3f} ± {found.deviation:.3f}"


def _mean(runs: Sequence[Run], metric: str, form: str) -> float:
    found = over_seeds(runs, metric, form)
    return math.nan if found is None else found.mean


def _first_hundred(runs: Sequence[Run]) -> Spread | None:
    kept = [retention(run) for run in runs]
    return spread([next(iter(one.values())) if one else None for one in kept])


def _whole(runs: Sequence[Run]) -> bool:
    return all(run["failed"] is None for run in runs)


def _points(groups: dict[str, list[Run]]) -> dict[str, tuple[float, float]]:
    return {
        label: (_mean(runs, "efficacy", "strict"), _mean(runs, "neighbors", "strict"))
        for label, runs in groups.items()
        if _whole(runs)
    }


def verdicts(experiments: dict[str, list[Run]]) -> Section:
    """What was to be shown, and whether it was."""
    groups = by_label(experiments["rules"])
    # A form of the rule, such as with prompts protected, is no other rule: it is in the tables, and not weighed here.
    points = {label: point for label, point in _points(groups).items() if label in RULES}
    front = pareto(points)
    told: list[str] = []
    if OURS in points:
        x, y = points[OURS]
        above = [name for name, (a, b) in points.items() if a >= x and b >= y and (a > x or b > y)]
        told.append(
            f"**Efficacy against specificity** (strict, after the whole stream): `{OURS}` at {x:.3f} and {y:.3f} "
            + (
                f"is on the front of those that nobody beats in both ({', '.join(front)})."
                if OURS in front
                else f"is beaten in both by {', '.join(above)}; the front is {', '.join(front)}."
            )
        )
        scores = {name: over_seeds(runs, "score", "strict") for name, runs in groups.items() if _whole(runs)}
        ranked = sorted(((s.mean, name) for name, s in scores.items() if s), reverse=True)
        place = next(at for at, (_, name) in enumerate(ranked, 1) if name == OURS)
        told.append(
            "**Harmonic mean of strict efficacy, generalization and specificity**: "
            + ", ".join(f"{name} {score:.3f}" for score, name in ranked[:5])
            + (f"; `{OURS}` is number {place} of {len(ranked)}." if place > 5 else ".")
        )
    kept = {name: _first_hundred(runs) for name, runs in groups.items()}
    rules_alone = {name: found for name, found in kept.items() if name in RULES and _whole(groups[name])}
    known = {name: found for name, found in rules_alone.items() if found is not None}
    if OURS in known:
        best = max(known, key=lambda name: known[name].mean)
        gap = known[best].mean - known[OURS].mean
        allowed = max(d for d in (known[best].deviation, known[OURS].deviation, 0.0) if not math.isnan(d))
        told.append(
            f"**Retention of the first hundred edits**: `{OURS}` {_text(known[OURS])}, the best is {best} with "
            f"{_text(known[best])}: "
            + (
                "the best."
                if best == OURS
                else f"{'within' if gap <= allowed else 'not within'} one deviation of it ({allowed:.3f})."
            )
        )
    if experiments.get("sweep"):
        for stream, swept in by_stream(experiments["sweep"]).items():
            best_swept, calibrated = _swept(swept)
            gap = best_swept[0] - calibrated
            told.append(
                f"**The calibrated lam and mu**, fixed in advance, score {calibrated:.3f} on the {stream} stream; the "
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
    told.append(
        "**Bounds**: " + ("no measured deviation exceeds its bound." if not over else f"exceeded in {len(over)} looks!")
    )
    if lacking := [rule for rule in RULES if rule not in groups]:
        told.append(f"**Not all runs are there**: none of {', '.join(lacking)}, so this says nothing about them.")
    if few := [f"{label} {len(runs)}" for label, runs in groups.items() if label in RULES and len(runs) < 3]:
        told.append(f"Fewer than three seeds of: {', '.join(few)}.")
    broken = sorted({run["plan"]["label"] for runs in experiments.values() for run in runs if run["failed"]})
    if broken:
        told.append(f"Streams that broke off, and so are on no front: {', '.join(broken)}.")
    return Section("In short", told)


def rules(runs: list[Run]) -> Section:
    """(a)"""
    groups = by_label(runs)
    plan = runs[0]["plan"]
    points = _points(groups)
    front = pareto(points)
    series, outside = [], []
    corner = [max(point[axis] for point in points.values()) for axis in (0, 1)] if points else []
    for label, point in points.items():
        if any(best - place > FAR for best, place in zip(corner, point, strict=True)):
            outside.append(f"{label} ({point[0]:.2f}, {point[1]:.2f})")
            continue
        x, y = (over_seeds(groups[label], metric, "strict") for metric in ("efficacy", "neighbors"))
        assert x is not None
        assert y is not None
        colour = "ours" if label == OURS else "near" if label in front else "other"
        series.append(Series(label, [(x.mean, y.mean, y.deviation)], colour, x_deviations=(x.deviation,)))
    chart = scatter(
        series, x="efficacy, strict", y="specificity: neighbours unchanged", front=[points[name] for name in front]
    )
    columns = [
        ("efficacy", "efficacy", "strict"),
        ("forced", "efficacy", "forced"),
        ("free", "efficacy", "free"),
        ("generalization", "generalization", "strict"),
        ("forced", "generalization", "forced"),
        ("free", "generalization", "free"),
        ("neighbours unchanged", "neighbors", "strict"),
        ("forced", "neighbors", "forced"),
        ("rebuilt neighbours", "rebuilt", "strict"),
        ("namesakes", "namesakes", "strict"),
        ("other facts", "same_subject", "strict"),
        ("multi-hop", "multihop", "strict"),
        ("multi-hop, free", "multihop", "free"),
        ("score", "score", "strict"),
    ]
    columns = [column for column in columns if any(over_seeds(g, *column[1:]) for g in groups.values())]
    rows = [
        [label + ("" if _whole(group) else " (broke off)")]
        + [_figure(group, metric, form) for _, metric, form in columns]
        for label, group in groups.items()
    ]
    note = (
        "Strict: every token of the answer ranked first; unchanged: the prediction is the one before any edit. Forced: "
        "by comparing the NLL of the new and the old answer. Free: the greedy continuation is the answer "
        "and then ends. "
        "Score: harmonic mean of the three strict shares."
    )
    if any(column[1] == "rebuilt" for column in columns):
        note += " Rebuilt neighbours: unedited subjects of other records with the same question and answer."
    if any(column[1] == "multihop" for column in columns):
        note += (
            " Multi-hop: share of chains of facts of which any wording of the question is answered right, as MQuAKE "
            "counts them."
        )
    seeds = sorted({run["plan"]["seed"] for run in runs})
    intro = (
        f"{plan['edits']} edits in batches of {plan['config']['batch_size']}, after the last of them; mean ± deviation "
        f"over seeds {', '.join(map(str, seeds))} (other cases and anchors each); {plan['judged'] or plan['edits']} "
        "cases asked. Values, keys, masters and prior are shared, so that rows differ in the rule and its "
        "settings alone."
    )
    what = (
        "Up and to the right is better. Bars are deviations over seeds; the line joins those that nobody beats in both."
    )
    if outside:
        what += f" Further off than the chart reaches: {', '.join(outside)}."
    return Section("Rules side by side", [intro, (chart, what), Table(["rule", *(c[0] for c in columns)], rows, note)])


def ages(runs: list[Run]) -> Section:
    """(f)"""
    groups = {label: group for label, group in by_label(runs).items() if _whole(group)}
    series, rows = [], []
    for label, group in groups.items():
        by_age: dict[str, list[float | None]] = defaultdict(list)
        for run in group:
            for age, share in retention(run).items():
                by_age[age].append(share)
        found = {age: spread(shares) for age, shares in by_age.items()}
        points = [(_middle(age), s.mean, s.deviation) for age, s in found.items() if s is not None]
        if points and label in SHOWN_IN_LINES:
            series.append(Series(label, sorted(points), _colour(label)))
        whole = [s for s in found.values() if s is not None]
        if whole:
            first, last = whole[0], whole[-1]
            middle = whole[len(whole) // 2]
            rows.append([label, _text(first), _text(middle), _text(last)])
    chart = lines(series, x="number of the edit", y="retained: at the end / when made")
    note = "Share of strict efficacy at the end against when the edits were made; the last hundred have no later ones."
    return Section(
        "Early edits",
        [(chart, "Retention by age."), Table(["rule", "first hundred", "middle", "last hundred"], rows, note)],
    )


def _middle(age: str) -> float:
    first, last = map(int, age.split("-"))
    return (first + last) / 2


_FACTORS = re.compile(r"mu x([\d.]+) lam x([\d.]+)")


def _swept(runs: Sequence[Run]) -> tuple[tuple[float, str], float]:
    scores = {at: _mean(group, "score", "strict") for at, group in _by_factors(runs).items() if _whole(group)}
    best = max(scores, key=lambda at: scores[at])
    return (scores[best], f"mu x{best[0]:g}, lam x{best[1]:g}"), scores[1.0, 1.0]


def sweep(runs: list[Run]) -> Section:
    """(b)"""
    streams = by_stream(runs)
    found = _by_factors(next(iter(streams.values())))
    mus, lams = sorted({mu for mu, _ in found}), sorted({lam for _, lam in found})
    along = [
        Series(name, [(x, _mean(found[at(x)], *what), math.nan) for x in axis if at(x) in found], colour, dashed)
        for name, axis, at, what, colour, dashed in (
            ("mu: score", mus, lambda x: (x, 1.0), ("score", "strict"), "ours", False),
            ("lam: score", lams, lambda x: (1.0, x), ("score", "strict"), "near", False),
            ("mu: efficacy", mus, lambda x: (x, 1.0), ("efficacy", "strict"), "ours", True),
            ("mu: specificity", mus, lambda x: (x, 1.0), ("neighbors", "strict"), "fourth", True),
        )
    ]
    chart = lines(along, x="factor on the calibrated value", y="share", log_x=True)
    what = f"One of the two varied, the other calibrated, on the {next(iter(streams))} stream."
    return Section("lam and mu over four decades", [(chart, what), *map(_sweep_table, streams.items())])


def _by_factors(runs: Sequence[Run]) -> dict[tuple[float, float], list[Run]]:
    found = {}
    for label, group in by_label(runs).items():
        mu, lam = map(float, _FACTORS.search(label).groups())  # type: ignore[union-attr]
        found[mu, lam] = group
    return found


def _sweep_table(of: tuple[str, list[Run]]) -> Table:
    stream, runs = of
    found = _by_factors(runs)
    mus, lams = sorted({mu for mu, _ in found}), sorted({lam for _, lam in found})
    rows = []
    for mu in mus:
        row = [f"mu ×{mu:g}"]
        for lam in lams:
            shown = "–"
            if (mu, lam) in found:
                shown = f"{_mean(found[mu, lam], 'score', 'strict'):.3f}"
                shown = f"[{shown}]" if mu == lam == 1 else shown
            row.append(shown)
        rows.append(row)
    plan = runs[0]["plan"]
    note = (
        f"Strict score on the {stream} stream after {plan['edits']} edits, seed {plan['seed']}. "
        "In brackets: calibrated, fixed in advance."
    )
    return Table(["", *(f"lam ×{x:g}" for x in lams)], rows, note)


def bounds(runs: list[Run]) -> Section:
    """(e)"""
    ours = [run for run in runs if run["plan"]["label"] == OURS]
    layers = sorted({row["of"] for run in ours for row in run["rows"] if row["metric"] == "deviation"})
    rows, series = [], []
    for metric, what in (("deviation", "‖W − W0‖"), ("anchors", "‖K0 (W − W0)ᵀ‖")):
        for layer in layers:
            marks = sorted(
                {r["edits"] for run in ours for r in run["rows"] if r["metric"] == metric and r["of"] == layer}
            )
            for edits in marks:
                measured, bound = (
                    spread([value(run, metric, form, of=layer, edits=edits) for run in ours])
                    for form in ("measured", "bound")
                )
                if measured and bound:
                    share = f"{measured.mean / bound.mean:.2f}"
                    rows.append([what, layer, str(edits), f"{measured.mean:.2f}", f"{bound.mean:.2f}", share])
            if layer == layers[0]:
                for form, dashed in (("measured", False), ("bound", True)):
                    points = [
                        (float(edits), s.mean, s.deviation)
                        for edits in marks
                        if (s := spread([value(run, metric, form, of=layer, edits=edits) for run in ours]))
                    ]
                    if points:
                        series.append(
                            Series(f"{what} {form}", points, "ours" if metric == "deviation" else "near", dashed)
                        )
    chart = lines(series, x="edits", y="norm", least=0.0)
    note = "The bounds are sqrt(J)/lam and sqrt(J)/mu, known while editing, from the objective; no other rule has one."
    head = ["", "layer", "edits", "measured", "bound", "measured / bound"]
    return Section(
        "Bound against measured deviation", [(chart, "Solid: measured; dashed: bound."), Table(head, rows, note)]
    )


def orders(runs: list[Run]) -> Section:
    """(c)"""
    rows = []
    for label, group in by_label(runs).items():
        columns = [("efficacy", "strict"), ("generalization", "strict"), ("neighbors", "strict"), ("score", "strict")]
        rows.append([label, str(len(group)), *(_figure(group, *column) for column in columns)])
    note = "The same cases of one seed in different orders: the deviation is what the order alone does."
    head = ["rule", "orders", "efficacy", "generalization", "neighbours unchanged", "score"]
    return Section("Orders of one stream", [Table(head, rows, note)])


_STREAMS = {
    "conflicting": "Every fact is told twice, the second time with another target.",
    "related": "All four facts of each person: their keys are nearly one.",
}


def hard(runs: list[Run]) -> Section:
    """(d)"""
    parts: list[str | Table | tuple[str, str]] = [
        "Only the recursive rule can take an edit back. As `rls` an edit that asks what an earlier one asks takes its "
        "place, and the facts of one subject share a value; `separate` is how every other rule must do it. "
        "`forgetting` gives each hundred edits 1/0.7 times the weight of the hundred before."
    ]
    for stream, what in _STREAMS.items():
        groups = by_label([run for run in runs if run["plan"]["stream"] == stream])
        rows = []
        for label, group in groups.items():
            columns = [("efficacy", "strict"), ("generalization", "strict"), ("neighbors", "strict")]
            row = [label, *(_figure(group, *column) for column in columns)]
            if stream == "conflicting":
                row.append(_figure(group, "superseded", "strict"))
            rows.append(row)
        head = ["rule", "efficacy", "generalization", "neighbours unchanged"]
        head += ["first target still said"] if stream == "conflicting" else []
        edits = next(iter(groups.values()))[0]["plan"]["edits"] if groups else 0
        parts.append(Table(head, rows, f"{what} {edits} edits, one seed."))
    return Section("Conflicting and related edits", parts)


def batches(runs: list[Run]) -> Section:
    rows = []
    for size in sorted({run["plan"]["config"]["batch_size"] for run in runs}):
        for label, group in by_label([r for r in runs if r["plan"]["config"]["batch_size"] == size]).items():
            columns = [
                ("efficacy", "strict"),
                ("generalization", "strict"),
                ("neighbors", "strict"),
                ("score", "strict"),
            ]
            rows.append([label, str(size), *(_figure(group, *column) for column in columns)])
    note = f"{runs[0]['plan']['edits']} edits, one seed."
    head = ["rule", "batch", "efficacy", "generalization", "neighbours unchanged", "score"]
    return Section("Batches of 1 and 100", [Table(head, rows, note)])


def capability(runs: list[Run]) -> Section:
    """(g)"""
    groups = by_label(runs)
    tasks = sorted({row["metric"] for run in runs for row in run["rows"] if row["form"] == "accuracy"})
    consistent = over_seeds(runs, "consistency", "cosine") is not None
    series, rows = [], []
    for label, group in groups.items():
        marks = sorted({row["edits"] for run in group for row in run["rows"] if row["metric"] == "kl"})
        points = [
            (float(edits), s.mean, s.deviation)
            for edits in marks
            if (s := spread([value(run, "kl", "text", of="text", edits=edits) for run in group]))
        ]
        if label in SHOWN_IN_LINES and len(points) > 1:
            series.append(Series(label, points, _colour(label)))
        start = spread([value(run, "perplexity", "text", of="text", edits=0) for run in group])
        end = over_seeds(group, "perplexity", "text", of="text")
        moved = spread(
            [
                value(run, "deviation", "measured", of=f"layer {layer}")
                for run in group
                for layer in [run["plan"]["config"]["layers"][0] if run["plan"]["config"]["layers"] else 0]
            ]
        )
        rows.append(
            [
                label,
                _figure(group, "kl", "text", of="text"),
                f"{start.mean:.1f} → {end.mean:.1f}" if start and end else "–",
                _figure(group, "fluency", "entropy"),
                *([_figure(group, "consistency", "cosine")] if consistent else []),
                f"{moved.mean:.1f}" if moved else "–",
                *(_task(group, task) for task in tasks),
            ]
        )
    chart = lines(series, x="edits", y="KL to the base model, nats per token", least=0.0)
    note = (
        "On text that is about no edit and not among the anchors. Fluency: weighted 2- and 3-gram entropy, bits. "
        "Tasks: accuracy by likelihood, with its standard error."
    )
    if consistent:
        note += " Consistency: cosine of TF-IDF vectors of what is written about subjects and of reference texts."
    if not tasks:
        note += " GLUE and MMLU were not asked."
        if runs[0]["ground"] == DEMO:
            note += " The model's vocabulary has no words for them."
    head = ["rule", "KL, nats", "perplexity", "fluency", *(["consistency"] if consistent else []), "‖W − W0‖", *tasks]
    return Section("Capability", [(chart, "How far predictions on unrelated text move."), Table(head, rows, note)])


def _task(group: Sequence[Run], task: str) -> str:
    found = over_seeds(group, task, "accuracy", of="task")
    error = over_seeds(group, task, "error", of="task")
    return "–" if found is None or error is None else f"{found.mean:.3f} ± {error.mean:.3f}"


def costs(runs: list[Run]) -> Section:
    groups = by_label(runs)
    rows, series = [], []
    for label, group in groups.items():
        laps = [run["seconds_per_batch"] for run in group if run["failed"] is None]
        if not laps:
            continue
        tenth = max(1, len(laps[0]) // 10)
        # The first batch of each call carries the search of the values of all; medians are of the others.
        early = statistics.median(lap for run in laps for lap in run[: 2 * tenth])
        late = statistics.median(lap for run in laps for lap in run[-2 * tenth :])
        rate = spread([run["made"] / run["seconds_editing"] for run in group])
        rows.append(
            [
                label,
                f"{rate.mean:.1f}" if rate else "–",
                f"{1e3 * early:.0f}",
                f"{1e3 * late:.0f}",
                f"{late / early:.2f}",
            ]
        )
        if label in SHOWN_IN_LINES:
            parts = [
                (
                    float(at + tenth / 2),
                    1e3 * statistics.median(lap for run in laps for lap in run[at : at + tenth]),
                    math.nan,
                )
                for at in range(0, len(laps[0]) - tenth + 1, tenth)
            ]
            series.append(Series(label, parts, _colour(label)))
    chart = lines(series, x="number of the batch", y="ms per batch, median", least=0.0)
    note = (
        "Milliseconds of the write of a batch (keys read, solve, weights), without the search of the values, which is "
        "the same for all; early and late: medians of the first and last fifth. The runs shared a busy machine: read "
        "ratios, not times."
    )
    head = ["rule", "edits/s with values", "early, ms", "late, ms", "late / early"]
    return Section("Cost of a batch against history", [(chart, "By the number of the batch."), Table(head, rows, note)])


def tuning(runs: list[Run]) -> Section:
    rows = []
    best: dict[str, tuple[float, str]] = {}
    for run in runs:
        rule, config = run["plan"]["config"]["rule"], run["plan"]["config"]
        score = value(run, "score", "strict") if run["failed"] is None else None
        key = run["plan"]["label"]
        if score is not None and score > best.get(rule, (-1.0, ""))[0]:
            best[rule] = (score, key)
        chosen = {k: v for k, v in config["rule_options"].items()}
        chosen |= {"lam": config["lam"]} if config["lam"] is not None else {}
        chosen |= {"adherence": config["adherence"]} if config["lam"] is not None else {"moment ridge": config["ridge"]}
        rows.append((rule, key, ", ".join(f"{k} {v:g}" for k, v in chosen.items()), run, score))
    shown = []
    for rule, key, settings, run, score in sorted(rows, key=lambda row: (row[0], row[1])):
        mark = " ←" if best.get(rule, (0, ""))[1] == key else ""
        figures = [_figure([run], metric, "strict") for metric in ("efficacy", "generalization", "neighbors")]
        shown.append([rule, settings + mark, *figures, "broke off" if score is None else f"{score:.3f}"])
    plan = runs[0]["plan"]
    note = f"{plan['edits']} edits of seed {plan['seed']}, which is not reported elsewhere; ← the one that was taken."
    intro = (
        "The other rules are tuned on this grid by the strict score. `adherence` finds the moment weight "
        "mu² by a rule's "
        "own scale, lam is 0 as published; a published number that goes with the scale of another model's "
        "keys (AlphaEdit's "
        "threshold and ridge, UltraEdit's rate, fine-tuning's bound) is looked for over some decades; a "
        "rule that is not "
        "listed has nothing to set, or was taken as published. The recursive rule is not tuned: "
    )
    if runs[0]["ground"] == DEMO:
        intro += "it has the demo's adherence, which was chosen before the other rules were there, on seed 0's stream."
    else:
        intro += "it has the default adherence."
    head = ["rule", "settings", "efficacy", "generalization", "neighbours unchanged", "score"]
    return Section("How the other rules were set", [intro, Table(head, shown, note)])


def how(experiments: dict[str, list[Run]], lacking: Sequence[str]) -> Section:
    runs = [run for group in experiments.values() for run in group]
    text = [
        f"{len(runs)} runs, {sum(run['seconds_run'] for run in runs) / 60:.0f} minutes of one thread on a "
        f"shared machine."
    ]
    for machine, versions, made in dict.fromkeys((_machine(run), _versions(run), run["date"]) for run in runs):
        text.append(f"{made}: {machine}; {versions}.")
    if runs:
        text.append(f"Model: {runs[0]['ground']}.")
    if lacking:
        text.append(f"No runs of: {', '.join(lacking)}.")
    return Section("How it was taken", text)


def _machine(run: Run) -> str:
    return f"{run['machine']['system']}, {run['machine']['cpu']}"


def _versions(run: Run) -> str:
    return ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)


def _colour(label: str) -> str:
    fixed = {"rls": "ours", "memit": "near", "alphaedit": "third", "memit-history": "fourth", "rome": "fifth"}
    return fixed.get(label, "other")


def markdown(title: str, sections: Sequence[Section]) -> str:
    made = [f"# {title}", ""]
    for section in sections:
        made += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Table):
                made += ["| " + " | ".join(part.head) + " |", "|" + "---|" * len(part.head)]
                made += ["| " + " | ".join(row) + " |" for row in part.rows]
                made += ["", *([part.note, ""] if part.note else [])]
            elif isinstance(part, str):
                made += [part, ""]
    return "\n".join(made)


def page(title: str, sections: Sequence[Section]) -> str:
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, Table):
                body.append(_html_table(part))
            elif isinstance(part, str):
                body.append(f"<p>{_inline(part)}</p>")
            else:
                svg, what = part
                body.append(f"<figure>{svg}<figcaption>{html.escape(what)}</figcaption></figure>")
        body.append("</section>")
    return _PAGE.replace("{title}", html.escape(title)).replace("{body}", "\n".join(body))


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = []
    for row in table.rows:
        mark = ' class="mark"' if row[0] == OURS else ""
        rows.append(f"<tr{mark}>" + "".join(map(_cell, row)) + "</tr>")
    note = f'<p class="note">{_inline(table.note)}</p>' if table.note else ""
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'


def _cell(cell: str) -> str:
    numeric = re.match(r"[–\d\[.-]", cell) is not None
    return f"<td>{html.escape(cell)}</td>" if numeric else f'<td class="text">{html.escape(cell)}</td>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5d6770; --rule: #d8dde1; --page: #fcfcfb; --mark: #eef4fb;
  --ours: #1264b3; --near: #b3541e; --third: #2e7d4f; --fourth: #7a4bb0; --fifth: #a8801a; --other: #7d868e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3adb5; --rule: #3a4249; --page: #15191c;
  --mark: #1b2a3a; --ours: #6db3f2; --near: #f0975c; --third: #6cc793; --fourth: #b998ea; --fifth: #dcb752;
  --other: #8f99a1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { max-width: 46rem; } .note, figcaption { color: var(--soft); font-size: .875rem; }
code { font-size: .92em; } figure { margin: 1rem 0; max-width: 46rem; }
svg { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; white-space: normal; }
td.text { text-align: left; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tr.mark td { background: var(--mark); font-weight: 600; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } svg .name { font-size: 13px; }
svg .label { fill: var(--c); font-weight: 600; } svg .line { fill: none; stroke: var(--c); stroke-width: 2; }
svg .dot { fill: var(--c); } svg .bar { stroke: var(--c); stroke-width: 1.2; opacity: .6; fill: none; }
svg .grid { stroke: var(--rule); fill: none; } svg .front { stroke: var(--soft); stroke-dasharray: 2 4; fill: none; }
.ours { --c: var(--ours); } .near { --c: var(--near); } .third { --c: var(--third); } .fourth { --c: var(--fourth); }
.fifth { --c: var(--fifth); } .other { --c: var(--other); }
@media (max-width: 40rem) { svg text { font-size: 17px; } svg .name { font-size: 18px; } }
</style></head><body>
{body}
</body></html>
"""


def write(folder: Path) -> list[Path]:
    """Writes both reports beside the results."""
    experiments = load(folder)
    if not experiments:
        raise SystemExit(f"{folder}: no result files in it; make some with bench/paper.py")
    name = next(iter(experiments.values()))[0]["ground"]
    title = f"Write rules on the {name} model"
    sections = build(experiments)
    paths = [folder / "report.html", folder / "report.md"]
    paths[0].write_text(page(title, sections), encoding="utf-8")
    paths[1].write_text(markdown(title, sections), encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of results, such as bench/results/paper/demo")
    for path in write(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
