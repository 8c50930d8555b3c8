"""Reads the text of a file, and its JSON values with their positions: a JSON list or one value per line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import IO, Any

from rlsedit_fast.errors import RequestError

EXPECTED = (
    "JSON Lines or a JSON list of records with prompt, subject and target, or CSV or TSV with a header line such as "
    "prompt,subject,target"
)
"""Description of the accepted files."""

_BLANK = re.compile(r"[ \t\r\n]*")
_BINARY = (
    (b"PK\x03\x04", "a zip archive, such as an Excel workbook", "save the sheet as CSV UTF-8, or unpack the archive"),
    (b"\x1f\x8b", "compressed with gzip", "decompress it"),
    (b"PAR1", "a Parquet file", "convert it to JSON Lines or CSV"),
)


class DuplicateKeys(dict[str, Any]):
    """A JSON object with repeated fields, of which `json` would silently keep the last.

    Attributes:
        duplicates: names of the repeated fields.
    """

    duplicates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Value:
    """One record of a file.

    Attributes:
        place: `facts.jsonl:12`, or `facts.json:12 (record 3)` in a list; line and record count from 1.
        content: the value.
        error: reason why there is no value, if a line is invalid.
    """

    place: str
    content: Any
    error: str | None = None


def read_text(given: str | Path | IO[str] | IO[bytes]) -> tuple[str, str, str]:
    """Returns the label of a file for errors, its name for places, and its text.

    Args:
        given: path of a UTF-8 file, or an open file.

    Raises:
        RequestError: the file cannot be read, is not UTF-8, or is empty.
    """
    if not isinstance(given, str | Path) and not hasattr(given, "read"):
        raise RequestError(f"{given!r:.60} is not a file of edits; pass a path or an open file")
    label = str(given) if isinstance(given, str | Path) else str(getattr(given, "name", "<file>"))
    try:
        raw = Path(given).read_bytes() if isinstance(given, str | Path) else given.read()
        text = (raw.decode() if isinstance(raw, bytes) else raw).removeprefix("\ufeff")
    except IsADirectoryError:
        raise RequestError(f"{label} is a directory; pass a file of edits") from None
    except UnicodeDecodeError as error:
        raise RequestError(_undecodable(label, error)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{label} cannot be read: {reason}; pass a file of edits") from error
    if not text.strip():
        raise RequestError(f"{label} is empty; expected {EXPECTED}")
    return label, Path(label).name, text


def json_values(label: str, name: str, text: str) -> list[Value]:
    """Returns the values of a JSON list, or of one JSON value per line, in order.

    Args:
        label: name of the file in errors.
        name: name of the file in places.
        text: its contents.

    Raises:
        RequestError: the list is empty or not valid JSON, or no line is valid JSON.
    """
    decoder = JSONDecoder(object_pairs_hook=_object)
    start = _skip(text, 0)
    if text[start] == "[":
        values = list(_listed(label, name, text, start, decoder))
        if not values:
            raise RequestError(f"{label} contains an empty list; expected at least one record")
        return values
    values = list(_lines(name, text, decoder))
    if all(value.error is not None for value in values):
        if text[start] == "{":
            raise RequestError(
                f"{label}: no line is a record; {values[0].place}: {values[0].error}; write each record on one line, "
                "or all records as a JSON list"
            )
        line = text[start:].partition("\n")[0].strip()
        raise RequestError(f"{label} is not a file of edits: it starts with {line!r:.80}; expected {EXPECTED}")
    return values


def _undecodable(label: str, error: UnicodeDecodeError) -> str:
    raw = error.object
    for start, kind, advice in _BINARY:
        if raw.startswith(start):
            return f"{label} is {kind}, not a text file; {advice}. Expected {EXPECTED}"
    line = raw.count(b"\n", 0, error.start) + 1
    return (
        f"{label}: byte 0x{raw[error.start]:02x} in line {line} is not UTF-8; save the file as UTF-8 (Excel: CSV UTF-8)"
    )


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


def _lines(name: str, text: str, decoder: JSONDecoder) -> Iterator[Value]:
    # Not splitlines(): JSON strings may contain U+2028 and similar.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            yield Value(place, decoder.decode(line))
        except JSONDecodeError as error:
            yield Value(place, None, f"invalid JSON at column {error.colno}: {error.msg}")


def _listed(label: str, name: str, text: str, at: int, decoder: JSONDecoder) -> Iterator[Value]:
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
            yield Value(f"{name}:{line} (record {number})", content)
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
            f"{label}: invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}; correct the file"
        ) from None
