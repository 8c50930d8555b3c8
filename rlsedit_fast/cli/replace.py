"""`rlsedit replace`: another target for edits, and what the model says then."""

from __future__ import annotations

import argparse

from rlsedit_fast.cli import DONE, LEFT_OUT
from rlsedit_fast.cli.stores import add_change, change, tell
from rlsedit_fast.errors import listed

HELP = "tell the model another target for edits of a store; the old ones stay in its history"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_change(parser)
    parser.add_argument("--target", required=True, help="what the model is to say instead")


def run(options: argparse.Namespace) -> int:
    """Runs it."""
    done = change(options, lambda editor, ids: editor.replace(ids, target=options.target))
    every = [entry | {"replaces": was.id} for entry, was in zip(done.entries, done.old, strict=True)]
    made = [entry for entry in every if entry["state"] != "skipped"]
    skipped = [entry for entry in every if entry["state"] == "skipped"]
    lines = [f"{len(made)} edits replaced; the model's answers before and now:", *done.lines]
    if skipped:
        ids = ", ".join(listed(entry["replaces"] for entry in skipped))
        lines.append(f"{len(skipped)} left as they were, since the search for the new target fell short: {ids}")
    return tell({"replaced": made, "skipped": skipped}, lines, done, options) or (LEFT_OUT if skipped else DONE)
