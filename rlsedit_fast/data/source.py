"""Reads the JSON values of a file with their positions; the file is a JSON list or has one value per line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any

from rlsedit_fast.errors import RequestError

_BLANK = re.compile(r"[ \t\r\n]*")


class DuplicateKeys(dict[str, Any]):
    """A JSON object with repeated fields, of which `json` would silently keep the last.

    Attributes:
        duplicates: names of the repeated fields.
    """

    duplicates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Value:
    """One JSON value of a file.

    Attributes:
        place: `facts.jsonl:12`, or `facts.json:12 (record 3)` in a list; line and record count from 1.
        content: the value.
        error: reason why there is no value, if a line is not valid JSON.
    """

    place: str
    content: Any
    error: str | None = None


def load(path: Path) -> list[Value]:
    """Returns all values of a UTF-8 file, in order.

    Raises:
        RequestError: the file cannot be read, is not UTF-8, is empty, or is a list that is not valid JSON.
    """
    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        raise RequestError(f"{path} is a directory; pass a file of edits") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}; pass a file of edits") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"{path}: byte 0x{raw[error.start]:02x} in line {line} is not UTF-8; save the file as UTF-8"
        ) from None
    if not text.strip():
        raise RequestError(f"{path} is empty; expected a JSON list of records, or one record per line")
    decoder = JSONDecoder(object_pairs_hook=_object)
    start = _skip(text, 0)
    values = list(_listed(path, text, start, decoder) if text[start] == "[" else _lines(path, text, decoder))
    if not values:
        raise RequestError(f"{path} contains an empty list; expected at least one record")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    names = [name for name, _ in pairs]
    repeated = DuplicateKeys(fields)
    repeated.duplicates = tuple(name for name in fields if names.count(name) > 1)
    return repeated


def _skip(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    assert found is not None
    return found.end()


def _lines(path: Path, text: str, decoder: JSONDecoder) -> Iterator[Value]:
    # Not splitlines(): JSON strings may contain U+2028 and similar.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            yield Value(place, decoder.decode(line))
        except JSONDecodeError as error:
            yield Value(place, None, f"invalid JSON at column {error.colno}: {error.msg}")


def _listed(path: Path, text: str, at: int, decoder: JSONDecoder) -> Iterator[Value]:
    """Yields the values of a list one by one, to know the line of each."""
    line, counted = 1, 0
    number = 0
    try:
        at = _skip(text, at + 1)
        more = text[at : at + 1] != "]"
        while more:
            number += 1
            line, counted = line + text.count("\n", counted, at), at
            content, at = decoder.raw_decode(text, at)
            yield Value(f"{path.name}:{line} (record {number})", content)
            at = _skip(text, at)
            more = text[at : at + 1] == ","
            if more:
                at = _skip(text, at + 1)
            elif text[at : at + 1] != "]":
                raise JSONDecodeError("Expecting ',' or ']'", text, at)
        at = _skip(text, at + 1)
        if at < len(text):
            raise JSONDecodeError("Extra data after the list", text, at)
    except JSONDecodeError as error:
        raise RequestError(
            f"{path}: invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}; correct the file"
        ) from None
