"""What commands print: results as text or JSON on stdout or into a file, remarks and progress on stderr."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlsedit_fast.errors import InputError


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option `--json [FILE]`."""
    parser.add_argument(
        "--json", nargs="?", const="-", type=_file, metavar="FILE", help="results as JSON, to FILE or to stdout"
    )


def _file(text: str) -> str:
    """A file's name, which an id that stands behind `--json` is not."""
    if text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} would be the file; put ids before --json, or name it ./{text}")
    return text


def emit(results: dict[str, Any] | list[dict[str, Any]], lines: Sequence[str], to: str | None) -> None:
    """Prints `lines`, or `results` as JSON in their place (`to` is "-"), or prints and writes the file `to`.

    Numbers that are not finite become null.

    Raises:
        InputError: the file cannot be written.
    """
    if to == "-":
        print(_json(results))
        return
    try:
        if to is not None:
            Path(to).parent.mkdir(parents=True, exist_ok=True)
            Path(to).write_text(_json(results) + "\n")
    except OSError as error:
        raise InputError(f"--json {to}: cannot be written ({error.strerror}); name a file that can") from error
    finally:
        print("\n".join(lines))


def _json(results: Any) -> str:
    return json.dumps(_finite(results), indent=2, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    """With null for infinities and NaN, which are no JSON: a bound that does not hold, a figure of nothing."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(text: str) -> str:
    """A text as it may go to a terminal: what would move the cursor or turn the writing round is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(*lines: str) -> None:
    """Remarks for the person at the terminal."""
    for line in lines:
        print(line, file=sys.stderr)


@contextmanager
def progress(total: int | None, what: str, unit: str) -> Iterator[Any]:
    """A bar on stderr with the time left; `update(n)` moves it."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, unit_scale=total is None or total > 100_000) as bar:
        yield bar
