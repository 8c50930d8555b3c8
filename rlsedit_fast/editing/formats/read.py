"""Edits from a file: every record is read or accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rlsedit_fast.editing.edits import Edit
from rlsedit_fast.editing.formats.fields import unread
from rlsedit_fast.editing.formats.layouts import FORMATS, Format, ZsreTarget, layout, recognise
from rlsedit_fast.editing.formats.source import load
from rlsedit_fast.errors import InputError, RequestError, listed


@dataclass(frozen=True)
class Skipped:
    """A record, or a part of one, of which no edit was made.

    Attributes:
        place: where it stands: `facts.jsonl:12`, `facts.json:12 (record 3)`.
        field: the field at fault, the first of several; None where it is the record as a whole.
        reason: what is wrong with it, and with further fields.
    """

    place: str
    field: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason if self.field is None else f'{self.field}: {self.reason}'}"


@dataclass(frozen=True)
class EditFile:
    """What a file holds.

    Attributes:
        edits: in the file's order.
        skipped: what was left out, with `strict=False`.
        places: of each edit, where it stands.
        format: how the file was read.
        unread: fields that the format does not read or editing does not need, such as the answer before the edit.
    """

    edits: list[Edit]
    skipped: list[Skipped]
    places: list[str]
    format: Format
    unread: list[str]


def read_edits(
    path: str | Path,
    *,
    format: Format | Literal["auto"] = "auto",
    strict: bool = True,
    zsre_target: ZsreTarget = "alt",
) -> EditFile:
    """Reads a file of edits: a JSON list of records, or a record a line (blank lines are passed over), in UTF-8.

    | format | fields that are read |
    |---|---|
    | `edits` | `prompt`, `subject`, `target`; if there, `id`, `weight`, `paraphrases`, `neighborhood`, `span` |
    | `counterfact` | `case_id`, `requested_rewrite` (`prompt`, `subject`, `target_new.str`), `paraphrase_prompts`, \
`neighborhood_prompts`; or EasyEdit's `prompt`, `subject`, `target_new`, `rephrase_prompt`, `locality_prompt` |
    | `zsre` | `src`, `subject`, `alt` or `answers`, `rephrase`, `loc` |
    | `mquake` | `case_id`, and of each of `requested_rewrite`: `prompt`, `subject`, `target_new.str`, `question` |

    An unknown field is an error in `edits`, and is listed as unread in the others. A prompt has `{}` where the subject
    stands, or contains the subject; `{}` in the `paraphrases` of `edits` is the subject too. Whether edits contradict
    one another is not looked at here: see `rlsedit_fast.editing.conflicts`.

    Args:
        path: the file.
        format: one of these, or `auto`: told from the fields of the first records.
        strict: whether one bad record makes the whole file an error. Otherwise such records are listed as skipped.
        zsre_target: which field of zsRE is taught: `alt`, a false answer, as MEND and EasyEdit do, or the first of
            `answers`, as ROME, MEMIT and AlphaEdit do. Compare published figures only under the same choice.

    Raises:
        RequestError: naming file, line and field: no readable file, not JSON, or a bad record.
        InputError: an unknown format or target.
    """
    if format not in (*FORMATS, "auto"):
        raise InputError(f"format={format!r}: expected auto, {', '.join(FORMATS)}")
    if zsre_target not in get_args(ZsreTarget):
        raise InputError(f"zsre_target={zsre_target!r}: expected {' or '.join(get_args(ZsreTarget))}")
    path = Path(path)
    values = load(path)
    found = recognise([value.content for value in values]) if format == "auto" else format
    drafts_of = layout(found, zsre_target)
    edits: list[Edit] = []
    places: list[str] = []
    skipped: list[Skipped] = []
    taken: set[str] = set()
    for value in values:
        if value.trouble is not None:
            skipped.append(Skipped(value.place, None, value.trouble))
            continue
        for draft in drafts_of(value.content):
            place = f"{value.place}, {draft.part}" if draft.part else value.place
            taken |= draft.fields.taken
            if draft.fields.troubles:
                skipped.append(_skip(place, draft.fields.troubles))
            else:
                edits.append(draft.edit)
                places.append(place)
    if skipped and strict:
        told = f", the format told from its fields (others: {', '.join(FORMATS)})" if format == "auto" else ""
        raise RequestError(
            f"{path}, read as {found!r}{told}: {len(skipped)} of {len(skipped) + len(edits)} edits cannot be read, and "
            "none was taken; correct them, or pass strict=False to leave them out:\n" + "\n".join(listed(skipped))
        )
    left = set[str]().union(*(unread(value.content, taken) for value in values)) if found != "edits" else set()
    return EditFile(edits, skipped, places, found, sorted(left))


def _skip(place: str, troubles: Sequence[tuple[str, str]]) -> Skipped:
    (field, reason), *more = troubles
    return Skipped(place, field or None, "; ".join([reason, *(f"{name}: {why}" for name, why in more)]))
