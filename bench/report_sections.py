"""Sections of the report, one per experiment."""

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
    oldest_success,
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
"""Rules that are drawn in line charts, since all of them would be unreadable."""

FAR = 0.25
"""Maximum distance, in each direction, from the rule with the highest harmonic mean; rules beyond are listed in text
instead of the chart."""


def rules(runs: list[Run]) -> Section:
    """Scores of every rule, and a chart of efficacy against specificity."""
    groups = by_label(runs)
    plan = runs[0]["plan"]
    points = points_of(groups)
    front = pareto(points)
    series, outside = [], []
    center = max(points.values(), key=lambda point: harmonic_mean(point) or 0.0, default=(0.0, 0.0))
    for label, point in points.items():
        if any(best - place > FAR for best, place in zip(center, point, strict=True)):
            outside.append(f"{label} ({point[0]:.2f}, {point[1]:.2f})")
            continue
        x, y = (spread_of(groups[label], metric, "strict") for metric in ("efficacy", "neighbors"))
        assert x is not None
        assert y is not None
        color = "ours" if label == OURS else "near" if label in front else "other"
        series.append(Series(label, [(x.mean, y.mean, y.deviation)], color, x_deviations=(x.deviation,)))
    shown = [points[one.name] for one in series if one.name in front]
    chart = scatter(series, x="efficacy, strict", y="specificity: neighbors unchanged", front=shown)
    columns = [
        ("efficacy", "efficacy", "strict"),
        ("forced", "efficacy", "forced"),
        ("free", "efficacy", "free"),
        ("generalization", "generalization", "strict"),
        ("forced", "generalization", "forced"),
        ("free", "generalization", "free"),
        ("neighbors unchanged", "neighbors", "strict"),
        ("forced", "neighbors", "forced"),
        ("rebuilt neighbors", "rebuilt", "strict"),
        ("namesakes", "namesakes", "strict"),
        ("other facts", "same_subject", "strict"),
        ("multi-hop", "multihop", "strict"),
        ("multi-hop, free", "multihop", "free"),
        ("score", "score", "strict"),
    ]
    columns = [column for column in columns if any(spread_of(g, *column[1:]) for g in groups.values())]
    rows = []
    for label, group in groups.items():
        complete = [run for run in group if run["failed"] is None]
        failures = "" if complete == group else f" ({len(group) - len(complete)} of {len(group)} failed)"
        rows.append([label + failures, *(figure(complete or group, metric, form) for _, metric, form in columns)])
    note = (
        "Strict: every token of the answer ranked first; unchanged: same prediction as before any edit. Forced: the "
        "new answer has a lower NLL than the old one (neighbors: the reverse). Free: the greedy continuation is the "
        "answer and then ends. Score: harmonic mean of the three strict metrics."
    )
    if any(column[1] == "rebuilt" for column in columns):
        note += " Rebuilt neighbors: unedited subjects of other records with the same question and answer."
    if any(column[1] == "multihop" for column in columns):
        note += (
            " Multi-hop: fraction of chains of facts with a correct answer to any wording of the question, as defined "
            "by MQuAKE."
        )
    seeds, on_demo = sorted({run["plan"]["seed"] for run in runs}), runs[0]["ground"] == DEMO
    intro = (
        f"{plan['edits']} edits in batches of {plan['config']['batch_size']}, evaluated after the last batch; mean ± "
        f"standard deviation over seeds {', '.join(map(str, seeds))}; {plan['judged'] or plan['edits']} cases "
        f"evaluated. All seeds sample from the same {'people' if on_demo else 'records'}, so that streams share many "
        "subjects and are not independent samples; "
        + ("the anchors differ between seeds. " if on_demo else "the anchors are the same. ")
        + "Value search, keys and master weights are the same for all rules; the settings of the prior are tuned per "
        "rule."
    )
    if any("protecting" in label for label in groups):
        intro += (
            " Protecting: prompts of other neighbors, none of which is evaluated here, are protected before the first "
            "edit in addition to the anchors; this needs a rule with a key history."
        )
    what = "Up and to the right is better. Error bars: standard deviation over seeds. Line: Pareto front."
    if outside:
        what += f" Outside the chart: {', '.join(outside)}."
    return Section(
        "Comparison of the rules", [intro, (chart, what), Table(["rule", *(c[0] for c in columns)], rows, note)]
    )


def ages(runs: list[Run]) -> Section:
    """Retention at the end of edits that succeeded initially, by age of the edits."""
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
            series.append(Series(label, sorted(points), _color(label)))
        known = [s for s in found.values() if s is not None]
        if known:
            success = [str(share or "–") for share in oldest_success(group)]
            rows.append([label, *success, str(known[0]), str(known[len(known) // 2]), str(known[-1])])
    chart = lines(series, x="edit number", y="retention: at the end / after the edit")
    head = [
        "rule",
        f"{oldest(runs)}: efficacy after the edit",
        "efficacy at the end",
        "retained",
        "middle retained",
        "last retained",
    ]
    note = (
        "Efficacy: strict. Retained: fraction of the initially successful edits that are still successful at the end; "
        "the last hundred are followed by no other edits."
    )
    return Section("Retention of early edits", [(chart, "Retention by age."), Table(head, rows, note)])


def _middle(age: str) -> float:
    first, last = map(int, age.split("-"))
    return (first + last) / 2


def sweep(runs: list[Run]) -> Section:
    """Strict score for lam and mu around the calibrated values."""
    streams = by_stream(runs)
    found = by_factors(next(iter(streams.values())))
    mus, lams = sorted({mu for mu, _ in found}), sorted({lam for _, lam in found})
    along = [
        Series(name, [(x, mean(found[at(x)], *what), math.nan) for x in axis if at(x) in found], color, dashed)
        for name, axis, at, what, color, dashed in (
            ("mu: score", mus, lambda x: (x, 1.0), ("score", "strict"), "ours", False),
            ("lam: score", lams, lambda x: (1.0, x), ("score", "strict"), "near", False),
            ("mu: efficacy", mus, lambda x: (x, 1.0), ("efficacy", "strict"), "ours", True),
            ("mu: specificity", mus, lambda x: (x, 1.0), ("neighbors", "strict"), "fourth", True),
        )
    ]
    chart = lines(along, x="factor on the calibrated value", y="metric", log_x=True)
    what = f"One parameter varied, the other calibrated, on the {next(iter(streams))} stream."
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
    """Measured deviations of the recursive rule along the stream and their bounds."""
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
    note = "The bounds sqrt(J)/lam and sqrt(J)/mu are computed from the objective; no other rule has bounds."
    head = ["", "layer", "edits", "measured", "bound", "measured / bound"]
    return Section(
        "Bound against measured deviation", [(chart, "Solid: measured; dashed: bound."), Table(head, rows, note)]
    )


def _layers(runs: Sequence[Run]) -> list[str]:
    """Returns the measured layers as `layer N`, lowest first."""
    named = {row["of"] for run in runs for row in run["rows"] if row["metric"] == "deviation"}
    return sorted(named, key=lambda of: int(of.removeprefix("layer ")))


def orders(runs: list[Run]) -> Section:
    """Effect of the order of the same edits."""
    rows = []
    for label, group in by_label(runs).items():
        rows.append([label, str(len(group)), *strict(group)])
    note = "The same cases of one seed in different orders; the deviation is due to the order alone."
    head = ["rule", "orders", *strict_heads()]
    return Section("Order of the edits", [Table(head, rows, note)])


_STREAMS = {
    "conflicting": "Every fact is edited twice, the second time with another target.",
    "related": "All four facts of each person, whose keys almost coincide.",
}


def hard(runs: list[Run]) -> Section:
    """Edits that contradict earlier ones, and edits of related facts."""
    parts: list[str | Table | tuple[str, str]] = [
        "Only the recursive rule can undo an edit. In `rls`, an edit replaces an earlier edit with the same prompt, "
        "and the facts of one subject share a value; `separate` treats edits independently like all other rules. "
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
        head += ["first target still stated"] if stream == "conflicting" else []
        edits = next(iter(groups.values()))[0]["plan"]["edits"] if groups else 0
        parts.append(Table(head, rows, f"{what} {edits} edits, one seed."))
    return Section("Conflicting and related edits", parts)


def batches(runs: list[Run]) -> Section:
    """Effect of the batch size."""
    rows = []
    for size in sorted({run["plan"]["config"]["batch_size"] for run in runs}):
        for label, group in by_label([r for r in runs if r["plan"]["config"]["batch_size"] == size]).items():
            rows.append([label, str(size), *strict(group)])
    note = f"{runs[0]['plan']['edits']} edits, one seed."
    head = ["rule", "batch", *strict_heads()]
    return Section("Batches of 1 and 100", [Table(head, rows, note)])


def capability(runs: list[Run]) -> Section:
    """Effect of the edits on unrelated text and on tasks."""
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
            series.append(Series(label, points, _color(label)))
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
    text = "sentences about unedited people" if runs[0]["ground"] == DEMO else "lines of text"
    note = (
        f"Measured on {text} that are not anchors. Fluency: weighted 2- and 3-gram entropy in bits. "
        "Tasks: accuracy by likelihood with standard error."
    )
    if consistent:
        note += (
            " Consistency: cosine similarity of TF-IDF vectors of generated texts about subjects and reference texts."
        )
    if len(_layers(runs)) > 1:
        note += " ‖W − W0‖: over all edited layers."
    for form, what in (("cut", "truncated prompts"), ("left out", "skipped items")):
        counts = {task: max(value(run, task, form, of="task") or 0.0 for run in runs) for task in tasks}
        if listed := ", ".join(f"{task} {count:.0f}" for task, count in counts.items() if count):
            note += f" Too long for the model, {what}: {listed}."
    if not tasks:
        note += " GLUE and MMLU were not evaluated."
        if runs[0]["ground"] == DEMO:
            note += " The vocabulary of the model does not cover them."
    head = ["rule", "KL, nats", "perplexity", "fluency", *(["consistency"] if consistent else []), "‖W − W0‖", *tasks]
    return Section("Capability", [(chart, "KL divergence of predictions on that text."), Table(head, rows, note)])


def _moved(run: Run) -> float | None:
    """Returns the norm of the weight change of all layers at the end."""
    norms = [value(run, "deviation", "measured", of=layer) for layer in _layers([run])]
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if known else None


def _task(group: Sequence[Run], task: str) -> str:
    found = spread_of(group, task, "accuracy", of="task")
    error = spread_of(group, task, "error", of="task")
    return "–" if found is None or error is None else f"{found.mean:.3f} ± {error.mean:.3f}"


def costs(runs: list[Run]) -> Section:
    """Time per batch along the stream."""
    groups = by_label(runs)
    rows, series = [], []
    for label, group in groups.items():
        laps = [run["seconds_per_batch"] for run in group if run["failed"] is None]
        if not laps:
            continue
        tenth = max(1, len(laps[0]) // 10)
        # With search_ahead, the first batch of a call includes the search of all; medians exclude it.
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
            series.append(Series(label, parts, _color(label)))
    chart = lines(series, x="batch number", y="median ms per batch", least=0.0)
    write_only = all(map(_is_write_only, runs))
    note = (
        "Milliseconds to write a batch (keys, solve, weights), without the value search, which is the same for all "
        "rules; "
        if write_only
        else "Milliseconds per batch: value search, which is the same for all rules, and write (keys, solve, weights); "
    ) + "early and late: medians of the first and last fifth. The machine was shared: compare ratios, not times."
    times = ["early, ms", "late, ms"] if write_only else ["early with search, ms", "late with search, ms"]
    head = ["rule", "edits/s with search", *times, "late / early"]
    return Section("Time per batch along the stream", [(chart, "Time by batch number."), Table(head, rows, note)])


def _is_write_only(run: Run) -> bool:
    """Returns whether the values of most batches were searched together with those of an earlier batch."""
    config = run["plan"]["config"]
    return min(config.get("search_ahead") or 0, AGE) > 2 * config["batch_size"]


def tuning(runs: list[Run]) -> Section:
    """Tuning grids and selected settings of every rule."""
    by_rule: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: int(run["plan"]["label"].rpartition("_")[2])):
        by_rule[run["plan"]["config"]["rule"]].append(run)
    shown, ends = [], []
    for rule, tried in sorted(by_rule.items()):
        best, settings = taken(tried), [_settings(run["plan"]["config"]) for run in tried]
        for at, run in enumerate(tried):
            text = ", ".join(f"{name} {number:g}" for name, number in settings[at].items())
            shown.append([rule, text + (" ←" if at == best else ""), *strict([run], score=False), _score(run)])
        for name, number in settings[best].items():
            span = sorted({one[name] for one in settings})
            if len(span) > 1 and number in (span[0], span[-1]):
                ends.append(f"{rule} {name} {number:g}")
    plan = runs[0]["plan"]
    batches = -(-plan["edits"] // plan["config"]["batch_size"])
    note = (
        f"{plan['edits']} edits in {batches} batches of seed {plan['seed']}, which is not used elsewhere; ← selected "
        "setting, ties resolved toward the middle."
    )
    if ends:
        note += f" Selected at the end of the range, so that better settings may exist beyond it: {', '.join(ends)}."
    intro = (
        "The other rules are tuned on this grid by the strict score. `adherence` calibrates the moment weight mu² on "
        "the scale of the rule, lam is 0 as published; the grid contains the adherence of the recursive rule. Rules "
        "that are not listed have no settings to tune. The recursive rule is not tuned: "
    )
    if runs[0]["ground"] == DEMO:
        intro += "it uses the adherence of the demo, chosen on the stream of seed 0 before the other rules were added."
    else:
        intro += "it uses the default adherence."
    head = ["rule", "settings", *strict_heads()]
    return Section("Tuning of the other rules", [intro, Table(head, shown, note)])


def _settings(config: dict[str, Any]) -> dict[str, float]:
    """Returns the tuned settings of a rule."""
    if config["lam"] is None:
        return config["rule_options"] | {"moment ridge": config["ridge"]}
    return config["rule_options"] | {"lam": config["lam"], "adherence": config["adherence"]}


def _score(run: Run) -> str:
    return "failed" if run["failed"] else figure([run], "score", "strict")


def how(experiments: dict[str, list[Run]], missing: Sequence[str]) -> Section:
    """Machines, versions and dates of all runs, and missing experiments."""
    runs = [run for group in experiments.values() for run in group]
    text = [
        f"{len(runs)} runs, {sum(run['seconds_run'] for run in runs) / 60:.0f} minutes on one thread of a shared "
        "machine."
    ]
    for machine, versions, made in dict.fromkeys((_machine(run), _versions(run), run["date"]) for run in runs):
        text.append(f"{made}: {machine}; {versions}.")
    if runs:
        text.append(f"Model: {runs[0]['ground']}.")
    if missing:
        text.append(f"No runs of: {', '.join(missing)}.")
    return Section("Machines and versions", text)


def _machine(run: Run) -> str:
    return f"{run['machine']['system']}, {run['machine']['cpu']}"


def _versions(run: Run) -> str:
    return ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)


def _color(label: str) -> str:
    fixed = {"rls": "ours", "memit": "near", "alphaedit": "third", "memit-history": "fourth", "rome": "fifth"}
    return fixed.get(label, "other")
