"""Writes benchmark results to JSON files with date, machine and versions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rlsedit_fast.doctor import context


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the option --json."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")


def record(path: Path | None, what: str, **fields: Any) -> None:
    """Writes a result to `path` if it is not None; creates the folder."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"what": what, **context(), **fields}, indent=2) + "\n", encoding="utf-8")
