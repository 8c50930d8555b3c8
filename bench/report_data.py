"""Reads the result files of `bench/paper.py` into pandas tables, and formats figures over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

OURS = "rls"

_PLAN = ("label", "stream", "edits", "seed")
_RUN = ("ground", "made", "seconds_editing", "seconds_run", "seconds_per_batch")
_ROW = ["run", "edits", "of", "metric", "form", "value"]


@dataclass(frozen=True)
class Results:
    """Runs and their figures.

    Attributes:
        runs: one row per run with its settings and times. Figures at the end are columns named `metric form`.
        rows: one row per figure: `run` (index of `runs`), `label`, `edits`, `of`, `metric`, `form`, `value`.
    """

    runs: pd.DataFrame
    rows: pd.DataFrame

    def where(self, mask: pd.Series) -> Results:
        runs = self.runs[mask]
        return Results(runs, self.rows[self.rows["run"].isin(runs.index)])

    def of(self, experiment: str) -> Results:
        return self.where(self.runs["experiment"] == experiment)

    def figures(self, metric: str, forms: Sequence[str], per: Sequence[str] = ("of", "edits")) -> pd.DataFrame:
        """Returns the figures of a metric that have all forms, which are columns, by run, label and `per`."""
        rows = self.rows[(self.rows["metric"] == metric) & self.rows["form"].isin(forms)]
        found = rows.pivot(index=["run", "label", *per], columns="form", values="value")
        return found.reindex(columns=forms).dropna().reset_index()


def settings_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that the report uses. Nothing else depends on the layout of the editing configuration."""
    config = run["plan"]["config"]
    prior, search = config.get("prior", config), config.get("search", config)  # earlier runs have flat settings
    tuned = {"moment ridge": prior["ridge"]}
    if prior["lam"] is not None:
        tuned = {"lam": prior["lam"], "adherence": prior["adherence"]}
    return {
        "rule": config["rule"],
        "batch_size": config["batch_size"],
        "search_ahead": search.get("ahead", search.get("search_ahead")) or 0,
        "tuned": config["rule_options"] | tuned,
    }


def tabulate(found: Iterable[Mapping[str, Any]]) -> Results:
    """Returns the tables of the contents of result files, in their order."""
    found = list(found)
    runs = pd.DataFrame(
        {name: run["plan"][name] for name in _PLAN}
        | {name: run[name] for name in _RUN}
        | {"experiment": run.get("experiment", ""), "failed": run["failed"] is not None, "machine": _machine(run)}
        | {"judged": run["plan"]["judged"] or run["plan"]["edits"]}
        | settings_of(run)
        for run in found
    )
    every = [[at, *(row[name] for name in _ROW[1:])] for at, run in enumerate(found) for row in run["rows"]]
    rows = pd.DataFrame(every, columns=_ROW).astype({"value": float})
    # A stream that fails right after an evaluation is evaluated again; the later figures count.
    rows = rows.drop_duplicates(_ROW[:-1], keep="last").join(runs[["label", "made"]], on="run")
    final = rows[(rows["edits"] == rows["made"]) & rows["of"].isin(["all", "text", "task"])]
    final = final.assign(name=final["metric"] + " " + final["form"])
    return Results(runs.join(final.pivot(index="run", columns="name", values="value")), rows)


def _machine(run: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    return f"{run['date']}: {run['machine']['system']}, {run['machine']['cpu']}; {versions}."


def load(folder: Path) -> Results:
    """Returns the runs of a result folder, those of the recursive rule first; subfolders are experiments.

    Raises:
        SystemExit: the folder contains no result files.
    """
    found = []
    for path in folder.glob("*/*.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in run and "plan" in run:
            found.append(run | {"experiment": path.parent.name})
    if not found:
        raise SystemExit(f"{folder}: no result files found; create them with bench/paper.py")
    found.sort(key=lambda run: (not run["plan"]["label"].startswith(OURS), run["plan"]["label"], run["plan"]["seed"]))
    results = tabulate(found)
    longest = results.runs.groupby("experiment")["edits"].transform("max")
    for name, runs in results.runs[results.runs["edits"] < longest].groupby("experiment"):
        most = longest[runs.index[0]]
        print(f"{folder / str(name)}: runs with fewer than {most} edits are omitted: {', '.join(runs['label'])}")
    return results.where(results.runs["edits"] == longest)


def cell(values: pd.Series, digits: int = 3) -> str:
    """Formats mean ± sample standard deviation of the known values."""
    known = values.dropna()
    if known.empty:
        return "–"
    return f"{known.mean():.{digits}f}" + (f" ± {known.std():.{digits}f}" if len(known) > 1 else "")


def over_seeds(
    runs: pd.DataFrame, columns: Mapping[str, Any], by: Mapping[str, str] | None = None, digits: int = 3
) -> pd.DataFrame:
    """Returns a table of mean ± standard deviation; both mappings are from titles to columns.

    Args:
        runs: one row per run.
        columns: figures; those that no run has are omitted.
        by: groups, by default by label.
        digits: after the decimal point.
    """
    by = by or {"rule": "label"}
    groups = runs.groupby([*by.values()], sort=False)
    measured = {title: name for title, name in columns.items() if name in runs and runs[name].notna().any()}
    made = {title: groups[name].agg(cell, digits=digits) for title, name in measured.items()}
    return pd.DataFrame(made, index=groups.size().index).rename_axis([*by]).reset_index()


def whole(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs of labels of which no stream failed."""
    return runs[~runs.groupby("label")["failed"].transform("any")]


def by_age(results: Results) -> pd.DataFrame:
    """Returns strict efficacy of the edits by age, oldest first, of labels of which no stream failed.

    The columns are `run`, `label`, `first` and `last` (edit numbers), `made` (efficacy right after the edits), `end`
    (after the whole stream) and `retained`, their ratio, NaN if no edit succeeded initially.
    """
    found = results.figures("efficacy", ["made:strict", "end:strict"], per=["of"])
    found = found.rename(columns={"made:strict": "made", "end:strict": "end"})
    found[["first", "last"]] = found["of"].str.extract(r"(\d+)-(\d+)").astype(int)
    found["retained"] = found["end"] / found["made"].where(found["made"] > 0)
    return found[found["run"].isin(whole(results.runs).index)].sort_values(["first", "run"])


def selected(runs: pd.DataFrame) -> int:
    """Returns the position of the selected run of a tuning grid: the highest strict score of a completed stream.

    Ties are resolved toward the middle of the grid.
    """
    scores = runs["score strict"].mask(runs["failed"]).fillna(-1.0).tolist()
    return max(range(len(scores)), key=lambda at: (scores[at], -abs(at - (len(scores) - 1) / 2)))
