"""`rlsedit doctor`: print versions, machine, backends and build."""

from __future__ import annotations

import argparse

from rlsedit_fast.cli import DONE
from rlsedit_fast.cli.output import add_json, emit

HELP = "print versions, machine, backends and why a backend is unavailable"
USAGE = "[--json [FILE]]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from rlsedit_fast import doctor

    facts = doctor.report()
    emit(facts, [doctor.render(facts)], options.json)
    return DONE
