"""`rlsedit replace`: another target for edits, and what the model says then."""

from __future__ import annotations

import argparse

from rlsedit_fast.cli.stores import add_change, change, tell

HELP = "tell the model another target for edits of a store; the old ones stay in its history"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_change(parser)
    parser.add_argument("--target", required=True, help="what the model is to say instead")


def run(options: argparse.Namespace) -> int:
    """Runs it."""
    done = change(options, lambda editor, ids: editor.replace(ids, target=options.target))
    made = [entry | {"replaces": was.id} for entry, was in zip(done.entries, done.old, strict=True)]
    lines = [f"{len(made)} edits replaced; the model's answers before and now:", *done.lines]
    return tell({"replaced": made}, lines, done, options)
