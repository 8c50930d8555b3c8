"""Reads edits from a file; every record becomes an edit or is reported as skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args, overload

from rlsedit_fast.data.edits import Edit
from rlsedit_fast.data.fields import unread
from rlsedit_fast.data.layouts import FORMATS, Format, ZsreTarget, detect, layout
from rlsedit_fast.data.source import json_values, read_text
from rlsedit_fast.data.table import is_table, read_table
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
class EditFile(Sequence[Edit]):
    """Contents of a file of edits: a sequence of edits, which `Editor.edit` and `resolve` accept.

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
        >>> found.format, len(found), found.unread
        ('counterfact', 1, ['ground_truth'])
        >>> [edit.target for edit in found]
        ['Rome']
    """

    edits: list[Edit]
    skipped: list[Skipped]
    places: list[str]
    format: Format
    unread: list[str]

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    @overload
    def __getitem__(self, index: int) -> Edit: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Edit]: ...

    def __getitem__(self, index: int | slice) -> Edit | Sequence[Edit]:
        return self.edits[index]


def read_edits(
    path: str | Path | IO[str] | IO[bytes],
    *,
    format: Format | Literal["auto"] = "auto",
    strict: bool = True,
    zsre_target: ZsreTarget = "alt",
) -> EditFile:
    """Reads a UTF-8 file of edits.

    The file is a JSON list of records, has one JSON record per line (JSON Lines), or is a CSV or TSV table with a
    header line. Blank lines and empty rows are ignored.

    | format | fields |
    |---|---|
    | `edits` | `prompt`, `target`, or `messages`; optional `subject`, `name` (or `id`), `weight`, `paraphrases`, \
`neighborhood`, `span`, `join` |
    | `counterfact` | `case_id`, `requested_rewrite` (`prompt`, `subject`, `target_new.str`), `paraphrase_prompts`, \
`neighborhood_prompts`; or EasyEdit's `prompt`, `subject`, `target_new`, `rephrase_prompt`, `locality_prompt` |
    | `zsre` | `src`, `subject`, `alt` or `answers`, `rephrase`, `loc` |
    | `mquake` | `case_id`, and in each `requested_rewrite`: `prompt`, `subject`, `target_new.str`, `question` |

    An unknown field is an error in `edits` and is listed as unread in the other formats. A prompt has `{}` in place of
    the subject or contains the subject; the same holds for paraphrases. Conflicts between edits are not checked here,
    see `rlsedit_fast.data.resolve`.

    A table has the fields as columns, in upper or lower case, separated by commas, semicolons or tabs. Other columns
    are listed as unread. A cell of several paraphrases or neighborhood prompts separates them by `|` or is a JSON list.

    Args:
        path: the file, or an open file.
        format: one of the formats above, or `auto` to detect it from the fields of the first records.
        strict: raise an error if a record is invalid. If False, invalid records are listed as skipped.
        zsre_target: field of zsRE that is used as the target: `alt`, a counterfactual answer, as in MEND and EasyEdit,
            or the first of `answers`, as in ROME, MEMIT and AlphaEdit. Published results are comparable only under the
            same choice.

    Returns:
        The edits, the skipped records and the ignored fields.

    Raises:
        RequestError: the file cannot be read, is neither JSON nor a table, or has an invalid record; names file, line
            and field.
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
        raise InputError(
            f"format={format!r}: expected auto, {', '.join(FORMATS)}; JSON, CSV and TSV are detected and have no format"
        )
    if zsre_target not in get_args(ZsreTarget):
        raise InputError(f"zsre_target={zsre_target!r}: expected {' or '.join(get_args(ZsreTarget))}")
    label, name, text = read_text(path)
    values = read_table(label, name, text) if is_table(name, text) else json_values(label, name, text)
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
        detected = (
            f" (detected from its fields; others: {', '.join(name for name in FORMATS if name != found)})"
            if format == "auto"
            else ""
        )
        skip = ", or pass --skip-bad to skip them (Python: strict=False)" if edits else ""
        raise RequestError(
            f"{label}, read as {found!r}{detected}: {len(skipped)} of {len(skipped) + len(edits)} edits are invalid; "
            "no edit was read:\n" + "\n".join(_listed(skipped, every=not edits)),
            hint=f"correct these records{skip}",
        )
    ignored = set[str]().union(*(unread(value.content, taken) for value in values))
    return EditFile(edits, skipped, places, found, sorted(ignored))


def edit_from_record(record: Mapping[str, Any], *, place: str) -> Edit:
    """Returns the edit of one record in the format `edits`.

    Args:
        record: its fields.
        place: name of the record in errors.

    Raises:
        RequestError: the record is invalid.
    """
    (draft,) = layout("edits", "alt")(dict(record))
    if draft.fields.problems:
        raise RequestError(str(_skip(place, draft.fields.problems)))
    return draft.edit


def load_edits(path: str | Path | IO[str] | IO[bytes], **options: Any) -> list[Edit]:
    """Returns the edits of a file; shorthand for `read_edits(path, ...).edits`.

    Args:
        path: the file, or an open file.
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


def _listed(skipped: Sequence[Skipped], *, every: bool) -> list[str]:
    """Returns the lines that list invalid records; a single line if every record of the file has the same problem."""
    same = {(one.field, one.reason) for one in skipped}
    if every and len(skipped) > 1 and len(same) == 1:
        return [f"{skipped[0]} (and the same in all others)"]
    return listed(skipped)
