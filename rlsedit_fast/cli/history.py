"""`rlsedit history`: list the edits of a store and their states."""

from __future__ import annotations

import argparse

from rlsedit_fast.cli.output import add_json, emit, plain, say
from rlsedit_fast.cli.stores import add_store
from rlsedit_fast.data.edits import normalized
from rlsedit_fast.editing import EditRecord
from rlsedit_fast.editing.storage.recovery import read_history
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
    parser.add_argument("--name", help="list only edits with this name")
    parser.add_argument("--subject", help="list only edits of this subject")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    records = [record for record in read_history(options.store) if options.state in (None, record.state)]
    if options.subject is not None:
        records = [record for record in records if normalized(record.subject) == normalized(options.subject)]
    if options.name is not None:
        records = [record for record in records if record.name == options.name]
    names = [plain(record.name or "") for record in records]
    width = max(map(len, ("name", *names))) if any(names) else 0
    named = [f"  {text:{width}}" if width else "" for text in ("name", *names)]
    lines = [f"{'id':>6}{named[0]}  {'time':19}  {'state':8}  {'rank':>5}  {'NLL':>6}  {'chat':4}  edit"]
    lines += [f"{record.id:>6}{name}  {_line(record)}" for record, name in zip(records, named[1:], strict=True)]
    if records:
        say(
            "rank and NLL of the target, and the answer, when the edit was last measured; rank 1: the model states the "
            "target. chat: whether the answer to the prompt as a message contains the target"
        )
    emit(
        [record.to_dict() | {"stated": record.success, "chat_stated": record.chat_success} for record in records],
        lines,
        options.json,
    )
    return 0


def _line(record: EditRecord) -> str:
    prompt, target = plain(fill(record.prompt, record.subject)[0]), plain(record.target)
    chat = {None: "-", True: "yes", False: "no"}[record.chat_success]
    answers = ""
    if record.answer is not None:
        answers = f"  (before: {record.answer_before!r}, after: {record.answer!r})"
    return (
        f"{record.time.astimezone():%Y-%m-%d %H:%M:%S}  {record.state:8}  {record.rank:>5}  "
        f"{record.nll:6.2f}  {chat:4}  {prompt} -> {target}{answers}"
    )
