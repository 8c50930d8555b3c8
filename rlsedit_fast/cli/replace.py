"""`rlsedit replace`: give edits of a store a new target."""

from __future__ import annotations

import argparse

from rlsedit_fast.cli import DONE, PARTIAL
from rlsedit_fast.cli.stores import add_change, change, report
from rlsedit_fast.errors import InputError, counted, listed

HELP = "give edits of a store a new target"
ABOUT = (
    "Give edits of a store a new target: each is undone, and an edit with the new target is applied. The old edits "
    "stay in the history as replaced. Select them by id or by the options below."
)
USAGE = "--store DIR [ID ...] --target TEXT [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_change(parser)
    parser.add_argument("--target", required=True, metavar="TEXT", help="text that the model should state instead")


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if not options.target.strip():
        raise InputError(f"--target {options.target!r} is empty; pass the text that the model should state")
    done = change(options, lambda editor, ids: editor.replace(ids, target=options.target))
    entries = [entry | {"replaces": was.id} for entry, was in zip(done.entries, done.old, strict=True)]
    replaced = [entry for entry in entries if entry["state"] != "skipped"]
    skipped = [entry for entry in entries if entry["state"] == "skipped"]
    lines = [f"{counted(len(replaced), 'edit')} replaced; answers of the model before and after:", *done.lines]
    if skipped:
        ids = ", ".join(listed(entry["replaces"] for entry in skipped))
        lines.append(
            f"{len(skipped)} not replaced, because the value search for the new target did not converge: {ids}"
        )
    return report({"replaced": replaced, "skipped": skipped}, lines, done, options) or (PARTIAL if skipped else DONE)
