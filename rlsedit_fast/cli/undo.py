"""`rlsedit undo`: remove edits of a store exactly."""

from __future__ import annotations

import argparse

from rlsedit_fast.cli.stores import add_change, change, report
from rlsedit_fast.errors import counted

HELP = "undo edits of a store exactly"
ABOUT = (
    "Undo edits of a store: what they added to the weights is removed exactly, and the other edits stay. Select the"
    " edits by id or by the options below. The store always records the change; --out, --delta and --adapter write "
    "the model."
)
USAGE = "--store DIR [ID ...] [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_change(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    done = change(options, lambda editor, ids: editor.undo(ids))
    lines = [f"{counted(len(done.records), 'edit')} undone; answers of the model before and after:", *done.lines]
    return report({"undone": done.entries}, lines, done, options)
