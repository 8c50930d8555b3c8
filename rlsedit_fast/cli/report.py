"""`rlsedit report`: one page about the edited model of a store, to be read before a release."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlsedit_fast.cli import DONE, VIOLATED, setup
from rlsedit_fast.cli.edit import CHAT_EDITS
from rlsedit_fast.cli.export import add_overwrite
from rlsedit_fast.cli.gates import add_gate, gate_lines, read_gates
from rlsedit_fast.cli.output import add_json, emit, working
from rlsedit_fast.cli.places import check_places
from rlsedit_fast.cli.stores import add_store, open_editor
from rlsedit_fast.data.prompts import read_prompts
from rlsedit_fast.editing.status import DEFAULT_BUDGET
from rlsedit_fast.editing.storage.recovery import Contents, read_contents
from rlsedit_fast.errors import InputError, counted
from rlsedit_fast.files import check_new, written_whole

if TYPE_CHECKING:
    from rlsedit_fast.evaluation.gates import Gates
    from rlsedit_fast.report.collect import ChangeReport

HELP = "write a page about the edited model of a store, to be read before a release"
ABOUT = (
    "Write one HTML file about the edited model of a store: every edit with the answers of the model before and after, "
    "other prompts and which answers changed, retention by age, bounds, and gates. The page contains everything that "
    "it needs. Requires `pip install 'rlsedit-fast[report]'`."
)
USAGE = "--store DIR --out FILE [--ask FILE] [--gate FILE] [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_store(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="HTML file to write")
    add_overwrite(parser)
    parser.add_argument("--title", help="title of the page (default: the name of the model)")
    parser.add_argument(
        "--ask", type=Path, metavar="FILE", help="file of prompts, one per line, to ask before and after the edits"
    )
    add_gate(parser)
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help=f"also ask the edited prompts in a chat (default: for at most {CHAT_EDITS} edits)",
    )
    parser.add_argument(
        "--no-model",
        action="store_true",
        help="do not load the model; the report is made from the records of the store",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=DEFAULT_BUDGET,
        metavar="X",
        help=f"allowed relative change, see `rlsedit status` (default {DEFAULT_BUDGET})",
    )
    setup.add_model(parser, required=False)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from rlsedit_fast.report.page import check_installed, render

    setup.show_warnings()
    check_installed()
    if options.no_model:
        for name in ("model", "gate", "ask", "chat"):
            if getattr(options, name):
                raise InputError(f"--{name} requires the model, and --no-model is given; omit one of them")
    if options.out.is_dir():
        raise InputError(f"--out {options.out} is a folder; pass a file, such as {options.out / 'report.html'}")
    check_new(options.out, overwrite=options.overwrite)
    check_places(options, files=("out", "json"))
    gates = read_gates(options)
    asked = read_prompts(options.ask, f"--ask {options.ask}") if options.ask else []
    contents = read_contents(options.store, budget=options.budget)
    report = _collect(contents, gates, asked, options)
    page = render(report, options.title)
    with written_whole(options.out) as (part,):
        part.write_text(page, encoding="utf-8", errors="backslashreplace")
    lines = [
        f"report: {options.out}",
        f"{counted(len(report.active), 'active edit')}, {len(report.not_stated)} not stated",
    ]
    if report.measured and report.others:
        lines.append(f"{len(report.moved)} of {len(report.others)} other answers changed")
    lines += [f"not measured: {text}" for text in report.missing]
    if report.gates is not None:
        lines += gate_lines(report.gates)
    emit(report.to_dict(), lines, options.json)
    return VIOLATED if report.gates is not None and report.gates.violated else DONE


def _collect(contents: Contents, gates: Gates | None, asked: list[str], options: argparse.Namespace) -> ChangeReport:
    from rlsedit_fast.report.collect import collect

    if options.no_model:
        return collect(contents, str(options.store))
    chat = len(contents.records) <= CHAT_EDITS if options.chat is None else options.chat
    with open_editor(options) as editor, working("measuring"):
        bound = gates.bind(editor) if gates is not None else None
        return collect(contents, str(options.store), editor=editor, gates=bound, asked=asked, chat=chat)
