"""`rlsedit doctor`: print versions, machine, backends and build; measure the backends."""

from __future__ import annotations

import argparse

from rlsedit_fast.cli import DONE
from rlsedit_fast.cli.output import add_json, emit, progress

HELP = "print versions, machine, backends and why a backend is unavailable"
USAGE = "[--tune] [--json [FILE]]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--tune",
        action="store_true",
        help="check and time every backend on every device at common sizes, and store which one is used (minutes)",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from rlsedit_fast import doctor
    from rlsedit_fast.ops import tune

    if options.tune:
        for device in tune.devices():
            with progress(None, f"measuring backends on {device}", "size") as bar:

                def show(done: int, total: int, bar: object = bar) -> None:
                    bar.total, bar.n = total, done  # type: ignore[attr-defined]
                    bar.refresh()  # type: ignore[attr-defined]

                tune.tune(device, show)
    facts = doctor.report()
    emit(facts, [doctor.render(facts)], options.json)
    return DONE
