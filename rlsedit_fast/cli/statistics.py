"""`rlsedit statistics`: collect key statistics (mom2) of the edited layers on text."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlsedit_fast.cli.export import add_overwrite
from rlsedit_fast.cli.output import add_json, emit, say
from rlsedit_fast.cli.places import check_places
from rlsedit_fast.cli.setup import (
    add_choice,
    add_model,
    add_tokens,
    gather,
    make_source,
    plan_editor,
    settle_text,
    show_warnings,
)
from rlsedit_fast.errors import InputError
from rlsedit_fast.files import open_tensors
from rlsedit_fast.processes import world
from rlsedit_fast.statistics.cache import cache_path
from rlsedit_fast.statistics.key_statistics import EARLIER_STATISTICS, STATISTICS

HELP = "collect key covariance (mom2) statistics on text, once per model; edits then use them as anchors"
USAGE = "--model MODEL (--text FILE | --self-generate) [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_model(parser, divided=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, metavar="FILE", help='text file: plain, or JSON Lines with a field "text"')
    source.add_argument("--self-generate", action="store_true", help="text that the model generates")
    add_tokens(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="output file (default: a cache entry that `rlsedit edit` finds by model fingerprint)",
    )
    add_overwrite(parser)
    add_choice(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command; after an interrupt, the next call resumes from the checkpoint."""
    show_warnings()
    settle_text(options)
    world().lead(lambda: check_places(options, files=("out", "json")))
    if options.out is not None:
        _check_replaceable(options.out, overwrite=options.overwrite)
    editor = plan_editor(options).load()
    source = make_source(editor, options)
    out = options.out or cache_path(
        editor.fingerprint(), editor.layers, source.name, options.tokens, held_out=options.held_out
    )
    checkpoint = out.with_name(f"{out.name}.part")
    if checkpoint.exists():
        say(f"resuming from {checkpoint}")
    found = gather(editor, source, options, checkpoint)
    world().lead(lambda: found.save(out))
    if world().first:
        checkpoint.unlink(missing_ok=True)
    results = {
        "file": str(out),
        "tokens": found.tokens,
        "held_out_tokens": found.held_out_tokens,
        "layers": list(editor.layers),
        "fingerprint": found.fingerprint,
        "source": found.source,
    }
    held = f" and {found.held_out_tokens} held out" if found.held_out_tokens else ""
    lines = [f"{found.tokens} tokens{held}, layers {', '.join(map(str, editor.layers))}: {out}"]
    emit(results, lines, options.json)
    return 0


def _check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Raises InputError for an existing file without --overwrite, or that does not contain key statistics."""
    if not out.exists():
        return
    try:
        with open_tensors(out, STATISTICS, "", earlier=EARLIER_STATISTICS):
            pass
    except InputError as error:
        raise InputError(
            f"--out {out} already exists and is not a key statistics file; choose another path or remove it"
        ) from error
    if not overwrite:
        raise InputError(f"--out {out} already exists; choose another path or pass --overwrite")
