"""`rlsedit undo`: edits taken back exactly, and what the model says then."""

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

HELP = "take edits of a store back, as if the model had never been told them"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_store(parser)
    add_selection(parser)
    add_model(parser)
    add_exports(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs it."""
    setup.show_warnings()
    check_named_exports(options)
    with open_editor(options) as editor:
        ids = editor.select(**selection(options))
        chosen = [record for record in editor.history() if record.id in set(ids)]
        before = ask(editor, chosen)
        records = editor.undo([record.id for record in chosen])
        after = ask(editor, records)
        files = write_exports(editor, options)
    undone = [
        describe(record) | {"answer_before": was, "answer": now}
        for record, was, now in zip(records, before, after, strict=True)
    ]
    lines = [f"{len(records)} edits undone; the model's answers before and now:", *answer_lines(records, before, after)]
    emit({"undone": undone, "files": files}, lines + files, options.json)
    return 0
