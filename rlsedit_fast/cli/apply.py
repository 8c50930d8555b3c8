"""`rlsedit apply`: apply a delta file to its base model."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from rlsedit_fast.cli import DONE, setup
from rlsedit_fast.cli.export import Written, add_overwrite, check_checkpoint
from rlsedit_fast.cli.output import add_json, emit
from rlsedit_fast.cli.places import check_places
from rlsedit_fast.export import apply_delta
from rlsedit_fast.export.delta import check_delta
from rlsedit_fast.files import written_folder

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
    check_checkpoint(options.out, options.model, overwrite=options.overwrite)
    check_places(options, folders=("out",))
    check_delta(options.delta)
    model, tokenizer = setup.load_model(options, config=setup.check_model(options))
    report = apply_delta(model, options.delta)
    written = Written()
    with written.attempt(f"--out {options.out}"), written_folder(options.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        written.files.append(f"checkpoint: {options.out}")
    with written.attempt():
        emit(asdict(report) | {"out": str(options.out)} | written.to_json, written.files, options.json)
    written.raise_failures()
    return DONE
