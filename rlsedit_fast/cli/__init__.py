"""The command line: `rlsedit edit`, `history`, `undo`, `replace`, `status` and the rest of `COMMANDS`.

Results go to stdout, everything else to stderr. Exit codes: 0 all of it was done; 1 it was done, but some records were
left out; 2 it was refused or failed, for the reason given; 130 it was interrupted. Edits that were made before a batch
failed or the run was interrupted are written and reported.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from rlsedit_fast.errors import RLSEditError

DONE, LEFT_OUT, REFUSED, INTERRUPTED = 0, 1, 2, 130

COMMANDS = (
    *("edit", "history", "undo", "replace", "status", "consolidate"),
    *("show", "statistics", "calibrate", "export", "apply", "evaluate", "demo", "doctor"),
)
"""Each is a module of this package with `HELP`, `add(parser)` and `run(options) -> exit code`."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="rlsedit", description="Edit facts in language models and keep the rest.")
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: importlib.import_module(f"rlsedit_fast.cli.{name}") for name in COMMANDS}
    for name, module in modules.items():
        module.add(commands.add_parser(name, help=module.HELP, description=module.HELP))
    options = parser.parse_args(argv)
    try:
        code: int = modules[options.command].run(options)
        return code
    except RLSEditError as error:
        print(f"rlsedit {options.command}: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"rlsedit {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
