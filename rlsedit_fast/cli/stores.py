"""What the commands on a store share: which store and model, which edits, and what the model says of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rlsedit_fast.cli import setup
from rlsedit_fast.cli.output import plain
from rlsedit_fast.editing import Edit, Editor, EditRecord
from rlsedit_fast.errors import InputError
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


def describe(record: EditRecord) -> dict[str, Any]:
    """A record for JSON."""
    return asdict(record) | {"time": record.time.isoformat()}


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
    rest = len(lines) - SHOWN
    return [*lines[:SHOWN], f"and {rest} more (all of them with --json)"] if rest > 0 else lines


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write it as 2026-03-01T12:00 or 2026-03-01") from error
