"""The instructions of the interpreter, as its sources in `machine/` define them, and their layout in memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

MACHINE = Path(__file__).with_name("machine")

# Must match machine/program.hpp.
INSTRUCTION = np.dtype(
    [(name, np.int32) for name in "operation guard negated result a b c first count kind line tracked".split()]
    + [("offset", np.int64), ("offset_b", np.int64)],
    align=True,
)
CONSTANT = np.dtype([("row", np.int32), ("wide", np.int32), ("value", np.uint64)], align=True)


@dataclass(frozen=True)
class Arithmetic:
    """An arithmetic instruction of the interpreter: number, type of the result and types of the operands."""

    number: int
    result: str
    operands: tuple[str, ...]


@cache
def operations() -> tuple[dict[str, Arithmetic], dict[str, int]]:
    """Returns the arithmetic and the other instructions by name, as the interpreter numbers them."""
    text = (MACHINE / "operations.inc").read_text()

    def expanded(match: re.Match[str]) -> str:
        name, parameter, body = match.groups()
        uses = re.findall(rf"^{name}\((\w+)\)$", text, re.MULTILINE)
        return "".join(
            re.sub(rf"(?:##)?\b{parameter}\b(?:##)?", use, body.replace("\\\n", "\n")) + "\n" for use in uses
        )

    flat = re.sub(r"#define (\w+)\((\w+)\)((?:[^\n]*\\\n)*[^\n]*)\n", expanded, text)
    arithmetic = {}
    for number, (kind, content) in enumerate(re.findall(r"^\s*(UNARY|BINARY|TERNARY)\((.*)\)\s*$", flat, re.MULTILINE)):
        name, result, *rest = (part.strip() for part in content.split(",", 5))
        arity = ("UNARY", "BINARY", "TERNARY").index(kind) + 1
        arithmetic[name] = Arithmetic(number, result, tuple(rest[:arity]))
    others = re.findall(r"^OTHER\((\w+)\)", (MACHINE / "others.inc").read_text(), re.MULTILINE)
    return arithmetic, {name: len(arithmetic) + i for i, name in enumerate(others)}
