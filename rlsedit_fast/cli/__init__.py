"""The command line: `rlsedit edit`, `history`, `undo`, `replace`, `status` and the rest of `COMMANDS`.

Results go to stdout, everything else to stderr. Exit codes: 0 all of it was done; 1 it was done, but some records were
left out; 2 it was refused or failed, for the reason given; 130 it was interrupted; 141 whoever read stdout went away.
Edits that were made before a batch failed or the run was interrupted are written and reported.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import select
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from rlsedit_fast.cli.places import check_places
from rlsedit_fast.cli.words import spoken
from rlsedit_fast.errors import RLSEditError

DONE, LEFT_OUT, REFUSED, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141

COMMANDS = (
    *("edit", "history", "undo", "replace", "status", "consolidate"),
    *("show", "layers", "statistics", "calibrate", "export", "apply", "evaluate", "demo", "doctor"),
)
"""Each is a module of this package with `HELP`, `add(parser)` and `run(options) -> exit code`."""

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    told = "rlsedit"
    try:
        try:
            parser = argparse.ArgumentParser(
                prog="rlsedit", description="Edit facts in language models and keep the rest."
            )
            commands = parser.add_subparsers(dest="command", required=True)
            modules = {name: importlib.import_module(f"rlsedit_fast.cli.{name}") for name in COMMANDS}
            for name, module in modules.items():
                module.add(commands.add_parser(name, help=module.HELP, description=module.HELP))
            options = parser.parse_args(argv)
            told = f"rlsedit {options.command}"
            check_places(options)
            code: int = modules[options.command].run(options)
            return code
        finally:
            sys.stdout.flush()  # here, where it is seen that nobody reads, and not at the interpreter's end
    except RLSEditError as error:
        print(f"{told}: {spoken(error)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{told}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return NO_READER
        logger.debug("%s: unforeseen", told, exc_info=True)
        print(f"{told}: {unforeseen(error)}", file=sys.stderr)
        return REFUSED


def unforeseen(error: Exception) -> str:
    """An error that the package does not raise on purpose, in one line: its kind, its text, and where it came up."""
    at = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in at)
    text = " ".join(str(error).split())
    return f"unforeseen {type(error).__name__}{': ' * bool(text)}{text}{where}"


def _nobody_reads() -> bool:
    """Whether stdout's reader is gone; then what is left for it goes nowhere, silently."""
    with suppress(OSError, ValueError):  # a stdout that is no file
        out, pipe = sys.stdout.fileno(), select.poll()
        pipe.register(out, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), out)
            return True
    return False
