"""Tables and chart data of the sections of a report; `report.md.jinja` contains their text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from report_data import OURS, Results, by_age, cell, over_seeds, selected, whole

from rlsedit_fast.baselines import RULES
from rlsedit_fast.evaluation.ages import AGE
from rlsedit_fast.evaluation.figures import pareto

EFFICACY, SPECIFICITY, SCORE = "efficacy strict", "neighbors strict", "score strict"
STRICT = {
    "efficacy": EFFICACY,
    "generalization": "generalization strict",
    "neighbors unchanged": SPECIFICITY,
    "score": SCORE,
}
"""Columns of the strict metrics by title."""

OTHERS = {
    "efficacy, forced": "efficacy forced",
    "efficacy, free": "efficacy free",
    "generalization, forced": "generalization forced",
    "generalization, free": "generalization free",
    "neighbors, forced": "neighbors forced",
    "rebuilt neighbors": "rebuilt strict",
    "namesakes": "namesakes strict",
    "other facts": "same_subject strict",
    "multi-hop": "multihop strict",
    "multi-hop, free": "multihop free",
}
"""Columns of other metrics by title."""

SHOWN_IN_LINES = ("rls", "memit", "memit-history", "alphaedit", "rome", "emmet")
"""Rules in line charts; lines of all rules would be unreadable."""

FAR = 0.25
"""Largest distance, in each direction, from the rule with the best harmonic mean. Rules beyond it are not in the chart
but in its caption."""

Section = dict[str, Any]


def summary(results: Results) -> Section:
    """Figures of the verdicts. Variants of a rule, such as with protected prompts, are not compared."""
    every = results.of("rules")
    every = every.where(every.runs["label"].isin(RULES))
    means = whole(every.runs).groupby("label", sort=False)[[EFFICACY, SPECIFICITY, SCORE]].mean()
    points = {label: (x, y) for label, x, y, _ in means.itertuples()}
    x, y = points.get(OURS, (math.inf, math.inf))
    swept = streams(results.of("sweep").runs)
    bounded = pd.concat(results.figures(metric, ["measured", "bound"]) for metric in ("deviation", "anchors"))
    return {
        "point": points.get(OURS),
        "front": pareto(points),
        "above": [name for name, (a, b) in points.items() if a >= x and b >= y and (a > x or b > y)],
        "ranked": means[SCORE].sort_values(ascending=False, kind="stable"),
        "retention": _retention(every),
        "sweeps": {stream: runs.groupby(["mu", "lam"])[SCORE].mean() for stream, runs in swept.items()},
        "exceeded": bounded["measured"] > bounded["bound"] * (1 + 1e-5),
        "seeds": every.runs["label"].value_counts(sort=False),
        "failed": sorted(set(results.runs["label"][results.runs["failed"]])),
    }


def _retention(results: Results) -> Section | None:
    """Retention and efficacy of the oldest edits; None without those of the recursive rule."""
    ages = by_age(results)
    groups = ages.groupby("run").head(1).dropna(subset="retained").groupby("label", sort=False)
    kept = groups["retained"].agg(["mean", "std"])
    if OURS not in kept.index:
        return None
    best, most = (groups[name].mean().round(12).idxmax() for name in ("retained", "end"))  # the first of equals
    gaps = kept["mean"][best] - kept["mean"]
    return {
        "oldest": oldest_edits(ages),
        "best": best,
        "most": most,
        "equal": [name for name in kept.index if name != OURS and abs(gaps[name]) < 1e-9],
        "within": gaps[OURS] <= (deviation := kept["std"][[OURS, best]].fillna(0.0).max()),
        "deviation": deviation,
        "shown": groups[["made", "end", "retained"]].agg(cell),
    }


def rules(results: Results) -> Section:
    """Scores of every rule, and a chart of efficacy against specificity."""
    runs = results.runs
    failed = runs.groupby("label")["failed"].agg(["sum", "size"])
    names = {label: f"{label} ({n} of {of} failed)" for label, n, of in failed.itertuples() if n}
    counted = runs[~runs["failed"] | runs.groupby("label")["failed"].transform("all")]
    points = whole(runs).groupby("label", sort=False)[[EFFICACY, SPECIFICITY]].agg(["mean", "std"])
    points = points.set_axis(["x", "x_std", "y", "y_std"], axis=1).reset_index()
    both = points[["x", "y"]].to_numpy()
    mean = (both.prod(axis=1) / both.sum(axis=1).clip(min=1e-9)).tolist()
    far = (both[mean.index(max(mean))] - both > FAR).any(axis=1) if mean else np.zeros(0, dtype=bool)
    return {
        "table": over_seeds(counted.replace({"label": names}), STRICT | OTHERS),
        "points": points[~far],
        "outside": [f"{one.label} ({one.x:.2f}, {one.y:.2f})" for one in points[far].itertuples()],
        "front": pareto({label: (x, y) for label, (x, y) in zip(points["label"], both, strict=True)}),
    }


def _lines(figures: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Returns mean and deviation of a column by label and x, as the data of a chart."""
    made = figures.groupby(["label", x], sort=False)[y].agg(y="mean", y_std="std").dropna(subset="y")
    return made.rename_axis(["label", "x"]).reset_index().sort_values("x", kind="stable")


def _shown(figures: pd.DataFrame) -> pd.DataFrame:
    return figures[figures["label"].isin(SHOWN_IN_LINES)]


def ages(results: Results) -> Section | None:
    """Retention at the end of edits that succeeded initially, by age of the edits."""
    found = by_age(results)
    shares = found.pivot(index=["run", "label"], columns="first", values="retained")
    if not (at := list(shares.columns)):
        return None
    table = found.groupby("run").head(1).join(shares, on=["run", "label"])
    columns = {f"{oldest_edits(found)} edits: efficacy after the edit": "made", "efficacy at the end": "end"}
    columns |= {"retained": at[0], "middle retained": at[len(at) // 2], "last retained": at[-1]}
    middle = found.assign(middle=(found["first"] + found["last"]) / 2)
    return {"table": over_seeds(table, columns), "lines": _lines(_shown(middle), "middle", "retained")}


def oldest_edits(ages: pd.DataFrame) -> str:
    """Returns the name of the oldest edits of `by_age`."""
    return "first hundred" if (last := ages["last"].min()) == 100 else f"first {last}"


def streams(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Returns the completed runs of a sweep by stream, the plain one first, with their factors `mu` and `lam`."""
    factors = runs["label"].str.extract(r"mu x(?P<mu>[\d.]+) lam x(?P<lam>[\d.]+)").astype(float)
    found = runs.join(factors)[~runs["failed"]]
    return dict(sorted(found.groupby("stream"), key=lambda item: (item[0] != "plain", item[0])))


def sweep(results: Results) -> Section:
    """Strict score for lam and mu around the calibrated values, which are in brackets."""
    tables = {}
    for stream, runs in (every := streams(results.runs)).items():
        scores = runs.pivot_table(index="mu", columns="lam", values=SCORE)
        shown = scores.map(lambda score: "–" if pd.isna(score) else f"{score:.3f}")
        shown.loc[1.0, 1.0] = f"[{shown.loc[1.0, 1.0]}]"
        shown = shown.rename(index="mu ×{:g}".format, columns="lam ×{:g}".format)
        tables[stream] = shown.rename_axis(index="", columns=None).reset_index()
    found = next(iter(every.values()))
    varied = {"mu": found[found["lam"] == 1], "lam": found[found["mu"] == 1]}
    dashed = {"efficacy, mu varied": ("mu", EFFICACY), "neighbors unchanged, mu varied": ("mu", SPECIFICITY)}
    drawn = {f"score, {x} varied": (x, SCORE) for x in varied} | dashed
    lines = pd.concat(_lines(varied[x].assign(label=label), x, y) for label, (x, y) in drawn.items())
    return {"tables": tables, "lines": lines, "dashed": list(dashed)}


def bounds(results: Results) -> Section | None:
    """Measured deviations of the recursive rule along the stream and their bounds."""
    ours = results.where(results.runs["label"] == OURS)
    norms = {"deviation": "‖W − W0‖", "anchors": "‖K0 (W − W0)ᵀ‖"}
    found = pd.concat(ours.figures(metric, ["measured", "bound"]).assign(norm=norm) for metric, norm in norms.items())
    if found.empty:
        return None
    found["layer"] = found["of"].str.removeprefix("layer ").astype(int)
    first = found[found["layer"] == found["layer"].min()]
    lines = [_lines(first.assign(label=first["norm"] + f" {form}"), "edits", form) for form in ("measured", "bound")]
    means = found.groupby(["norm", "layer", "edits"])[["measured", "bound"]].mean().loc[::-1].sort_index(level=[1, 2])
    means["measured / bound"] = means["measured"] / means["bound"]
    table = means.map("{:.2f}".format).reset_index().sort_values("norm", ascending=False, kind="stable")
    return {"table": table, "lines": pd.concat(lines), "dashed": set(lines[1]["label"])}


def hard(results: Results) -> Section:
    """Edits that contradict earlier ones, and edits of related facts."""
    columns = STRICT | {"first target remains": "superseded strict"}
    return {"tables": {stream: over_seeds(runs, columns) for stream, runs in results.runs.groupby("stream")}}


def batches(results: Results) -> Section:
    """Effect of the batch size."""
    runs = results.runs.sort_values("batch_size", kind="stable")
    return {"table": over_seeds(runs, STRICT, {"rule": "label", "batch": "batch_size"})}


def orders(results: Results) -> Section:
    """Effect of the order of the same edits."""
    return {"table": over_seeds(results.runs, STRICT), "count": results.runs["label"].value_counts().max()}


def capability(results: Results) -> Section:
    """Effect of the edits on unrelated text and on tasks."""
    rows = results.rows
    norms = rows[(rows["metric"] == "deviation") & (rows["form"] == "measured") & (rows["edits"] == rows["made"])]
    starts = rows[(rows["metric"] == "perplexity") & (rows["edits"] == 0)]
    runs = results.runs.assign(
        moved=norms.groupby("run")["value"].agg(lambda norms: math.hypot(*norms)),
        before=starts.groupby("run")["value"].first(),
    ).dropna(axis=1, how="all")
    fine = {"KL, nats": "kl text", "fluency": "fluency entropy", "consistency": "consistency cosine"}
    coarse = {"perplexity before": "before", "perplexity after": "perplexity text", "‖W − W0‖": "moved"}
    table = over_seeds(runs, fine).merge(over_seeds(runs, coarse, digits=1), sort=False)
    tasks = [name.removesuffix(" accuracy") for name in runs if name.endswith(" accuracy")]
    means = runs.groupby("label", sort=False).mean(numeric_only=True)
    for task in tasks:
        pairs = means[[f"{task} accuracy", f"{task} error"]].to_numpy()
        table[task] = ["–" if np.isnan(share) else f"{share:.3f} ± {error:.3f}" for share, error in pairs]
    counts = runs.max(numeric_only=True)
    too_long = {
        form: [f"{task} {counts[name]:.0f}" for task in tasks if counts.get(name := f"{task} {form}", 0) > 0]
        for form in ("cut", "left out")
    }
    lines = _lines(_shown(rows[rows["metric"] == "kl"]), "edits", "value")
    return {"table": table, "lines": lines, "layers": norms["of"].nunique(), "tasks": tasks, "too_long": too_long}


def costs(results: Results) -> Section | None:
    """Time per batch along the stream."""
    if (runs := results.runs[~results.runs["failed"]]).empty:
        return None
    # Otherwise the values of most batches were searched together with those of an earlier batch.
    with_search = (runs["search_ahead"].clip(upper=AGE) <= 2 * runs["batch_size"]).any()
    unit = "with search, ms" if with_search else "ms"
    made, points = [], []
    for label, group in runs.groupby("label", sort=False):
        ms = 1e3 * np.array(group["seconds_per_batch"].tolist())
        tenth = max(1, ms.shape[1] // 10)
        # The first batch of a joint search includes the search of all; medians exclude it.
        early, late = np.median(ms[:, : 2 * tenth]), np.median(ms[:, -2 * tenth :])
        rate = (group["made"] / group["seconds_editing"]).mean()
        made.append([label, f"{rate:.1f}", f"{early:.0f}", f"{late:.0f}", f"{late / early:.2f}"])
        starts = range(0, ms.shape[1] - tenth + 1, tenth)
        points += [(label, at + tenth / 2, np.median(ms[:, at : at + tenth])) for at in starts]
    head = ["rule", "edits/s with search", f"early, {unit}", f"late, {unit}", "late / early"]
    lines = _shown(pd.DataFrame(points, columns=["label", "x", "y"]))
    return {"table": pd.DataFrame(made, columns=head), "lines": lines, "with_search": with_search}


def tuning(results: Results) -> Section:
    """Tuning grids and selected settings of every rule."""
    tables, ends = [], []
    runs = results.runs.assign(place=results.runs["label"].str.rpartition("_")[2].astype(int)).sort_values("place")
    for rule, tried in runs.groupby("rule"):
        best, settings = selected(tried), list(tried["tuned"])
        shown = [", ".join(f"{name} {value:g}" for name, value in one.items()) for one in settings]
        shown = [text + " (failed)" * failed for text, failed in zip(shown, tried["failed"], strict=True)]
        shown[best] += " ←"
        table = over_seeds(tried, STRICT).assign(rule=rule)
        table.insert(1, "settings", shown)
        tables.append(table)
        for name, value in settings[best].items():
            span = {one[name] for one in settings}
            if len(span) > 1 and value in (min(span), max(span)):
                ends.append(f"{rule} {name} {value:g}")
    return {"table": pd.concat(tables).fillna("–"), "ends": ends}


SECTIONS = {
    "rules": ("rules", rules),
    "ages": ("rules", ages),
    "sweep": ("sweep", sweep),
    "bounds": ("rules", bounds),
    "orders": ("orders", orders),
    "hard": ("hard", hard),
    "batches": ("batches", batches),
    "capability": ("rules", capability),
    "costs": ("rules", costs),
    "tuning": ("tuning", tuning),
}
"""Experiment and function of every section by its name in `report.md.jinja`."""
