"""Writes the report of a result folder of `bench/paper.py` as Markdown and, with charts, as an HTML page.

    python bench/report.py bench/results/paper/demo

writes `report.md` and `report.html` into the folder. Every figure is computed from the result files. Experiments
without runs are omitted and listed. Needs `pip install ".[report]"`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from report_chart import draw
from report_data import Results, load
from report_sections import SECTIONS, summary

from rlsedit_fast.baselines import RULES

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def contents(results: Results) -> dict[str, Any]:
    """Returns the contents of `report.md.jinja`; sections without figures are None."""
    known, found = set(results.runs["experiment"]), {}
    for name, (experiment, make) in SECTIONS.items():
        part = results.of(experiment)
        section = make(part) if experiment in known else None
        found[name] = section and section | {"runs": part.runs}
    found["summary"] = summary(results) if "rules" in known else None
    missing = sorted({experiment for experiment, _ in SECTIONS.values()} - known)
    return found | {"runs": results.runs, "missing": missing, "known_rules": RULES}


def _table(data: pd.DataFrame, left: int = 1) -> str:
    """Formats a table of text as Markdown; the first `left` columns are left-aligned."""
    lines = [list(data.columns), ["---"] * left + ["---:"] * (data.shape[1] - left), *data.to_numpy().tolist()]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def render(found: dict[str, Any], *, charts: bool = False) -> str:
    """Returns the report as Markdown, with or without charts."""
    page = TEMPLATES.get_template("report.md.jinja")
    return page.render(found, table=_table, draw=draw if charts else None)


def write(folder: Path) -> list[Path]:
    """Writes both reports into the folder."""
    page, text = folder / "report.html", folder / "report.md"
    found = contents(load(folder))
    text.write_text(render(found), encoding="utf-8")
    body = MarkdownIt().enable("table").render(render(found, charts=True))
    page.write_text(TEMPLATES.get_template("report.html.jinja").render(body=body), encoding="utf-8")
    return [page, text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="result folder, such as bench/results/paper/demo")
    for path in write(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
