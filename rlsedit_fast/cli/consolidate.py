"""`rlsedit consolidate`: rebuild the edited layers from the active edits and compact the store."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rlsedit_fast.baselines.memory import size
from rlsedit_fast.cli import setup
from rlsedit_fast.cli.output import add_json, emit, working
from rlsedit_fast.cli.status import status_lines
from rlsedit_fast.cli.stores import add_store, open_editor
from rlsedit_fast.editing.storage.recovery import read_history
from rlsedit_fast.errors import InputError, counted

HELP = "rebuild the edited layers of a store from its active edits"
ABOUT = (
    "Read the keys of the active edits again, rebuild the edited layers from them in float64, and delete the stored"
    " rows of edits that are no longer active; the history keeps their records. Do this when `rlsedit status` "
    "advises it."
)
USAGE = "--store DIR [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_store(parser)
    setup.add_model(parser, required=False, divided=True)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    setup.show_warnings()
    if not read_history(options.store):
        raise InputError(f"the store {str(options.store)!r} has no edits, so there is nothing to rebuild")
    with open_editor(options) as editor, working("rebuilding"):
        freed = editor.consolidate()
        status = editor.status()
    change = f"{size(freed)} smaller"
    if freed < 0:
        change = (
            f"{size(-freed)} larger, because it now contains a snapshot of the rebuilt layers "
            f"({size(status.sizes.get('snapshots', -freed))}), from which it opens faster; later snapshots replace it"
        )
    lines = [f"rebuilt from {counted(status.edits['active'], 'active edit')}; the store is {change}"]
    emit({"freed": freed, "status": asdict(status)}, lines + status_lines(status), options.json)
    return 0
