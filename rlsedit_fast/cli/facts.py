"""Reads a file of edits and reports which records are skipped and why."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rlsedit_fast.cli.output import say
from rlsedit_fast.cli.setup import at_least_one
from rlsedit_fast.data import FORMATS, Edit, ZsreTarget, read_edits
from rlsedit_fast.data.conflicts import Conflicts, resolve
from rlsedit_fast.editing import Editor
from rlsedit_fast.errors import InputError, RequestError, listed


@dataclass(frozen=True)
class Facts:
    """The edits of a file that will be applied.

    Attributes:
        edits: the edits, in order.
        places: position of each edit in the file.
        left_out: invalid records that were skipped, each `{place, reason}`; duplicates are not included.
        conflicts: duplicates, contradictions and shared subjects, as `Resolved.to_json` lists them.
        unread: fields of the file that are ignored.
    """

    edits: list[Edit]
    places: list[str]
    left_out: list[dict[str, str]]
    conflicts: dict[str, Any]
    unread: list[str]


FILE_OPTIONS = {"format": "auto", "zsre_target": "alt", "limit": None, "conflicts": "later", "skip_bad": False}
"""Defaults of the options that control how a file of edits is read."""


def add_facts(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds the options that select a file of edits."""
    group = parser.add_argument_group("edits")
    group.add_argument(
        "--edits",
        type=Path,
        metavar="FILE",
        required=required,
        help="JSON Lines with the fields prompt, subject and target, or a CounterFact, zsRE or MQuAKE file",
    )
    group.add_argument(
        "--format", choices=("auto", *FORMATS), help="file format (default: auto, detected from the fields)"
    )
    group.add_argument(
        "--zsre-target",
        choices=get_args(ZsreTarget),
        help="target of zsRE edits: alt, the counterfactual answer (default), or the first of answers, the true ones",
    )
    group.add_argument("--limit", type=at_least_one, metavar="N", help="use the first N records")
    group.add_argument(
        "--conflicts",
        choices=get_args(Conflicts),
        help="which edit to use if several have the same filled prompt and different targets: the later (default) or "
        "the first one, keep all of them, or stop with an error",
    )
    group.add_argument("--skip-bad", action="store_true", help="skip and report invalid records instead of stopping")
    parser.set_defaults(**FILE_OPTIONS)


def file_options_given(options: argparse.Namespace) -> list[str]:
    """Returns the options of `add_facts` that are set although they apply to a file of edits."""
    changed = [name for name, default in FILE_OPTIONS.items() if getattr(options, name) != default]
    return [f"--{name.replace('_', '-')}" for name in changed]


def read_facts(options: argparse.Namespace) -> Facts:
    """Reads the file, resolves conflicts between its edits and prints a summary to stderr.

    Raises:
        RequestError: a record is invalid and --skip-bad is not given, or no edit is left.
        InputError: an option does not apply to the format of the file.
    """
    file = read_edits(
        options.edits, format=options.format, strict=not options.skip_bad, zsre_target=options.zsre_target
    )
    if options.zsre_target != FILE_OPTIONS["zsre_target"] and file.format != "zsre":
        raise InputError(
            f"--zsre-target applies to zsRE files only, and {options.edits} has the format {file.format}; omit it"
        )
    edits, places = file.edits[: options.limit], file.places[: options.limit]
    left_out = [{"place": skipped.place, "reason": str(skipped)} for skipped in file.skipped]
    _report(left_out)
    if not edits:
        raise RequestError(f"{options.edits}: no valid record is left; see the reasons above")
    resolved = resolve(edits, conflicts=options.conflicts, places=places)
    say(f"{options.edits}: {len(edits)} edits, format {file.format}", *resolved.describe())
    if file.unread:
        say(f"ignored fields: {', '.join(file.unread)}")
    kept = [places[i] for i in resolved.kept]
    return Facts(resolved.edits, kept, left_out, {**resolved.to_json(), "places": list(places)}, list(file.unread))


def sift(editor: Editor, facts: Facts, options: argparse.Namespace) -> Facts:
    """Removes the edits that are invalid for the tokenizer or the context length of the model.

    Raises:
        RequestError: an edit is invalid and --skip-bad is not given, or no edit is left.
    """
    bad = editor.context.find_invalid(facts.edits)
    if not bad:
        return facts
    left_out = [{"place": facts.places[i], "reason": f"{facts.places[i]}: {reason}"} for i, reason in bad.items()]
    if not options.skip_bad:
        shown = listed(entry["reason"] for entry in left_out)
        raise RequestError(
            f"{len(bad)} of {len(facts.edits)} edits are invalid for this model; nothing was modified:\n"
            + "\n".join(shown),
            hint="correct these edits or pass --skip-bad to skip them",
        )
    _report(left_out)
    keep = [i for i in range(len(facts.edits)) if i not in bad]
    if not keep:
        raise RequestError("no valid edit is left; see the reasons above")
    return replace(
        facts,
        edits=[facts.edits[i] for i in keep],
        places=[facts.places[i] for i in keep],
        left_out=facts.left_out + left_out,
    )


def _report(left_out: list[dict[str, str]]) -> None:
    if left_out:
        lines = listed((entry["reason"] for entry in left_out), where=" (use --json to list all)")
        say(f"{len(left_out)} records skipped:", *(f"  {line}" for line in lines))
