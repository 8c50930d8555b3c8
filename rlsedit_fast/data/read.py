"""Reads edits from a file; every record becomes an edit or is reported as skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rlsedit_fast.data.edits import Edit
from rlsedit_fast.data.fields import unread
from rlsedit_fast.data.layouts import FORMATS, Format, ZsreTarget, detect, layout
from rlsedit_fast.data.source import load
from rlsedit_fast.errors import InputError, RequestError, listed


@dataclass(frozen=True)
class Skipped:
    """An invalid record, or an invalid part of one.

    Attributes:
        place: position in the file: `facts.jsonl:12`, `facts.json:12 (record 3)`.
        field: the first invalid field; None if the record as a whole is invalid.
        reason: the problem of that field, and those of further fields.

    Example:
        >>> from rlsedit_fast.data import Skipped
        >>> print(Skipped("facts.jsonl:3", "target", "missing"))
        facts.jsonl:3: target: missing
    """

    place: str
    field: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason if self.field is None else f'{self.field}: {self.reason}'}"


@dataclass(frozen=True)
class EditFile:
    """Contents of a file of edits.

    Attributes:
        edits: the edits, in file order.
        skipped: invalid records, with `strict=False`.
        places: position of each edit in the file.
        format: format of the file.
        unread: fields that are ignored, such as the answer before the edit.

    Example:
        >>> import json, tempfile
        >>> from rlsedit_fast import read_edits
        >>> record = {"prompt": "Ann lives in", "subject": "Ann", "target_new": "Rome", "ground_truth": "Oslo"}
        >>> with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        ...     json.dump([record], file)
        ...     file.flush()
        ...     found = read_edits(file.name)
        >>> found.format, len(found.edits), found.unread
        ('counterfact', 1, ['ground_truth'])
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
    """Reads a UTF-8 file of edits: a JSON list of records, or one record per line (blank lines are ignored).

    | format | fields |
    |---|---|
    | `edits` | `prompt`, `subject`, `target`; optional `name`, `weight`, `paraphrases`, `neighborhood`, `span` |
    | `counterfact` | `case_id`, `requested_rewrite` (`prompt`, `subject`, `target_new.str`), `paraphrase_prompts`, \
`neighborhood_prompts`; or EasyEdit's `prompt`, `subject`, `target_new`, `rephrase_prompt`, `locality_prompt` |
    | `zsre` | `src`, `subject`, `alt` or `answers`, `rephrase`, `loc` |
    | `mquake` | `case_id`, and in each `requested_rewrite`: `prompt`, `subject`, `target_new.str`, `question` |

    An unknown field is an error in `edits` and is listed as unread in the other formats. A prompt has `{}` in place of
    the subject or contains the subject; the same holds for paraphrases. Conflicts between edits are not checked here,
    see `rlsedit_fast.data.resolve`.

    Args:
        path: the file.
        format: one of the formats above, or `auto` to detect it from the fields of the first records.
        strict: raise an error if a record is invalid. If False, invalid records are listed as skipped.
        zsre_target: field of zsRE that is used as the target: `alt`, a counterfactual answer, as in MEND and EasyEdit,
            or the first of `answers`, as in ROME, MEMIT and AlphaEdit. Published results are comparable only under the
            same choice.

    Returns:
        The edits, the skipped records and the ignored fields.

    Raises:
        RequestError: the file cannot be read, is not JSON, or has an invalid record; names file, line and field.
        InputError: an unknown format or target.

    Example:
        >>> import json, tempfile
        >>> from rlsedit_fast import read_edits
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write(json.dumps({"prompt": "{} lives in", "subject": "Ann", "target": "Rome"}))
        ...     file.flush()
        ...     read_edits(file.name).format
        'edits'
    """
    if format not in (*FORMATS, "auto"):
        raise InputError(f"format={format!r}: expected auto, {', '.join(FORMATS)}")
    if zsre_target not in get_args(ZsreTarget):
        raise InputError(f"zsre_target={zsre_target!r}: expected {' or '.join(get_args(ZsreTarget))}")
    path = Path(path)
    values = load(path)
    found = detect([value.content for value in values]) if format == "auto" else format
    drafts_of = layout(found, zsre_target)
    edits: list[Edit] = []
    places: list[str] = []
    skipped: list[Skipped] = []
    taken: set[str] = set()
    for value in values:
        if value.error is not None:
            skipped.append(Skipped(value.place, None, value.error))
            continue
        for draft in drafts_of(value.content):
            place = f"{value.place}, {draft.part}" if draft.part else value.place
            taken |= draft.fields.taken
            if draft.fields.problems:
                skipped.append(_skip(place, draft.fields.problems))
            else:
                edits.append(draft.edit)
                places.append(place)
    if skipped and strict:
        detected = f" (detected from its fields; others: {', '.join(FORMATS)})" if format == "auto" else ""
        raise RequestError(
            f"{path}, read as {found!r}{detected}: {len(skipped)} of {len(skipped) + len(edits)} edits are invalid; no "
            "edit was read:\n" + "\n".join(listed(skipped)),
            hint="correct these records, or pass --skip-bad to skip them (Python: strict=False)",
        )
    ignored = set[str]().union(*(unread(value.content, taken) for value in values)) if found != "edits" else set()
    return EditFile(edits, skipped, places, found, sorted(ignored))


def load_edits(path: str | Path, **options: Any) -> list[Edit]:
    """Returns the edits of a file; shorthand for `read_edits(path, ...).edits`.

    Args:
        path: the file.
        **options: keyword arguments of `read_edits`.

    Returns:
        The edits, in file order.

    Raises:
        RequestError: see `read_edits`.
        InputError: see `read_edits`.

    Example:
        >>> import json, tempfile
        >>> from rlsedit_fast import load_edits
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write(json.dumps({"prompt": "{} lives in", "subject": "Ann", "target": "Rome"}))
        ...     file.flush()
        ...     load_edits(file.name)[0].target
        'Rome'
    """
    return read_edits(path, **options).edits


def _skip(place: str, problems: Sequence[tuple[str, str]]) -> Skipped:
    (field, reason), *more = problems
    return Skipped(place, field or None, "; ".join([reason, *(f"{name}: {why}" for name, why in more)]))
