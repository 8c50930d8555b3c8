"""Where a result goes: a JSON file that says what was measured, when, and on what machine with which versions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rlsedit_fast.doctor import context


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that every benchmark has."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")


def record(path: Path | None, what: str, **fields: Any) -> None:
    """Writes a result, in a folder that is made if need be; nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"what": what, **context(), **fields}, indent=2) + "\n", encoding="utf-8")
