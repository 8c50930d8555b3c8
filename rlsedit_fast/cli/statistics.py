"""`rlsedit statistics`: the anchor moment of each edited layer, from text."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlsedit_fast.cli.output import add_json, emit, say
from rlsedit_fast.cli.places import check_places
from rlsedit_fast.cli.setup import (
    add_choice,
    add_model,
    add_tokens,
    gather,
    make_editor,
    make_source,
    settle_text,
    show_warnings,
)
from rlsedit_fast.editing import cache
from rlsedit_fast.editing.statistics import STATISTICS
from rlsedit_fast.errors import InputError
from rlsedit_fast.files import open_tensors

HELP = "collect what the edited layers do on running text, for edits to hold on to"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", type=Path, metavar="FILE", help="running text: plain, or JSON Lines with a field text"
    )
    source.add_argument("--self-generate", action="store_true", help="text that the model itself writes")
    add_tokens(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to (default: the cache, by the model's fingerprint)"
    )
    add_choice(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs it; interrupted, it goes on from where it was when called again."""
    show_warnings()
    settle_text(options)
    check_places(options, files=("out", "json"))
    if options.out is not None:
        _check_replaceable(options.out)
    editor = make_editor(options)
    source = make_source(editor, options)
    out = options.out or cache.place(editor.fingerprint(), editor.layers, source.name, options.tokens)
    checkpoint = out.with_name(f"{out.name}.part")
    if checkpoint.exists():
        say(f"going on from {checkpoint}")
    found = gather(editor, source, options.tokens, checkpoint)
    found.save(out)
    checkpoint.unlink(missing_ok=True)
    results = {
        "file": str(out),
        "tokens": found.tokens,
        "layers": list(editor.layers),
        "fingerprint": found.fingerprint,
        "source": found.source,
    }
    lines = [f"{found.tokens} tokens, layers {', '.join(map(str, editor.layers))}: {out}"]
    emit(results, lines, options.json)
    return 0


def _check_replaceable(out: Path) -> None:
    """Statistics may be collected anew into their file; whatever else is there stays."""
    if not out.exists():
        return
    try:
        with open_tensors(out, STATISTICS, ""):
            pass
    except InputError as error:
        raise InputError(
            f"--out {out} exists already and is no file of key statistics; name another, or remove it"
        ) from error
