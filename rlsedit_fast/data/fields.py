"""Typed access to the fields of one record; all problems of the record are collected and reported together."""

from __future__ import annotations

from collections.abc import Sequence, Set
from difflib import get_close_matches
from typing import Any

from rlsedit_fast.data.edits import invalid_weight
from rlsedit_fast.data.source import DuplicateKeys
from rlsedit_fast.data.table import Row
from rlsedit_fast.errors import RequestError
from rlsedit_fast.models.conversations import Message, invalid_messages
from rlsedit_fast.models.tokens import fill

_SIMILAR = 0.6  # ratio of difflib above which a known name is suggested for an unknown field
_MISSPELLED = 0.85  # the same for columns of tables, where unknown names are common


class Fields:
    """Reads fields of a JSON object.

    An optional field that is null counts as absent. An invalid field gives an empty value and adds a problem.

    Attributes:
        problems: `(field, reason)` of this object and of the objects nested in it.
        taken: fields that were read, with their path: `requested_rewrite.prompt`.
    """

    def __init__(self, record: object, *, path: str = "", parent: Fields | None = None) -> None:
        """Wraps the object `record` at `path` of the whole record; its problems are added to those of `parent`."""
        self._path = path
        self.problems: list[tuple[str, str]] = [] if parent is None else parent.problems
        self.taken: set[str] = set() if parent is None else parent.taken
        self._record: dict[str, Any] = record if isinstance(record, dict) else {}
        self._readable = isinstance(record, dict)  # a missing object is reported once, not once per field
        self._suggested: set[str] = set()
        if isinstance(record, DuplicateKeys):
            for name in record.duplicates:
                self.problem(name, "given more than once; keep one")
        elif not self._readable and (parent is None or parent._readable):
            self.problem("", "missing" if record is None and path else f"expected a JSON object, got {_shown(record)}")

    def problem(self, name: str, reason: str) -> None:
        """Adds a problem of a field; `""` stands for the object itself."""
        self.problems.append((self._name(name), reason))

    def exclude(self, names: Sequence[str], other: str) -> None:
        """Adds a problem for each of some fields that is given although `other` is given as well."""
        for name in names:
            if self._take(name) is not None:
                self.problem(name, f"cannot be combined with {other}; omit one of them")

    def allow_only(self, names: Sequence[str]) -> None:
        """Adds a problem for each field that is not among `names`, with a suggestion.

        Columns of a table are allowed, except probable misspellings.
        """
        table = isinstance(self._record, Row)
        for name in self._record:
            if name in names:
                continue
            similar = get_close_matches(name, names, n=len(names), cutoff=_MISSPELLED if table else _SIMILAR)
            near = [match for match in similar if match not in self._record]
            if table and not near:
                continue
            self.taken.add(self._name(name))
            self._suggested.update(near[:1])
            hint = f"did you mean {near[0]!r}?" if near else f"expected: {', '.join(names)}"
            self.problem(name, f"unknown field; {hint}")

    def text(self, name: str) -> str:
        """Returns a required string that must not be blank."""
        return self._text(name, self._take(name))

    def optional(self, name: str) -> str:
        """Returns an optional string, empty if it is absent or blank."""
        value = self._take(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        return self._text(name, value)

    def choice(self, name: str, allowed: Sequence[Any]) -> Any:
        """Returns an optional value, one of `allowed`; None if absent."""
        value = self._take(name)
        if value is not None and value not in allowed:
            self.problem(name, f"expected {', '.join(map(str, allowed))}, got {_shown(value)}")
            return None
        return value

    def messages(self, name: str) -> tuple[Message, ...] | None:
        """Returns the messages of an optional conversation that ends with an answer; None if absent or invalid."""
        value = self._take(name)
        if value is None:
            return None
        if reason := invalid_messages(value):
            self.problem(name, reason)
            return None
        self.taken |= {f"{self._name(name)}.role", f"{self._name(name)}.content"}
        return tuple(dict(message) for message in value)

    def first(self, name: str) -> str:
        """Returns the first string of a required list."""
        values = self.listed(name)
        return self._text(name, values[0]) if values else ""

    def texts(self, *names: str) -> tuple[str, ...]:
        """Returns the strings of optional fields, each a string or a list of strings."""
        found: list[str] = []
        for name in names:
            value = self._take(name)
            if value is None:
                continue
            listed = value if isinstance(value, list) else [value]
            wrong = [item for item in listed if not isinstance(item, str) or not item.strip()]
            if wrong:
                self.problem(name, f"expected non-blank strings, got {_shown(wrong[0])}")
            else:
                found += listed
        return tuple(found)

    def label(self, *names: str) -> str | None:
        """Returns the first of some optional fields that is given, a string or an integer, as a string."""
        name = next((name for name in names if self._record.get(name) is not None), names[0])
        value = self._take(name)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        self.problem(name, f"expected a string or an integer, got {_shown(value)}")
        return None

    def weight(self, name: str) -> float:
        """Returns an optional weight of an edit, 1 if absent."""
        value = self._take(name)
        if value is None:
            return 1.0
        if reason := invalid_weight(value):
            self.problem(name, reason)
            return 1.0
        return float(value)

    def span(self, name: str, text: str) -> tuple[int, int] | None:
        """Returns an optional `[start, stop]`, character positions in `text`."""
        value = self._take(name)
        if value is None:
            return None
        whole = isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value)
        if whole and 0 <= value[0] < value[1] and (not text or value[1] <= len(text)):
            return value[0], value[1]
        self.problem(
            name,
            f"expected [start, stop], positions in the filled prompt ({len(text)} characters), got {_shown(value)}",
        )
        return None

    def inner(self, name: str) -> Fields:
        """Returns the object in a required field."""
        return Fields(self._take(name), path=self._name(name), parent=self)

    def listed(self, name: str) -> list[Any]:
        """Returns the values of a required list that must not be empty."""
        value = self._take(name)
        if isinstance(value, list) and value:
            return value
        if self._readable:
            self.problem(
                name, "missing" if value is None else f"expected a list of at least one entry, got {_shown(value)}"
            )
        return []

    def filled(self, name: str, prompt: str, subject: str) -> str:
        """Returns the prompt with its subject filled in; adds a problem to field `name` if that is impossible."""
        if not prompt or (not subject and "{}" in prompt):  # the missing subject is a problem of its own
            return ""
        try:
            return fill(prompt, subject)[0]
        except RequestError as error:
            self.problem(name, str(error))
            return ""

    def _text(self, name: str, value: object) -> str:
        if isinstance(value, str) and value.strip():
            return value
        if value is None:
            if self._readable and name not in self._suggested:
                about = "; name the words of the prompt that the fact is about" if name == "subject" else ""
                self.problem(name, f"missing{about}")
        elif isinstance(value, str):
            self.problem(name, f"is blank ({value!r})")
        else:
            self.problem(name, f"expected a string, got {_shown(value)}")
        return ""

    def _take(self, name: str) -> Any:
        self.taken.add(self._name(name))
        return self._record.get(name)

    def _name(self, name: str) -> str:
        return ".".join(part for part in (self._path, name) if part)


def unread(value: object, taken: Set[str], path: str = "") -> set[str]:
    """Returns the paths of the fields of a JSON value that are not in `taken`, without those below an unread object."""
    if isinstance(value, list):
        return set().union(*(unread(item, taken, path) for item in value))
    if not isinstance(value, dict):
        return set()
    found: set[str] = set()
    for name, content in value.items():
        inside = f"{path}.{name}" if path else name
        found |= unread(content, taken, inside) if inside in taken else {inside}
    return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
