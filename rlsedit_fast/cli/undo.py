"""`rlsedit undo`: remove edits of a store exactly."""

from __future__ import annotations

import argparse

from rlsedit_fast.cli.stores import add_change, change, report

HELP = "undo edits of a store; their rows are removed exactly and the other edits stay"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_change(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    done = change(options, lambda editor, ids: editor.undo(ids))
    lines = [f"{len(done.records)} edits undone; answers of the model before and after:", *done.lines]
    return report({"undone": done.entries}, lines, done, options)
