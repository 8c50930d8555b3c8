"""The sections of a report, each of the runs of one experiment."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from charts import Series, lines, scatter
from report_page import Section, Table
from report_runs import (
    OURS,
    Run,
    by_factors,
    by_label,
    by_stream,
    figure,
    mean,
    oldest,
    oldest_said,
    points_of,
    spread_of,
    strict,
    strict_heads,
    taken,
    whole,
)

from rlsedit_fast.evaluation.ages import AGE
from rlsedit_fast.evaluation.figures import pareto, retention, spread
from rlsedit_fast.evaluation.grounds import DEMO
from rlsedit_fast.evaluation.metrics import harmonic_mean
from rlsedit_fast.evaluation.runs import value

SHOWN_IN_LINES = ("rls", "memit", "memit-history", "alphaedit", "rome", "emmet")
"""Whose lines are drawn where a line for everyone would hide everyone."""

FAR = 0.25
"""In either direction below the rule with the highest harmonic mean of both: who is further off is told in words, or
would press all others together."""


def rules(runs: list[Run]) -> Section:
    """The scores of every rule, and efficacy against specificity as a chart."""
    groups = by_label(runs)
    plan = runs[0]["plan"]
    points = points_of(groups)
    front = pareto(points)
    series, outside = [], []
    middle = max(points.values(), key=lambda point: harmonic_mean(point) or 0.0, default=(0.0, 0.0))
    for label, point in points.items():
        if any(best - place > FAR for best, place in zip(middle, point, strict=True)):
            outside.append(f"{label} ({point[0]:.2f}, {point[1]:.2f})")
            continue
        x, y = (spread_of(groups[label], metric, "strict") for metric in ("efficacy", "neighbors"))
        assert x is not None
        assert y is not None
        colour = "ours" if label == OURS else "near" if label in front else "other"
        series.append(Series(label, [(x.mean, y.mean, y.deviation)], colour, x_deviations=(x.deviation,)))
    shown = [points[one.name] for one in series if one.name in front]
    chart = scatter(series, x="efficacy, strict", y="specificity: neighbours unchanged", front=shown)
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
    columns = [column for column in columns if any(spread_of(g, *column[1:]) for g in groups.values())]
    rows = []
    for label, group in groups.items():
        through = [run for run in group if run["failed"] is None]
        told = "" if through == group else f" ({len(group) - len(through)} of {len(group)} broke off)"
        rows.append([label + told, *(figure(through or group, metric, form) for _, metric, form in columns)])
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
    seeds, on_demo = sorted({run["plan"]["seed"] for run in runs}), runs[0]["ground"] == DEMO
    intro = (
        f"{plan['edits']} edits in batches of {plan['config']['batch_size']}, after the last of them; mean ± deviation "
        f"over seeds {', '.join(map(str, seeds))}; {plan['judged'] or plan['edits']} cases asked. Every seed draws its "
        f"edits from the same {'people' if on_demo else 'records'}, so that streams share many subjects and their "
        "deviation says less than that of independent samples; "
        + ("the anchors are others. " if on_demo else "the anchors are the same. ")
        + "The search of values, the reading of keys and the masters are shared; the settings of the prior are each "
        "rule's own, as tuned."
    )
    if any("protecting" in label for label in groups):
        intro += (
            " Protecting: prompts of other neighbours, none of which is asked here, are held before the first edit, "
            "beside the anchors; rules that remember keys can be told to."
        )
    what = (
        "Up and to the right is better. Bars are deviations over seeds; the line joins those that nobody beats in both."
    )
    if outside:
        what += f" Further off than the chart reaches: {', '.join(outside)}."
    return Section("Rules side by side", [intro, (chart, what), Table(["rule", *(c[0] for c in columns)], rows, note)])


def ages(runs: list[Run]) -> Section:
    """What holds at the end of what held when it was made, by the age of the edits."""
    groups = {label: group for label, group in by_label(runs).items() if whole(group)}
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
        known = [s for s in found.values() if s is not None]
        if known:
            said = [str(share or "–") for share in oldest_said(group)]
            rows.append([label, *said, str(known[0]), str(known[len(known) // 2]), str(known[-1])])
    chart = lines(series, x="number of the edit", y="retained: at the end / when made")
    head = [
        "rule",
        f"{oldest(runs)}: said when made",
        "said at the end",
        "retained",
        "middle retained",
        "last retained",
    ]
    note = (
        "Said: strict efficacy. Retained: the share at the end of what was said when the edits were made; the last "
        "hundred have no later ones."
    )
    return Section("Early edits", [(chart, "Retention by age."), Table(head, rows, note)])


def _middle(age: str) -> float:
    first, last = map(int, age.split("-"))
    return (first + last) / 2


def sweep(runs: list[Run]) -> Section:
    """How the strict score moves with lam and mu around the calibrated ones."""
    streams = by_stream(runs)
    found = by_factors(next(iter(streams.values())))
    mus, lams = sorted({mu for mu, _ in found}), sorted({lam for _, lam in found})
    along = [
        Series(name, [(x, mean(found[at(x)], *what), math.nan) for x in axis if at(x) in found], colour, dashed)
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


def _sweep_table(of: tuple[str, list[Run]]) -> Table:
    stream, runs = of
    found = by_factors(runs)
    mus, lams = sorted({mu for mu, _ in found}), sorted({lam for _, lam in found})
    rows = []
    for mu in mus:
        row = [f"mu ×{mu:g}"]
        for lam in lams:
            shown = "–"
            if (mu, lam) in found:
                shown = f"{mean(found[mu, lam], 'score', 'strict'):.3f}"
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
    """The deviations of the recursive rule along the stream, and what bounds them."""
    ours = [run for run in runs if run["plan"]["label"] == OURS]
    layers = _layers(ours)
    rows, series = [], []
    for metric, what in (("deviation", "‖W − W0‖"), ("anchors", "‖K0 (W − W0)ᵀ‖")):
        for layer in layers:
            marks = sorted(
                {r["edits"] for run in ours for r in run["rows"] if r["metric"] == metric and r["of"] == layer}
            )
            for edits in marks:
                measured, bound = (
                    spread_of(ours, metric, form, of=layer, edits=edits) for form in ("measured", "bound")
                )
                if measured and bound:
                    share = f"{measured.mean / bound.mean:.2f}"
                    rows.append([what, layer, str(edits), f"{measured.mean:.2f}", f"{bound.mean:.2f}", share])
            if layer == layers[0]:
                for form, dashed in (("measured", False), ("bound", True)):
                    points = [
                        (float(edits), s.mean, s.deviation)
                        for edits in marks
                        if (s := spread_of(ours, metric, form, of=layer, edits=edits))
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


def _layers(runs: Sequence[Run]) -> list[str]:
    """The layers that were measured, `layer N`, the lowest first."""
    named = {row["of"] for run in runs for row in run["rows"] if row["metric"] == "deviation"}
    return sorted(named, key=lambda of: int(of.removeprefix("layer ")))


def orders(runs: list[Run]) -> Section:
    """What the order of the same edits does."""
    rows = []
    for label, group in by_label(runs).items():
        rows.append([label, str(len(group)), *strict(group)])
    note = "The same cases of one seed in different orders: the deviation is what the order alone does."
    head = ["rule", "orders", *strict_heads()]
    return Section("Orders of one stream", [Table(head, rows, note)])


_STREAMS = {
    "conflicting": "Every fact is told twice, the second time with another target.",
    "related": "All four facts of each person: their keys are nearly one.",
}


def hard(runs: list[Run]) -> Section:
    """Edits that contradict earlier ones, and edits of related facts."""
    parts: list[str | Table | tuple[str, str]] = [
        "Only the recursive rule can take an edit back. As `rls` an edit that asks what an earlier one asks takes its "
        "place, and the facts of one subject share a value; `separate` is how every other rule must do it. "
        "`forgetting` gives each hundred edits 1/0.7 times the weight of the hundred before."
    ]
    for stream, what in _STREAMS.items():
        groups = by_label([run for run in runs if run["plan"]["stream"] == stream])
        rows = []
        for label, group in groups.items():
            row = [label, *strict(group, score=False)]
            if stream == "conflicting":
                row.append(figure(group, "superseded", "strict"))
            rows.append(row)
        head = ["rule", *strict_heads(score=False)]
        head += ["first target still said"] if stream == "conflicting" else []
        edits = next(iter(groups.values()))[0]["plan"]["edits"] if groups else 0
        parts.append(Table(head, rows, f"{what} {edits} edits, one seed."))
    return Section("Conflicting and related edits", parts)


def batches(runs: list[Run]) -> Section:
    """What the size of a batch does."""
    rows = []
    for size in sorted({run["plan"]["config"]["batch_size"] for run in runs}):
        for label, group in by_label([r for r in runs if r["plan"]["config"]["batch_size"] == size]).items():
            rows.append([label, str(size), *strict(group)])
    note = f"{runs[0]['plan']['edits']} edits, one seed."
    head = ["rule", "batch", *strict_heads()]
    return Section("Batches of 1 and 100", [Table(head, rows, note)])


def capability(runs: list[Run]) -> Section:
    """What the edits do to text that is about none of them, and to tasks."""
    groups = by_label(runs)
    tasks = sorted({row["metric"] for run in runs for row in run["rows"] if row["form"] == "accuracy"})
    consistent = spread_of(runs, "consistency", "cosine") is not None
    series, rows = [], []
    for label, group in groups.items():
        marks = sorted({row["edits"] for run in group for row in run["rows"] if row["metric"] == "kl"})
        points = [
            (float(edits), s.mean, s.deviation)
            for edits in marks
            if (s := spread_of(group, "kl", "text", of="text", edits=edits))
        ]
        if label in SHOWN_IN_LINES and len(points) > 1:
            series.append(Series(label, points, _colour(label)))
        start = spread_of(group, "perplexity", "text", of="text", edits=0)
        end = spread_of(group, "perplexity", "text", of="text")
        moved = spread([_moved(run) for run in group])
        rows.append(
            [
                label,
                figure(group, "kl", "text", of="text"),
                f"{start.mean:.1f} → {end.mean:.1f}" if start and end else "–",
                figure(group, "fluency", "entropy"),
                *([figure(group, "consistency", "cosine")] if consistent else []),
                f"{moved.mean:.1f}" if moved else "–",
                *(_task(group, task) for task in tasks),
            ]
        )
    chart = lines(series, x="edits", y="KL to the base model, nats per token", least=0.0)
    what = "sentences about people who are not edited" if runs[0]["ground"] == DEMO else "lines of text"
    note = (
        f"On {what}, none of them among the anchors. Fluency: weighted 2- and 3-gram entropy, bits. "
        "Tasks: accuracy by likelihood, with its standard error."
    )
    if consistent:
        note += " Consistency: cosine of TF-IDF vectors of what is written about subjects and of reference texts."
    if len(_layers(runs)) > 1:
        note += " ‖W − W0‖: of all edited layers together."
    for form, what in (("cut", "prompts without their beginning"), ("left out", "items left out")):
        counts = {task: max(value(run, task, form, of="task") or 0.0 for run in runs) for task in tasks}
        if told := ", ".join(f"{task} {count:.0f}" for task, count in counts.items() if count):
            note += f" Too long for the model, {what}: {told}."
    if not tasks:
        note += " GLUE and MMLU were not asked."
        if runs[0]["ground"] == DEMO:
            note += " The model's vocabulary has no words for them."
    head = ["rule", "KL, nats", "perplexity", "fluency", *(["consistency"] if consistent else []), "‖W − W0‖", *tasks]
    return Section("Capability", [(chart, "How far predictions on that text move."), Table(head, rows, note)])


def _moved(run: Run) -> float | None:
    """How far the weights of all layers are from the original ones at the end."""
    norms = [value(run, "deviation", "measured", of=layer) for layer in _layers([run])]
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if known else None


def _task(group: Sequence[Run], task: str) -> str:
    found = spread_of(group, task, "accuracy", of="task")
    error = spread_of(group, task, "error", of="task")
    return "–" if found is None or error is None else f"{found.mean:.3f} ± {error.mean:.3f}"


def costs(runs: list[Run]) -> Section:
    """The seconds of a batch along the stream."""
    groups = by_label(runs)
    rows, series = [], []
    for label, group in groups.items():
        laps = [run["seconds_per_batch"] for run in group if run["failed"] is None]
        if not laps:
            continue
        tenth = max(1, len(laps[0]) // 10)
        # Where values are searched ahead, the first batch of a call carries that of all; medians are of the others.
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
    apart = all(map(_writes_apart, runs))
    note = (
        "Milliseconds of the write of a batch (keys read, solve, weights), without the search of the values, "
        "which is the same for all; "
        if apart
        else "Milliseconds of a whole batch: the search of its values, which is the same for all, and the write "
        "(keys read, solve, weights); "
    ) + "early and late: medians of the first and last fifth. The runs shared a busy machine: read ratios, not times."
    times = ["early, ms", "late, ms"] if apart else ["early with values, ms", "late with values, ms"]
    head = ["rule", "edits/s with values", *times, "late / early"]
    return Section("Cost of a batch against history", [(chart, "By the number of the batch."), Table(head, rows, note)])


def _writes_apart(run: Run) -> bool:
    """Whether most batches only write, their values having been searched with those of an earlier batch of the call."""
    config = run["plan"]["config"]
    return min(config.get("search_ahead") or 0, AGE) > 2 * config["batch_size"]


def tuning(runs: list[Run]) -> Section:
    """What each rule was tried with, and what was taken."""
    by_rule: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: int(run["plan"]["label"].rpartition("_")[2])):
        by_rule[run["plan"]["config"]["rule"]].append(run)
    shown, ends = [], []
    for rule, tried in sorted(by_rule.items()):
        best, settings = taken(tried), [_settings(run["plan"]["config"]) for run in tried]
        for at, run in enumerate(tried):
            said = ", ".join(f"{name} {number:g}" for name, number in settings[at].items())
            shown.append([rule, said + (" ←" if at == best else ""), *strict([run], score=False), _score(run)])
        for name, number in settings[best].items():
            span = sorted({one[name] for one in settings})
            if len(span) > 1 and number in (span[0], span[-1]):
                ends.append(f"{rule} {name} {number:g}")
    plan = runs[0]["plan"]
    batches = -(-plan["edits"] // plan["config"]["batch_size"])
    note = (
        f"{plan['edits']} edits in {batches} batches, of seed {plan['seed']}, whose stream is not reported elsewhere; "
        "← the one that was taken, of equal ones the one nearest to the middle."
    )
    if ends:
        note += f" Taken at an end of what was tried, so that more might be found beyond: {', '.join(ends)}."
    intro = (
        "The other rules are tuned on this grid by the strict score. `adherence` finds the moment weight mu² by a "
        "rule's own scale, lam is 0 as published; the adherence of the recursive rule is among those that are tried. A "
        "rule that is not listed has nothing to set. The recursive rule is not tuned: "
    )
    if runs[0]["ground"] == DEMO:
        intro += "it has the demo's adherence, which was chosen before the other rules were there, on seed 0's stream."
    else:
        intro += "it has the default adherence."
    head = ["rule", "settings", *strict_heads()]
    return Section("How the other rules were set", [intro, Table(head, shown, note)])


def _settings(config: dict[str, Any]) -> dict[str, float]:
    """What of a rule's settings a grid goes over."""
    if config["lam"] is None:
        return config["rule_options"] | {"moment ridge": config["ridge"]}
    return config["rule_options"] | {"lam": config["lam"], "adherence": config["adherence"]}


def _score(run: Run) -> str:
    return "broke off" if run["failed"] else figure([run], "score", "strict")


def how(experiments: dict[str, list[Run]], lacking: Sequence[str]) -> Section:
    """The machines, versions and days of all runs, and what is not there."""
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
