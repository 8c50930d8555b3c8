"""One record's fields, taken out by name; what is wrong with them is collected, so that all of it can be told."""

from __future__ import annotations

import sys
from collections.abc import Sequence, Set
from difflib import get_close_matches
from typing import Any

from rlsedit_fast.editing.formats.source import Doubled
from rlsedit_fast.errors import RequestError
from rlsedit_fast.models.tokens import fill


class Fields:
    """Takes fields out of a JSON object.

    An optional field that is null counts as absent. A faulty field gives an empty value and a trouble.

    Attributes:
        troubles: `(field, reason)`, of this object and of those inside it.
        taken: the fields that were asked for, with their path: `requested_rewrite.prompt`.
    """

    def __init__(self, record: object, *, path: str = "", parent: Fields | None = None) -> None:
        """The fields of `record`, which lies at `path` in its record; troubles are the parent's too."""
        self._path = path
        self.troubles: list[tuple[str, str]] = [] if parent is None else parent.troubles
        self.taken: set[str] = set() if parent is None else parent.taken
        self._record: dict[str, Any] = record if isinstance(record, dict) else {}
        self._readable = isinstance(record, dict)  # where there is no object, one trouble says so
        self._meant: set[str] = set()
        if isinstance(record, Doubled):
            for name in record.twice:
                self.trouble(name, "stands more than once; keep one")
        elif not self._readable and (parent is None or parent._readable):
            self.trouble("", "missing" if record is None and path else f"expected a JSON object, got {_shown(record)}")

    def trouble(self, name: str, reason: str) -> None:
        """Notes what is wrong with a field; `""` for the object itself."""
        self.troubles.append((self._name(name), reason))

    def allow_only(self, names: Sequence[str]) -> None:
        """Notes each field that is not among `names`, with the one that was probably meant."""
        for name in self._record:
            if name in names:
                continue
            near = [match for match in get_close_matches(name, names, n=len(names)) if match not in self._record]
            self._meant.update(near[:1])
            hint = f"did you mean {near[0]!r}?" if near else f"expected: {', '.join(names)}"
            self.trouble(name, f"unknown field; {hint}")

    def text(self, name: str) -> str:
        """A text that must be there and must not be blank."""
        return self._text(name, self._take(name))

    def first(self, name: str) -> str:
        """The first text of a list that must be there."""
        values = self.listed(name)
        return self._text(name, values[0]) if values else ""

    def texts(self, *names: str) -> tuple[str, ...]:
        """The texts of optional fields, each a text or a list of texts."""
        found: list[str] = []
        for name in names:
            value = self._take(name)
            if value is None:
                continue
            listed = value if isinstance(value, list) else [value]
            wrong = [item for item in listed if not isinstance(item, str) or not item.strip()]
            if wrong:
                self.trouble(name, f"expected texts that are not blank, got {_shown(wrong[0])}")
            else:
                found += listed
        return tuple(found)

    def label(self, name: str) -> str | None:
        """An optional text or whole number, as a text."""
        value = self._take(name)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        self.trouble(name, f"expected a text or a whole number, got {_shown(value)}")
        return None

    def weight(self, name: str) -> float:
        """An optional positive number, 1 where it is absent."""
        value = self._take(name)
        if value is None:
            return 1.0
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
            return float(value)
        self.trouble(name, f"expected a finite number above 0, got {_shown(value)}")
        return 1.0

    def span(self, name: str, text: str) -> tuple[int, int] | None:
        """An optional `[start, stop]` within `text`."""
        value = self._take(name)
        if value is None:
            return None
        whole = isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value)
        if whole and 0 <= value[0] < value[1] and (not text or value[1] <= len(text)):
            return value[0], value[1]
        self.trouble(
            name,
            f"expected [start, stop], characters of the filled prompt ({len(text)} of them), got {_shown(value)}",
        )
        return None

    def inner(self, name: str) -> Fields:
        """The object in a field that must be there."""
        return Fields(self._take(name), path=self._name(name), parent=self)

    def listed(self, name: str) -> list[Any]:
        """The values of a list that must be there and must not be empty."""
        value = self._take(name)
        if isinstance(value, list) and value:
            return value
        if self._readable:
            self.trouble(
                name, "missing" if value is None else f"expected a list of at least one entry, got {_shown(value)}"
            )
        return []

    def filled(self, name: str, prompt: str, subject: str) -> str:
        """The prompt with its subject; `""`, and a trouble at field `name`, where there is no place for it."""
        if not prompt or not subject:
            return ""
        try:
            return fill(prompt, subject)[0]
        except RequestError as error:
            self.trouble(name, str(error))
            return ""

    def _text(self, name: str, value: object) -> str:
        if isinstance(value, str) and value.strip():
            return value
        if value is None:
            if self._readable and name not in self._meant:
                self.trouble(name, "missing")
        elif isinstance(value, str):
            self.trouble(name, f"is blank ({value!r})")
        else:
            self.trouble(name, f"expected a text, got {_shown(value)}")
        return ""

    def _take(self, name: str) -> Any:
        self.taken.add(self._name(name))
        return self._record.get(name)

    def _name(self, name: str) -> str:
        return ".".join(part for part in (self._path, name) if part)


def unread(value: object, taken: Set[str], path: str = "") -> set[str]:
    """The paths of the fields of a JSON value that are not among those taken; of an unread object, its own alone."""
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
