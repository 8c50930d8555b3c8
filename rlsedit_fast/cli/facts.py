"""Reading a user's file of facts: what is in it, what is left out, and why."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rlsedit_fast.cli.output import say
from rlsedit_fast.cli.setup import at_least_one
from rlsedit_fast.editing import Edit, Editor
from rlsedit_fast.editing.conflicts import Conflicts, resolve
from rlsedit_fast.editing.formats import FORMATS, ZsreTarget, read_edits
from rlsedit_fast.errors import InputError, RequestError, listed


@dataclass(frozen=True)
class Facts:
    """The edits of a file that are to be made.

    Attributes:
        edits: in order.
        places: where each stands in the file.
        left_out: records that no edit was made of, each `{place, reason}`; bad ones, not duplicates.
        conflicts: duplicates, contradictions and shared subjects, as `Resolved.to_json` lists them.
        unread: fields of the file that nothing reads.
    """

    edits: list[Edit]
    places: list[str]
    left_out: list[dict[str, str]]
    conflicts: dict[str, Any]
    unread: list[str]


FILE_OPTIONS = {"format": "auto", "zsre_target": "alt", "limit": None, "conflicts": "later", "skip_bad": False}
"""What is read of a file's edits, by what each is where it is not given."""


def add_facts(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Options that name a file of facts."""
    group = parser.add_argument_group("facts")
    group.add_argument("--edits", type=Path, metavar="FILE", required=required, help="JSON Lines or a known data set")
    group.add_argument("--format", choices=("auto", *FORMATS), help="default: by the fields")
    group.add_argument("--zsre-target", choices=get_args(ZsreTarget), help="what zsRE edits teach")
    group.add_argument("--limit", type=at_least_one, metavar="N", help="take only the first so many")
    group.add_argument("--conflicts", choices=get_args(Conflicts), help="which of two edits that ask the same stays")
    group.add_argument(
        "--skip-bad", action="store_true", help="leave out records that cannot be edited, and report them"
    )
    parser.set_defaults(**FILE_OPTIONS)


def read_facts(options: argparse.Namespace) -> Facts:
    """Reads the file and settles its conflicts, telling what it finds.

    Raises:
        RequestError: a record that cannot be read, without --skip-bad; or no edit at all.
        InputError: an option is of another format.
    """
    file = read_edits(
        options.edits, format=options.format, strict=not options.skip_bad, zsre_target=options.zsre_target
    )
    if options.zsre_target != FILE_OPTIONS["zsre_target"] and file.format != "zsre":
        raise InputError(f"--zsre-target is of zsRE, and {options.edits} is {file.format}; leave it out")
    edits, places = file.edits[: options.limit], file.places[: options.limit]
    left_out = [{"place": skipped.place, "reason": str(skipped)} for skipped in file.skipped]
    _report(left_out)
    if not edits:
        raise RequestError(f"{options.edits}: no record is left to edit; see the reasons above or drop --skip-bad")
    resolved = resolve(edits, conflicts=options.conflicts, places=places)
    say(f"{options.edits}: {len(edits)} edits ({file.format})", *resolved.describe())
    if file.unread:
        say(f"fields that are not read: {', '.join(file.unread)}")
    kept = [places[i] for i in resolved.kept]
    return Facts(resolved.edits, kept, left_out, {**resolved.to_json(), "places": list(places)}, list(file.unread))


def sift(editor: Editor, facts: Facts, options: argparse.Namespace) -> Facts:
    """Leaves out edits that this model's tokenizer cannot make.

    Raises:
        RequestError: there are such, without --skip-bad; or no edit is left.
    """
    bad = editor.check(facts.edits)
    if not bad:
        return facts
    left_out = [{"place": facts.places[i], "reason": f"{facts.places[i]}: {reason}"} for i, reason in bad.items()]
    if not options.skip_bad:
        shown = listed(entry["reason"] for entry in left_out)
        raise RequestError(
            f"{len(bad)} of {len(facts.edits)} edits cannot be made, nothing was changed; correct them or pass "
            "--skip-bad:\n" + "\n".join(shown)
        )
    _report(left_out)
    keep = [i for i in range(len(facts.edits)) if i not in bad]
    if not keep:
        raise RequestError("no edit is left to make; see the reasons above")
    return replace(
        facts,
        edits=[facts.edits[i] for i in keep],
        places=[facts.places[i] for i in keep],
        left_out=facts.left_out + left_out,
    )


def _report(left_out: list[dict[str, str]]) -> None:
    if left_out:
        lines = listed((one["reason"] for one in left_out), where=" (all of them with --json)")
        say(f"{len(left_out)} records left out:", *(f"  {line}" for line in lines))
