"""Reads CSV and TSV with a header line; every row becomes a record with the column names as fields."""

from __future__ import annotations

import ast
import csv
import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlsedit_fast.data.source import Value
from rlsedit_fast.errors import RequestError

_SUFFIXES = (".csv", ".tsv")
_DELIMITERS = ",;\t"
_REQUIRED = {"prompt", "subject", "target", "target_new", "src", "alt", "answers", "messages"}
_LISTS = {"paraphrases", "paraphrase_prompts", "rephrase_prompt", "rephrase", "answers"} | {
    *("neighborhood", "neighborhood_prompts", "locality_prompt", "loc")
}


class Row(dict[str, Any]):
    """A row by column name; empty cells are None. Columns that no format knows are ignored."""


def is_table(name: str, text: str) -> bool:
    """Returns whether a text is a table: by the suffix of its name, or because its first line is a header."""
    first = _first_line(text)
    if Path(name).suffix.lower() in _SUFFIXES:
        return not first.startswith(('{"', "[{"))
    return not first.startswith(("{", "[")) and len(_REQUIRED.intersection(_header(first)[1])) > 1


def read_table(label: str, name: str, text: str) -> list[Value]:
    """Returns the rows of a table with a header line; empty rows are ignored.

    Cells are separated by commas, semicolons or tabs, whichever gives known column names in the header, and may be in
    double quotes. A cell of several texts is a list in JSON or Python notation, or separates them by `|`.

    Args:
        label: name of the file in errors.
        name: name of the file in places.
        text: its contents.

    Raises:
        RequestError: there is no header or no row, a column is given twice, or the quotes are invalid.
    """
    first = _first_line(text)
    delimiter, columns = _header(first)
    if not _REQUIRED.intersection(columns):
        raise RequestError(
            f"{label}: the first line is {first!r:.80}; expected the names of the columns, such as "
            "prompt,subject,target; add this line"
        )
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise RequestError(f"{label}: the header has the column {twice[0]!r} more than once; keep one")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    values: list[Value] = []
    line, headed = 1, False
    try:
        for cells in reader:
            place, line = f"{name}:{line}", reader.line_num + 1
            if not any(cell.strip() for cell in cells) or (not headed and _is_declaration(cells[0])):
                continue
            if headed:
                values.append(_value(place, cells, columns, delimiter))
            headed = True
    except csv.Error as error:
        raise RequestError(
            f"{label}: the row at line {line} is invalid ({error}); put a cell with quotes into double quotes, and "
            "write each quote within it twice"
        ) from None
    if not values:
        raise RequestError(f"{label} has a header and no rows; expected one row per edit")
    return values


def _first_line(text: str) -> str:
    """Returns the first line that is neither blank nor Excel's declaration of the delimiter."""
    lines = (line.strip(" \n") for line in io.StringIO(text, newline=None))
    return next((line for line in lines if line.strip() and not _is_declaration(line)), "")


def _is_declaration(text: str) -> bool:
    return text.lower().startswith("sep=") and len(text) <= len("sep=;")


def _header(line: str) -> tuple[str, list[str]]:
    """Returns the delimiter that gives most known names, and the names."""
    found = []
    for delimiter in _DELIMITERS:
        cells: list[str] = []
        with suppress(csv.Error):
            cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
        while cells and not cells[-1].strip():
            cells.pop()
        found.append(
            (delimiter, ["_".join(cell.lower().split()) or f"column {at}" for at, cell in enumerate(cells, 1)])
        )
    return max(found, key=lambda pair: len(_REQUIRED.intersection(pair[1])))


def _value(place: str, cells: list[str], columns: list[str], delimiter: str) -> Value:
    if any(cell.strip() for cell in cells[len(columns) :]):
        return Value(
            place,
            None,
            f"{len(cells)} cells for {len(columns)} columns; put cells that contain {delimiter!r} into double quotes",
        )
    cells += [""] * (len(columns) - len(cells))
    return Value(
        place, Row({column: _content(column, cell, delimiter) for column, cell in zip(columns, cells, strict=False)})
    )


def _content(column: str, cell: str, delimiter: str) -> Any:
    if not cell.strip():
        return None
    if column == "weight":
        with suppress(ValueError):
            return float(cell.replace(",", ".") if delimiter == ";" else cell)
    if column in ("span", "messages"):
        with suppress(ValueError):
            return json.loads(cell)
    return _texts(cell.strip()) if column in _LISTS else cell


def _texts(cell: str) -> list[Any]:
    if cell.startswith("[") and cell.endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError):
                if isinstance(found := parse(cell), list):
                    return found
    return [text.strip() for text in cell.split("|") if text.strip()]
