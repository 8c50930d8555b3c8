"""The report of a folder of results of `bench/paper.py`: one page of HTML with its charts in it, and Markdown.

    python bench/report.py bench/results/paper/demo

writes `report.html` and `report.md` beside the results. Every figure is computed from the files; what could not be
computed, since its runs are not there, is left out and named.
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
    """The runs by experiment, the folder that their files lie in."""
    found: dict[str, list[Run]] = defaultdict(list)
    for path in sorted(folder.glob("*/*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in run and "plan" in run:
            found[path.parent.name].append(run)
    for name, runs in found.items():
        longest = max(run["plan"]["edits"] for run in runs)
        if shorter := len(runs) - len(whole := [run for run in runs if run["plan"]["edits"] == longest]):
            print(f"{folder / name}: {shorter} of {len(runs)} runs have fewer than {longest} edits and are left out")
            found[name] = whole
    return found


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
