"""What the commands on a store share: which store and model, which edits, and what the model says of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rlsedit_fast.cli import DONE, setup
from rlsedit_fast.cli.export import Written, add_exports, check_named_exports, write_exports
from rlsedit_fast.cli.output import add_json, emit, plain, say
from rlsedit_fast.editing import Edit, Editor, EditRecord
from rlsedit_fast.editing.written import record_text
from rlsedit_fast.errors import InputError, listed
from rlsedit_fast.models.tokens import fill
from rlsedit_fast.store import Store

SHOWN = 20
"""Answers that are printed; --json has all of them."""


def add_store(parser: argparse.ArgumentParser) -> None:
    """Which store."""
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="the folder with the edits")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model; the store knows where it was."""
    setup.add_model(parser, required=False)


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Which edits; several options together must all fit."""
    group = parser.add_argument_group("which edits (active ones; what is given must all fit)")
    group.add_argument("ids", nargs="*", type=int, metavar="ID", help="as `rlsedit history` lists them")
    group.add_argument("--subject", help="all edits about it")
    group.add_argument("--last", type=int, metavar="N", help="the newest so many")
    group.add_argument("--since", type=_time, metavar="TIME", help="made then or later, such as 2026-03-01T12:00")
    group.add_argument("--until", type=_time, metavar="TIME", help="made then or before")


def selection(options: argparse.Namespace) -> dict[str, Any]:
    """The same as arguments of `Editor.select`."""
    chosen = {name: getattr(options, name) for name in ("subject", "last", "since", "until")}
    return {"ids": options.ids or None, **chosen}


def open_editor(options: argparse.Namespace) -> Editor:
    """The editor of the store that the options name, with the model that they name or the store remembers.

    Raises:
        StoreError: there is no store, or it is damaged or in use.
        InputError: no model is named or known, or it cannot be loaded.
    """
    if options.model is None:
        with closing(Store(options.store, write=False)) as store:
            options.model = store.about["model"]
        if not options.model:
            raise InputError(f"the store {str(options.store)!r} does not know where its model is; name it with --model")
    model, tokenizer = setup.load_model(options)
    return Editor.open(options.store, model, tokenizer)


def add_change(parser: argparse.ArgumentParser) -> None:
    """What a command takes that changes edits of a store."""
    add_store(parser)
    add_selection(parser)
    add_model(parser)
    add_exports(parser)
    add_json(parser)


@dataclass(frozen=True)
class Changed:
    """What became of the edits that were chosen.

    Attributes:
        old: their records as they were.
        records: those that the change made of them, in the same order.
        before: what the model said to each before the change.
        after: what it says to each now.
        written: what became of the exports.
    """

    old: list[EditRecord]
    records: list[EditRecord]
    before: list[str]
    after: list[str]
    written: Written

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The records for JSON, with the answers."""
        return [
            record_text(record) | {"answer_before": was, "answer": now}
            for record, was, now in zip(self.records, self.before, self.after, strict=True)
        ]

    @property
    def lines(self) -> list[str]:
        """The answers, a line an edit, and the files."""
        return answer_lines(self.records, self.before, self.after) + self.written.files


def change(options: argparse.Namespace, make: Callable[[Editor, list[int]], list[EditRecord]]) -> Changed:
    """Changes the chosen edits of a store, and asks the model about them before and after.

    Args:
        options: of `add_change`.
        make: makes the change, of edits by their ids.
    """
    setup.show_warnings()
    check_named_exports(options)
    with open_editor(options) as editor:
        ids = editor.select(**selection(options))
        chosen = set(ids)
        old = [record for record in editor.history() if record.id in chosen]
        before = ask(editor, old)
        records = make(editor, [record.id for record in old])
        try:
            return Changed(old, records, before, ask(editor, records), write_exports(editor, options))
        except KeyboardInterrupt:
            say("interrupted: the change is made, and in the store; files may be missing or not whole")
            raise


def tell(results: dict[str, Any], lines: Sequence[str], done: Changed, options: argparse.Namespace) -> int:
    """Prints and writes what a change did.

    Raises:
        InputError: not all files could be written; all else is told.
    """
    with done.written.attempt():
        emit(results | done.written.told, lines, options.json)
    done.written.raise_failures()
    return DONE


def ask(editor: Editor, edits: Sequence[Edit | EditRecord]) -> list[str]:
    """What the model says now to what the edits ask."""
    from rlsedit_fast.evaluation.answers import answers

    return answers(editor.model, editor.tokenizer, [(fill(e.prompt, e.subject)[0], e.target) for e in edits])


def answer_lines(records: Sequence[EditRecord], before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The model's answers before and after, a line an edit."""
    lines = [
        f"{record.id:>6}  {plain(fill(record.prompt, record.subject)[0])}  {was!r} -> {now!r}"
        for record, was, now in zip(records, before, after, strict=True)
    ]
    return listed(lines, SHOWN, where=" (all of them with --json)")


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write it as 2026-03-01T12:00 or 2026-03-01") from error
