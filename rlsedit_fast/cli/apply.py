"""`rlsedit apply`: apply a delta file to its base model."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from rlsedit_fast.cli import DONE, setup
from rlsedit_fast.cli.export import WRITER, Written, add_overwrite, check_checkpoint, is_gguf_output
from rlsedit_fast.cli.output import add_json, emit
from rlsedit_fast.cli.places import check_places
from rlsedit_fast.errors import InputError
from rlsedit_fast.export import write_checkpoint
from rlsedit_fast.export.card import CardContents, make_card
from rlsedit_fast.export.delta import apply_and_compare, check_delta
from rlsedit_fast.logs import warnings_silenced

HELP = "apply a delta file to its base model and write the edited checkpoint"
USAGE = "--model MODEL --delta FILE --out DIR [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    setup.add_model(parser)
    parser.add_argument(
        "--delta",
        type=Path,
        required=True,
        metavar="FILE",
        help="delta file written by `rlsedit edit` or `rlsedit export`",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the edited checkpoint")
    add_overwrite(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if is_gguf_output(options.out):
        raise InputError(
            f"--out {options.out}: `rlsedit apply` writes checkpoint folders; write a GGUF file with `rlsedit export "
            "--store DIR --out FILE.gguf`"
        )
    check_checkpoint(options.out, options.model, overwrite=options.overwrite)
    check_places(options, folders=("out",))
    check_delta(options.delta)
    model, tokenizer = setup.load_model(options, config=setup.check_model(options))
    report, changes = apply_and_compare(model, options.delta)
    written = Written()
    with written.attempt(f"--out {options.out}"), warnings_silenced(WRITER):
        card = make_card(CardContents(str(options.model), report.edits)) if report.edits else None
        written.add_checkpoint(
            write_checkpoint(model, tokenizer, options.out, changes=changes, card=card, overwrite=options.overwrite)
        )
    with written.attempt():
        emit(asdict(report) | {"out": str(options.out)} | written.to_json, written.files, options.json)
    written.raise_failures()
    return DONE
