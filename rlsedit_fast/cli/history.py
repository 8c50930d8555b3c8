"""`rlsedit history`: list the edits of a store and their states."""

from __future__ import annotations

import argparse

from rlsedit_fast.cli.output import add_json, emit, plain
from rlsedit_fast.cli.stores import add_store
from rlsedit_fast.data.edits import normalized
from rlsedit_fast.editing.recovery import read_history
from rlsedit_fast.models.tokens import fill

HELP = "list the edits of a store; the model is not loaded"
ABOUT = "List the edits of a store, including undone and replaced ones. The model is not loaded."
USAGE = "--store DIR [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_store(parser)
    parser.add_argument(
        "--state", choices=("active", "undone", "replaced", "skipped"), help="list only edits in this state"
    )
    parser.add_argument("--subject", help="list only edits of this subject")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    records = [record for record in read_history(options.store) if options.state in (None, record.state)]
    if options.subject is not None:
        records = [record for record in records if normalized(record.subject) == normalized(options.subject)]
    lines = [f"{'id':>6}  {'time':19}  {'state':8}  {'realized':>8}  {'rank':>4}  {'NLL':>5}  edit"]
    lines += [
        f"{r.id:>6}  {r.time.astimezone():%Y-%m-%d %H:%M:%S}  {r.state:8}  {r.realized:8.2f}  {r.rank:>4}  "
        f"{r.nll:5.2f}  {plain(fill(r.prompt, r.subject)[0])} -> {plain(r.target)}"
        for r in records
    ]
    emit([record.to_dict() for record in records], lines, options.json)
    return 0
