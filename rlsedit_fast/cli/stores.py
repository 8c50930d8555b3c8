"""Parts shared by the commands on a store: options, opening the editor, and the answers of the model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit_fast.cli import DONE, PARTIAL, setup
from rlsedit_fast.cli.export import Written, add_exports, check_gguf_export, check_named_exports, write_exports
from rlsedit_fast.cli.output import add_json, emit, plain, say, working
from rlsedit_fast.data import Edit
from rlsedit_fast.editing import Editor, EditRecord
from rlsedit_fast.editing.storage.recovery import select_edits
from rlsedit_fast.errors import InputError, listed
from rlsedit_fast.models.answers import answer_facts
from rlsedit_fast.models.tokens import fill
from rlsedit_fast.processes import world
from rlsedit_fast.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 20
"""Number of answers that are printed; --json lists all."""


def add_store(parser: argparse.ArgumentParser) -> None:
    """Adds the option that selects the store."""
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="store folder")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Adds the options that select edits; an edit must match all of them."""
    group = parser.add_argument_group("selection of active edits (edits must match all options given)")
    group.add_argument(
        "ids", nargs="*", metavar="ID", help="ids or names of edits, as listed by `rlsedit history`; a number is an id"
    )
    group.add_argument("--name", help="edits with this name")
    group.add_argument("--subject", help="edits of this subject")
    group.add_argument("--last", type=setup.at_least_one, metavar="N", help="the N most recent edits")
    group.add_argument(
        "--since", type=_time, metavar="TIME", help="edits applied at or after TIME, such as 2026-03-01T12:00"
    )
    group.add_argument("--until", type=_time, metavar="TIME", help="edits applied at or before TIME")


def selected(options: argparse.Namespace) -> list[int]:
    """Returns the ids of the edits that the options of `add_selection` select, without loading the model.

    Raises:
        StoreError: the store does not exist or is damaged.
        InputError: see `Editor.select`.
    """
    ids: list[int] = []
    for text in options.ids:
        ids += [int(text)] if text.isdecimal() else select_edits(options.store, name=text)
    criteria = {name: getattr(options, name) for name in ("name", "subject", "last", "since", "until")}
    return select_edits(options.store, ids=ids or None, **criteria)


def check_source(options: argparse.Namespace) -> None:
    """Raises InputError unless the options select a store, or a model and possibly its edited checkpoint."""
    if options.store is not None and options.edited is not None:
        raise InputError("--store and --edited exclude each other; pass one of them")
    if options.store is None and options.model is None:
        raise InputError("pass --store DIR or --model MODEL; for a model and its edited checkpoint also --edited MODEL")


def open_model(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the unedited model of a store: the one given by --model, or recorded in the store.

    Raises:
        StoreError: the store does not exist or is damaged.
        InputError: the model is not known or cannot be loaded.
    """
    given = options.model
    use_recorded_model(options)
    try:
        config = setup.check_model(options)
    except InputError as error:
        moved = f"the store {str(options.store)!r} was created with this path; pass --model if the model has moved"
        raise InputError(error.message, error.hint if given else moved) from error
    return setup.load_model(options, config=config)


def use_recorded_model(options: argparse.Namespace) -> None:
    """Sets `--model` to the model that the store records, unless it is given.

    Raises:
        StoreError: the store does not exist, is damaged or is in use.
        InputError: the store does not record the path of its model.
    """
    recorded = world().lead(lambda: _recorded_model(options.store))
    if options.model is None and not recorded:
        raise InputError(f"the store {str(options.store)!r} does not record the path of its model; pass --model")
    options.model = options.model or recorded


def _recorded_model(directory: Path) -> str:
    with Store(directory) as store:  # also checks that no other process has opened it
        return str(store.about["model"] or "")


def open_editor(options: argparse.Namespace) -> Editor:
    """Opens the store with the model given by --model or recorded in the store.

    Raises:
        StoreError: the store does not exist, is damaged or is in use.
        InputError: the model is not known or cannot be loaded.
    """
    model, tokenizer = open_model(options)
    return Editor(model, tokenizer, store=options.store, data_parallel=world().replicas)


def add_change(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a command that changes edits of a store."""
    add_store(parser)
    add_selection(parser)
    setup.add_model(parser, required=False, divided=True)
    add_exports(parser)
    add_json(parser)


@dataclass(frozen=True)
class Changed:
    """Result of a change of edits of a store.

    Attributes:
        old: records of the selected edits before the change.
        records: their records after the change, in the same order.
        before: answers of the model before the change.
        after: answers of the model after the change.
        written: outcome of the exports.
    """

    old: list[EditRecord]
    records: list[EditRecord]
    before: list[str]
    after: list[str]
    written: Written

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The records with the answers, JSON-serializable."""
        return [
            record.to_dict() | {"answer_before": before, "answer": after}
            for record, before, after in zip(self.records, self.before, self.after, strict=True)
        ]

    @property
    def lines(self) -> list[str]:
        """One line per edit with its answers, and one line per file."""
        return answer_lines(self.records, self.before, self.after) + self.written.files


def change(options: argparse.Namespace, make: Callable[[Editor, list[int]], list[EditRecord]]) -> Changed:
    """Changes the selected edits of a store and records the answers of the model before and after.

    Args:
        options: options added by `add_change`.
        make: changes the edits with the given ids and returns their records.
    """
    setup.show_warnings()
    with Store(options.store, write=False) as store:
        recorded = store.about["model"]
    check_named_exports(options, options.model or recorded or "")
    chosen = set(selected(options))
    with open_editor(options) as editor:
        check_gguf_export(editor, options)
        old = [record for record in editor.history() if record.id in chosen]
        with working("answers before"):
            before = ask(editor, old)
        with working("changing the model"):
            records = make(editor, [record.id for record in old])
        try:
            return Changed(old, records, before, ask(editor, records), write_exports(editor, options))
        except KeyboardInterrupt:
            say("interrupted: the change is applied and stored; exported files may be missing or incomplete")
            raise


def report(results: dict[str, Any], lines: Sequence[str], done: Changed, options: argparse.Namespace) -> int:
    """Prints and writes the results of a change.

    Raises:
        InputError: a file could not be written; the results are printed nevertheless.
    """
    with done.written.attempt():
        emit(results | done.written.to_json, lines, options.json)
    done.written.raise_failures()
    return PARTIAL if done.written.lost else DONE


def ask(editor: Editor, edits: Sequence[Edit | EditRecord]) -> list[str]:
    """Returns the answer of the model to the prompt of each edit."""
    return answer_facts(editor.model, editor.tokenizer, edits)


def answer_lines(records: Sequence[EditRecord], before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Returns one line per edit with the answers of the model before and after."""
    lines = [
        f"{record.id:>6}  {plain(fill(record.prompt, record.subject)[0])}  {old!r} -> {new!r}"
        for record, old, new in zip(records, before, after, strict=True)
    ]
    return listed(lines, SHOWN, where=" (use --json to list all)")


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a time such as 2026-03-01T12:00 or 2026-03-01") from error
