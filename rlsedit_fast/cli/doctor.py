"""`rlsedit doctor`: versions, backends, and why one is missing."""

from __future__ import annotations

import argparse

from rlsedit_fast.cli import DONE
from rlsedit_fast.cli.output import add_json, emit

HELP = "versions, backends, and why one is missing"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs it."""
    from rlsedit_fast import doctor

    facts = doctor.report()
    emit(facts, [doctor.render(facts)], options.json)
    return DONE
