"""Output of the commands: results as text or JSON on stdout or in a file, messages and progress on stderr."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlsedit_fast.activity import activity_shown
from rlsedit_fast.errors import InputError
from rlsedit_fast.processes import world


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--json [FILE]`."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=_file,
        metavar="FILE",
        help="print the results as JSON, or write them to FILE",
    )


def _file(text: str) -> str:
    """Rejects a number after `--json`, which is most likely an edit id."""
    if text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is taken as a file name; put ids before --json, or write ./{text}")
    return text


def emit(results: dict[str, Any] | list[dict[str, Any]], lines: Sequence[str], to: str | None) -> None:
    """Prints `lines` and, if `to` is a path, writes `results` there as JSON; if `to` is "-", prints only the JSON.

    Numbers that are not finite are written as null.

    Raises:
        InputError: the file cannot be written.
    """
    if to == "-":
        print(_json(results))
        return
    try:
        if to is not None:
            place = Path(to)
            world().lead(lambda: _write(place, _json(results) + "\n"))
    except OSError as error:
        raise InputError(f"--json {to}: cannot write the file ({error.strerror}); choose another path") from error
    finally:
        print("\n".join(lines))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _json(results: Any) -> str:
    return json.dumps(_finite(results), indent=2, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    """Replaces infinities and NaN, which are not valid JSON, with None."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(text: str) -> str:
    """Escapes control and bidirectional characters for printing to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_quiet = False


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Adds the option --quiet."""
    parser.add_argument(
        "--quiet", action="store_true", help="print only results and errors: no progress bars, notices and warnings"
    )


def set_quiet(quiet: bool) -> None:
    """Sets whether notices, warnings and progress bars are hidden, also those of transformers."""
    global _quiet
    _quiet = quiet
    if quiet:
        from transformers.utils import logging as transformers_logging

        logging.basicConfig(level=logging.ERROR, format="%(message)s")
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()


def is_quiet() -> bool:
    """Returns whether notices and progress bars are hidden."""
    return _quiet


def say(*lines: str) -> None:
    """Prints notices to stderr, unless --quiet is given."""
    if not _quiet:
        complain(*lines)


def complain(*lines: str) -> None:
    """Prints errors to stderr."""
    for line in lines:
        print(line, file=sys.stderr)


@contextmanager
def progress(total: int | None, what: str, unit: str) -> Iterator[Any]:
    """Shows a progress bar on stderr, with the present step of the work; `update(n)` advances it."""
    from tqdm import tqdm

    scaled = total is None or total > 100_000
    with tqdm(total=total, desc=what, unit=unit, unit_scale=scaled, disable=_quiet) as bar, activity_shown(bar):
        yield bar


@contextmanager
def working(what: str) -> Iterator[None]:
    """Shows the time and the present step of work that has no count, on stderr."""
    from tqdm import tqdm

    form = "{desc}: {elapsed}{postfix}"
    with tqdm(desc=what, bar_format=form, disable=_quiet, leave=False) as bar, activity_shown(bar):
        yield
