"""Writes the report of a result folder of `bench/paper.py` as HTML with inline charts and as Markdown.

    python bench/report.py bench/results/paper/demo

writes `report.html` and `report.md` into the folder. Every figure is computed from the result files; experiments
without runs are omitted and listed.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from report_page import Section, markdown, page
from report_runs import Run
from report_sections import ages, batches, bounds, capability, costs, hard, how, orders, rules, sweep, tuning
from report_verdicts import verdicts


def load(folder: Path) -> dict[str, list[Run]]:
    """Returns the runs by experiment, the name of their folder."""
    found: dict[str, list[Run]] = defaultdict(list)
    for path in sorted(folder.glob("*/*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in run and "plan" in run:
            found[path.parent.name].append(run)
    for name, runs in found.items():
        longest = max(run["plan"]["edits"] for run in runs)
        if shorter := len(runs) - len(whole := [run for run in runs if run["plan"]["edits"] == longest]):
            print(f"{folder / name}: {shorter} of {len(runs)} runs have fewer than {longest} edits and are omitted")
            found[name] = whole
    return found


def build(experiments: dict[str, list[Run]]) -> list[Section]:
    """Returns the sections in order; the last one lists experiments without runs."""
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
    missing = sorted({name for name, _ in made if not experiments.get(name)})
    if experiments.get("rules"):
        sections.insert(0, verdicts(experiments))
    sections.append(how(experiments, missing))
    return sections


def write(folder: Path) -> list[Path]:
    """Writes both reports into the folder."""
    experiments = load(folder)
    if not experiments:
        raise SystemExit(f"{folder}: no result files found; create them with bench/paper.py")
    name = next(iter(experiments.values()))[0]["ground"]
    title = f"Editing rules on the {name} model"
    sections = build(experiments)
    paths = [folder / "report.html", folder / "report.md"]
    paths[0].write_text(page(title, sections), encoding="utf-8")
    paths[1].write_text(markdown(title, sections), encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="result folder, such as bench/results/paper/demo")
    for path in write(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
