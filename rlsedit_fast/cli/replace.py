"""`rlsedit replace`: another target for edits, and what the model says then."""

from __future__ import annotations

import argparse

from rlsedit_fast.cli import setup
from rlsedit_fast.cli.export import add_exports, check_named_exports, write_exports
from rlsedit_fast.cli.output import add_json, emit
from rlsedit_fast.cli.stores import (
    add_model,
    add_selection,
    add_store,
    answer_lines,
    ask,
    describe,
    open_editor,
    selection,
)

HELP = "tell the model another target for edits of a store; the old ones stay in its history"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_store(parser)
    add_selection(parser)
    parser.add_argument("--target", required=True, help="what the model is to say instead")
    add_model(parser)
    add_exports(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs it."""
    setup.show_warnings()
    check_named_exports(options)
    with open_editor(options) as editor:
        ids = editor.select(**selection(options))
        old = [record for record in editor.history() if record.id in set(ids)]
        before = ask(editor, old)
        records = editor.replace([record.id for record in old], target=options.target)
        after = ask(editor, records)
        files = write_exports(editor, options)
    made = [
        describe(record) | {"replaces": was.id, "answer_before": said, "answer": now}
        for record, was, said, now in zip(records, old, before, after, strict=True)
    ]
    lines = [f"{len(made)} edits replaced; the model's answers before and now:", *answer_lines(records, before, after)]
    emit({"replaced": made, "files": files}, lines + files, options.json)
    return 0
