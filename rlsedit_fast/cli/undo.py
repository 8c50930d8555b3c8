"""`rlsedit undo`: edits taken back exactly, and what the model says then."""

from __future__ import annotations

import argparse

from rlsedit_fast.cli.stores import add_change, change, tell

HELP = "take edits of a store back, as if the model had never been told them"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_change(parser)


def run(options: argparse.Namespace) -> int:
    """Runs it."""
    done = change(options, lambda editor, ids: editor.undo(ids))
    lines = [f"{len(done.records)} edits undone; the model's answers before and now:", *done.lines]
    return tell({"undone": done.entries}, lines, done, options)
