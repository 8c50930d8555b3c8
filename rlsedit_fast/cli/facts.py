"""Reads a file of edits, or a single edit from options, and reports which records are skipped and why."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

from rlsedit_fast.cli.output import say
from rlsedit_fast.cli.setup import EditorPlan, at_least_one
from rlsedit_fast.data import FORMATS, Edit, EditFile, ZsreTarget, read_edits
from rlsedit_fast.data.conflicts import Conflicts, resolve
from rlsedit_fast.data.read import edit_from_record
from rlsedit_fast.editing.requests import find_invalid
from rlsedit_fast.errors import InputError, RequestError, counted, listed
from rlsedit_fast.models.joins import Join
from rlsedit_fast.models.loading import max_tokens
from rlsedit_fast.processes import world


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


_SINGLE = {
    "prompt": "prompt with {} in place of the subject",
    "subject": "subject of the edit; without one, the edit is made at the last token of the prompt",
    "target": "text that the model should generate after the prompt",
    "join": "how prompt and target are joined: auto (default), by a space unless the prompt asks for none; space; or "
    "exact, character by character",
    "name": "your own name for the edit (optional)",
}
"""Options of a single edit."""

_REQUIRED = ("prompt", "target")


def add_facts(parser: argparse.ArgumentParser, *, required: bool = True, single: bool = False) -> None:
    """Adds the options that select a file of edits.

    Args:
        parser: parser of the command.
        required: whether the command needs edits.
        single: also add options for a single edit, instead of a file.
    """
    group = parser.add_argument_group("edits")
    group.add_argument(
        "--edits",
        type=Path,
        metavar="FILE",
        required=required and not single,
        help="JSON Lines, JSON, CSV or TSV with prompt, subject and target, or with messages of a chat, or a "
        "CounterFact, zsRE or MQuAKE file; - reads from stdin",
    )
    group.add_argument(
        "--format", choices=("auto", *FORMATS), help="fields of the file (default: auto, detected from the fields)"
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
    if single:
        one = parser.add_argument_group("a single edit (instead of --edits)")
        for name, what in _SINGLE.items():
            one.add_argument(f"--{name}", help=what, choices=get_args(Join) if name == "join" else None)


def facts_given(options: argparse.Namespace) -> bool:
    """Returns whether a file of edits or a single edit is given.

    Raises:
        InputError: both are given, the single edit is incomplete, or an option for files is given without a file.
    """
    one = [name for name in _SINGLE if getattr(options, name, None) is not None]
    if options.edits is not None:
        if one:
            raise InputError(f"{_named(one)} cannot be combined with --edits; pass either a file or a single edit")
        return True
    if files := [name for name, default in FILE_OPTIONS.items() if getattr(options, name) != default]:
        raise InputError(f"{_named(files)} requires --edits FILE; add it or omit {_named(files)}")
    if one and (missing := [name for name in _REQUIRED if name not in one]):
        raise InputError(f"{_named(missing)} is missing; a single edit requires {_named(_REQUIRED)}")
    return bool(one)


def read_facts(options: argparse.Namespace) -> Facts:
    """Reads the edits, resolves conflicts between them and prints a summary to stderr.

    Raises:
        RequestError: a record is invalid and --skip-bad is not given, or no edit is left.
        InputError: no edits are given, or an option does not apply to the format of the file.
    """
    if not facts_given(options):
        raise InputError(f"no edits given; pass --edits FILE, or a single edit by {_named(_REQUIRED)}")
    if options.edits is None:
        record = {name: getattr(options, name) for name in _SINGLE}
        edits, places = [edit_from_record(record, place="the given edit")], ["command line"]
        left_out, unread = list[dict[str, str]](), list[str]()
    else:
        file, title = _read(options)
        edits, places, unread = file.edits[: options.limit], file.places[: options.limit], file.unread
        left_out = [{"place": skipped.place, "reason": str(skipped)} for skipped in file.skipped]
        _report(left_out)
        if not edits:
            raise RequestError(f"{title}: no valid record is left; see the reasons above")
        say(f"{title}: {counted(len(edits), 'edit')}, format {file.format}")
    given, edits = edits, [edit.trimmed() for edit in edits]
    resolved = resolve(edits, conflicts=options.conflicts, places=places)
    say(*resolved.describe())
    if trimmed := sum(one is not other for one, other in zip(given, edits, strict=True)):
        say(f"white space around the prompt, subject or target of {trimmed} edits is ignored")
    if without := sum(not edit.subject for edit in resolved.edits):
        say(f"{counted(without, 'edit')} without a subject: edited at the last token of the prompt")
    if unread:
        say(f"ignored fields: {', '.join(unread)}")
    kept = [places[i] for i in resolved.kept]
    return Facts(resolved.edits, kept, left_out, {**resolved.to_json(), "places": list(places)}, list(unread))


def _read(options: argparse.Namespace) -> tuple[EditFile, str]:
    """Returns the contents of the file of edits and its name."""
    stdin = str(options.edits) == "-"
    title = "<stdin>" if stdin else str(options.edits)
    source = getattr(sys.stdin, "buffer", sys.stdin) if stdin else options.edits
    if stdin and world().count > 1:
        source = BytesIO(world().lead(source.read))
    file = read_edits(
        source,
        format=options.format,
        strict=not options.skip_bad,
        zsre_target=options.zsre_target,
    )
    if options.zsre_target != FILE_OPTIONS["zsre_target"] and file.format != "zsre":
        raise InputError(f"--zsre-target applies to zsRE files only, and {title} has the format {file.format}; omit it")
    return file, title


def _named(names: Sequence[str]) -> str:
    """Returns the options of the given names as text."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def sift(facts: Facts, plan: EditorPlan, options: argparse.Namespace) -> Facts:
    """Removes the edits that are invalid for the tokenizer or the context length of the model.

    Args:
        facts: the edits.
        plan: the model, of which only the tokenizer and the config are loaded.
        options: options added by `add_facts`.

    Raises:
        RequestError: an edit is invalid and --skip-bad is not given, or no edit is left.
    """
    bad = find_invalid(plan.tokenizer, facts.edits, plan.config, longest=max_tokens(plan.model_config))
    if not bad:
        return facts
    left_out = [{"place": facts.places[i], "reason": f"{facts.places[i]}: {reason}"} for i, reason in bad.items()]
    if not options.skip_bad:
        shown = listed(entry["reason"] for entry in left_out)
        raise RequestError(
            f"{len(bad)} of {len(facts.edits)} edits are invalid for this model; nothing was modified:\n"
            + "\n".join(shown),
            hint="correct these edits" + (" or pass --skip-bad to skip them" if len(bad) < len(facts.edits) else ""),
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
        say(f"{counted(len(left_out), 'record')} skipped:", *(f"  {line}" for line in lines))
