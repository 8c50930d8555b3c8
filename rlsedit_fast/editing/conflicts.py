"""Edits that ask the same thing: which of them are to be made, and what became of the others."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rlsedit_fast.editing.edits import Edit
from rlsedit_fast.errors import InputError, RequestError, listed
from rlsedit_fast.models.tokens import fill

Conflicts = Literal["later", "first", "keep", "error"]


@dataclass(frozen=True)
class Resolved:
    """Edits without duplicates, and without contradictions unless these were to be kept.

    All indices are into the edits as given.

    Attributes:
        edits: those that are to be made, in the order given.
        kept: their indices.
        duplicates: `(dropped, kept)`: the same prompt and target.
        contradictions: `(dropped, kept)`: the same prompt and another target. With `keep` nothing is dropped, and the
            pair is `(earlier, last)`.
        same_subject: kept edits about one subject, two or more each: what is made of them is
            `EditConfig.same_subject`.
        conflicts: the rule that was followed.
        given: the edits as given.
        places: what to call each of them in a report.
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
        """Lines that say what was dropped, what contradicts, and which edits share a subject; none if nothing did."""
        duplicates = [
            f"{self.places[dropped]} dropped: {self.places[kept]} says the same" for dropped, kept in self.duplicates
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
        """The same as plain lists and numbers, complete."""
        return {
            "conflicts": self.conflicts,
            "given": len(self.given),
            "kept": list(self.kept),
            "duplicates": [list(pair) for pair in self.duplicates],
            "contradictions": [list(pair) for pair in self.contradictions],
            "same_subject": [list(group) for group in self.same_subject],
        }

    def _contradiction(self, first: int, second: int) -> str:
        what = (
            f"{self.places[first]} ({self.given[first].target!r}) {'kept' if self.conflicts == 'keep' else 'dropped'}"
        )
        return f"{what}: {self.places[second]} asks the same and says {self.given[second].target!r}"


def resolve(edits: Sequence[Edit], *, conflicts: Conflicts = "later", places: Sequence[str] | None = None) -> Resolved:
    """Finds edits whose filled prompts agree, up to white space and Unicode's composed forms, and keeps one of each.

    An edit whose prompt has no place for its subject is kept and compared with none: the editor refuses it, with the
    reason.

    Args:
        edits: any number.
        conflicts: which of several stays: the `later` or the `first`, at its own place; `keep` keeps the last one of
            each target, so that contradictory ones follow one another; `error` refuses contradictions. Duplicates are
            always reduced to one: the first with `first`, else the last.
        places: what to call each edit in a report, as `EditFile.places`; by default its index, and its name if it has
            one.

    Raises:
        InputError: an unknown rule, or not one place per edit.
        RequestError: contradictions, with `error`.
    """
    if conflicts not in get_args(Conflicts):
        raise InputError(f"conflicts={conflicts!r}: expected one of {', '.join(get_args(Conflicts))}")
    if places is None:
        places = [f"edit {i}{f' ({edit.name})' if getattr(edit, 'name', None) else ''}" for i, edit in enumerate(edits)]
    if len(places) != len(edits):
        raise InputError(f"{len(places)} places for {len(edits)} edits: expected one each")
    asked: dict[object, list[int]] = defaultdict(list)
    for index, edit in enumerate(edits):
        asked[_question(edit, index)].append(index)
    duplicates: list[tuple[int, int]] = []
    contradictions: list[tuple[int, int]] = []
    for group in asked.values():
        same, other = _compare(group, edits, conflicts)
        duplicates += same
        contradictions += other
    duplicates.sort()
    contradictions.sort()
    if contradictions and conflicts == "error":
        lines = (
            f"{places[first]} says {edits[first].target!r}, {places[second]} {edits[second].target!r}"
            for first, second in contradictions
        )
        raise RequestError(
            f"{len(contradictions)} of {len(edits)} edits contradict another one with the same prompt; nothing was "
            "modified:\n" + "\n".join(listed(lines)),
            hint="remove one of each pair, or pass --conflicts later or first (Python: conflicts='later')",
        )
    gone = {index for index, _ in duplicates}
    if conflicts != "keep":
        gone |= {index for index, _ in contradictions}
    kept = [index for index in range(len(edits)) if index not in gone]
    about: dict[str, list[int]] = defaultdict(list)
    for index in kept:
        if _sound(edits[index]):
            about[composed(edits[index].subject)].append(index)
    shared = [group for group in about.values() if len(group) > 1]
    return Resolved(
        [edits[i] for i in kept], kept, duplicates, contradictions, shared, conflicts, list(edits), list(places)
    )


def _compare(
    group: Sequence[int], edits: Sequence[Edit], conflicts: Conflicts
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Duplicates and contradictions among edits that ask the same."""
    duplicates: list[tuple[int, int]] = []
    contradictions: list[tuple[int, int]] = []
    winner, *rest = group if conflicts == "first" else group[::-1]
    if not rest:
        return duplicates, contradictions
    said = {_target(edits[winner]): winner}
    for index in rest:
        target = _target(edits[index])
        if target in said:
            duplicates.append((index, said[target]))
            continue
        contradictions.append((index, winner))
        if conflicts == "keep":
            said[target] = index
    return duplicates, contradictions


def _question(edit: Edit, index: int) -> object:
    """What an edit asks, the same for edits that ask the same; the index where that cannot be told."""
    if not _sound(edit):
        return index
    try:
        return composed(fill(edit.prompt, edit.subject)[0])
    except RequestError:
        return index


def _sound(edit: object) -> bool:
    return isinstance(edit, Edit) and all(isinstance(text, str) for text in (edit.prompt, edit.subject, edit.target))


def _target(edit: Edit) -> str:
    return unicodedata.normalize("NFC", edit.target).strip()


def composed(text: str) -> str:
    """The text in Unicode's composed forms, its white space single blanks: equal for texts that read the same."""
    return " ".join(unicodedata.normalize("NFC", text).split())
