"""The `rlsedit` command line.

Results go to stdout, everything else to stderr. Exit codes: 0 success; 1 partial success, some records were skipped or
some edits did not succeed; 2 error; 3 a gate is violated; 130 interrupted; 141 the reader of stdout closed the pipe.
Edits applied before an error or an interrupt are written and reported.
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
from typing import NoReturn

from rlsedit_fast.cli.launch import launched, reports
from rlsedit_fast.cli.output import add_quiet, set_quiet
from rlsedit_fast.cli.places import check_inputs, check_places
from rlsedit_fast.errors import GateError, RLSEditError, did_you_mean
from rlsedit_fast.processes import world

DONE, PARTIAL, FAILED, VIOLATED, INTERRUPTED, NO_READER = 0, 1, 2, 3, 130, 141

COMMANDS = (
    *("edit", "ask", "history", "undo", "replace", "status", "consolidate", "check", "report"),
    *("show", "layers", "statistics", "calibrate", "export", "apply", "push", "deploy", "evaluate", "demo", "doctor"),
)
"""Modules of this package with `HELP`, `USAGE`, `add(parser)` and `run(options) -> exit code`; some have `ABOUT`."""

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    prog = "rlsedit"
    try:
        try:
            parser = argparse.ArgumentParser(
                prog="rlsedit",
                description="Edit facts in language models with recursive least squares (RLSEdit).",
                epilog="Run `rlsedit COMMAND --help` for the options of a command.",
                allow_abbrev=False,
            )
            commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
            modules = {name: importlib.import_module(f"rlsedit_fast.cli.{name}") for name in COMMANDS}
            for name, module in modules.items():
                command = commands.add_parser(
                    name,
                    help=module.HELP,
                    description=getattr(module, "ABOUT", module.HELP),
                    usage=f"rlsedit {name} {module.USAGE}",
                    allow_abbrev=False,
                )
                module.add(command)
                add_quiet(command)
            options, unknown = parser.parse_known_args(argv)
            if unknown:
                _reject(commands.choices[options.command], unknown)
            set_quiet(options.quiet)
            prog = f"rlsedit {options.command}"
            with launched(options):
                check_inputs(options)
                world().lead(lambda: check_places(options))
                code: int = modules[options.command].run(options)
            return code
        finally:
            sys.stdout.flush()  # raises BrokenPipeError here and not at interpreter exit
    except RLSEditError as error:
        if reports(error):
            print(f"{prog}: error: {error}", file=sys.stderr)
        return VIOLATED if isinstance(error, GateError) else FAILED
    except KeyboardInterrupt as error:
        if reports(error):
            print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _stdout_closed():
            return NO_READER
        logger.debug("%s: unexpected error", prog, exc_info=True)
        if reports(error):
            print(f"{prog}: error: {unexpected(error)}", file=sys.stderr)
        return FAILED


def _reject(command: argparse.ArgumentParser, unknown: list[str]) -> NoReturn:
    """Exits with an error for unknown arguments, with the name of a similar option."""
    known = [option for action in command._actions for option in action.option_strings]
    command.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown[0].partition('=')[0], known)}")


def unexpected(error: Exception) -> str:
    """Formats an error that is not an `RLSEditError` in one line: type, message and source line."""
    frames = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in frames)
    text = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}{': ' * bool(text)}{text}{where}"


def _stdout_closed() -> bool:
    """Returns whether the reader of stdout is gone; if so, redirects stdout to the null device."""
    with suppress(OSError, ValueError):  # stdout without a file descriptor
        out, pipe = sys.stdout.fileno(), select.poll()
        pipe.register(out, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), out)
            return True
    return False
