"""Duplicate and contradictory edits of one file."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rlsedit_fast.data.edits import Edit, check_list, normalized, prompt_key
from rlsedit_fast.data.read import EditFile
from rlsedit_fast.errors import InputError, RequestError, listed

Conflicts = Literal["later", "first", "keep", "error"]
"""Rules of `resolve`.

Example:
    >>> from typing import get_args
    >>> from rlsedit_fast.data import Conflicts
    >>> get_args(Conflicts)
    ('later', 'first', 'keep', 'error')
"""


@dataclass(frozen=True)
class Resolved:
    """Edits without duplicates and, unless `conflicts="keep"`, without contradictions.

    All indices refer to the edits as given.

    Attributes:
        edits: the edits to apply, in the given order.
        kept: their indices.
        duplicates: `(dropped, kept)` pairs with the same prompt and target.
        contradictions: `(dropped, kept)` pairs with the same prompt and different targets. With `conflicts="keep"`
            nothing is dropped and the pairs are `(earlier, last)`.
        same_subject: groups of two or more kept edits with the same subject; see `EditConfig.same_subject`.
        conflicts: the rule that was applied.
        given: the edits as given.
        places: name of each edit in reports.

    Example:
        >>> from rlsedit_fast import Edit, resolve
        >>> found = resolve([Edit("{} lives in", "Ann", "Rome"), Edit("{} lives in", "Ann", "Rome")])
        >>> found.describe()
        ['duplicates dropped: 1', '  edit 0 dropped: same as edit 1']
    """

    edits: list[Edit]
    kept: list[int]
    duplicates: list[tuple[int, int]]
    contradictions: list[tuple[int, int]]
    same_subject: list[list[int]]
    conflicts: Conflicts
    given: Sequence[Edit]
    places: Sequence[str]

    def describe(self) -> list[str]:
        """Returns lines that list dropped edits, contradictions and shared subjects; empty if there are none."""
        duplicates = [
            f"{self.places[dropped]} dropped: same as {self.places[kept]}" for dropped, kept in self.duplicates
        ]
        contradictions = [self._contradiction(first, second) for first, second in self.contradictions]
        shared = [
            f"{self.given[group[0]].subject!r}: {', '.join(listed(self.places[index] for index in group))}"
            for group in self.same_subject
        ]
        lines: list[str] = []
        for count, what, details in (
            (len(duplicates), "duplicates dropped", duplicates),
            (len(contradictions), "contradictions", contradictions),
            (len(shared), "subjects with several edits", shared),
        ):
            if count:
                lines += [f"{what}: {count}", *(f"  {line}" for line in listed(details))]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Returns the indices as plain lists, JSON-serializable."""
        return {
            "conflicts": self.conflicts,
            "given": len(self.given),
            "kept": list(self.kept),
            "duplicates": [list(pair) for pair in self.duplicates],
            "contradictions": [list(pair) for pair in self.contradictions],
            "same_subject": [list(group) for group in self.same_subject],
        }

    def _contradiction(self, first: int, second: int) -> str:
        state = "kept" if self.conflicts == "keep" else "dropped"
        return (
            f"{self.places[first]} ({self.given[first].target!r}) {state}: {self.places[second]} has the same prompt "
            f"and the target {self.given[second].target!r}"
        )


def resolve(
    edits: Iterable[Edit | Mapping[str, Any]],
    *,
    conflicts: Conflicts = "later",
    places: Sequence[str] | None = None,
) -> Resolved:
    """Finds edits with the same filled prompt, up to white space and Unicode normalization, and keeps one of each.

    An edit whose prompt does not contain its subject is kept and not compared; the editor rejects it with the reason.

    Args:
        edits: any number of edits, as `Edit` or as dicts with its fields, or the result of `read_edits`.
        conflicts: which edit to keep: the `later` or the `first` one, at its own position; `keep` keeps the last edit
            for each target; `error` raises an error for contradictions. Duplicates are always reduced to one: the first
            with `first`, otherwise the last.
        places: name of each edit in reports; by default its position in the file, or else its index, and its name if
            it has one.

    Returns:
        The edits to apply and what was dropped.

    Raises:
        InputError: an unknown rule, or the number of places differs from the number of edits.
        RequestError: there are contradictions and `conflicts` is `error`, `edits` is not a list, or a dict has unknown
            or missing fields.

    Example:
        >>> from rlsedit_fast import Edit, resolve
        >>> edits = [Edit("{} lives in", "Ann", "Rome"), Edit("{} lives in", "Ann", "Oslo")]
        >>> [edit.target for edit in resolve(edits).edits]
        ['Oslo']
    """
    if conflicts not in get_args(Conflicts):
        raise InputError(f"conflicts={conflicts!r}: expected one of {', '.join(get_args(Conflicts))}")
    check_list(edits)
    if places is None and isinstance(edits, EditFile):
        places = edits.places
    return _resolve([_edit(edit, index) for index, edit in enumerate(edits)], conflicts, places)


def _resolve(edits: list[Edit], conflicts: Conflicts, places: Sequence[str] | None) -> Resolved:
    if places is None:
        places = [f"edit {i}{f' ({edit.name})' if getattr(edit, 'name', None) else ''}" for i, edit in enumerate(edits)]
    if len(places) != len(edits):
        raise InputError(f"{len(places)} places for {len(edits)} edits: expected one each")
    by_prompt: dict[object, list[int]] = defaultdict(list)
    for index, edit in enumerate(edits):
        by_prompt[_key(edit, index)].append(index)
    duplicates: list[tuple[int, int]] = []
    contradictions: list[tuple[int, int]] = []
    for group in by_prompt.values():
        same, other = _compare(group, edits, conflicts)
        duplicates += same
        contradictions += other
    duplicates.sort()
    contradictions.sort()
    if contradictions and conflicts == "error":
        lines = (
            f"{places[first]} has the target {edits[first].target!r}, {places[second]} {edits[second].target!r}"
            for first, second in contradictions
        )
        raise RequestError(
            f"{len(contradictions)} of {len(edits)} edits contradict another one with the same prompt; nothing was "
            "modified:\n" + "\n".join(listed(lines)),
            hint="remove one of each pair, or pass --conflicts later or first (Python: conflicts='later')",
        )
    dropped = {index for index, _ in duplicates}
    if conflicts != "keep":
        dropped |= {index for index, _ in contradictions}
    kept = [index for index in range(len(edits)) if index not in dropped]
    by_subject: dict[str, list[int]] = defaultdict(list)
    for index in kept:
        if _is_valid(edits[index]) and edits[index].subject.strip():
            by_subject[normalized(edits[index].subject)].append(index)
    shared = [group for group in by_subject.values() if len(group) > 1]
    return Resolved([edits[i] for i in kept], kept, duplicates, contradictions, shared, conflicts, edits, list(places))


def _edit(given: Edit | Mapping[str, Any], index: int) -> Edit:
    """Returns an edit; invalid values other than dicts are left to the editor."""
    if not isinstance(given, Mapping):
        return given
    try:
        return Edit.from_dict(given)
    except RequestError as error:
        raise RequestError(f"edit {index}: {error.message}") from None


def _compare(
    group: Sequence[int], edits: Sequence[Edit], conflicts: Conflicts
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Returns the duplicates and contradictions among edits with the same prompt."""
    duplicates: list[tuple[int, int]] = []
    contradictions: list[tuple[int, int]] = []
    winner, *rest = group if conflicts == "first" else group[::-1]
    if not rest:
        return duplicates, contradictions
    by_target = {_target(edits[winner]): winner}
    for index in rest:
        target = _target(edits[index])
        if target in by_target:
            duplicates.append((index, by_target[target]))
            continue
        contradictions.append((index, winner))
        if conflicts == "keep":
            by_target[target] = index
    return duplicates, contradictions


def _key(edit: Edit, index: int) -> object:
    """Returns the normalized filled prompt, or the index if the prompt cannot be filled."""
    if not _is_valid(edit):
        return index
    try:
        return prompt_key(edit)
    except RequestError:
        return index


def _is_valid(edit: object) -> bool:
    return isinstance(edit, Edit) and all(isinstance(text, str) for text in (edit.prompt, edit.subject, edit.target))


def _target(edit: Edit) -> str:
    return unicodedata.normalize("NFC", edit.trimmed().target)
