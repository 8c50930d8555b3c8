"""Reads the PTX text of a kernel: parameters, registers, shared memory and instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2}
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{]*?\n\{", re.DOTALL)
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\[(\d*)\]")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_LABEL = re.compile(r"([$\w]+):(?!:)")
_LINE_DIRECTIVE = re.compile(r"\.(?:loc|file|section)\b[^\n]*")
_SOURCE = re.compile(r"\.loc\s[^\n]*//\s*([\w./]+:\d+)")


class PTXError(Exception):
    """The PTX cannot be read or translated."""


@dataclass(frozen=True)
class Statement:
    """An instruction.

    Attributes:
        opcode: with all modifiers, such as `add.s32`.
        operands: texts; a vector keeps its braces, an address its brackets.
        guard: the predicate register, or None.
        negated: whether the guard is negated.
        line: line number in the text.
        source: file and line of the source that it comes from, if the text says so.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    line: int
    source: str = ""

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip()


@dataclass(frozen=True)
class Kernel:
    """A kernel.

    Attributes:
        name: name of the entry.
        parameters: offset in bytes of each parameter, in order.
        parameter_bytes: size of all parameters.
        parameter_sizes: bytes of each parameter, in order.
        registers: type of each register.
        shared: offset of each static shared variable, and of dynamic shared memory.
        static_shared: bytes of static shared memory.
        statements: instructions.
        labels: number of the instruction after each label.
    """

    name: str
    parameters: dict[str, int]
    parameter_sizes: tuple[int, ...]
    parameter_bytes: int
    registers: dict[str, str]
    shared: dict[str, int]
    static_shared: int
    statements: tuple[Statement, ...]
    labels: dict[str, int] = field(default_factory=dict)


def split_operands(text: str) -> tuple[str, ...]:
    """Splits at the commas that are not in braces or brackets."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    rest = text[start:].strip()
    return (*parts, rest) if rest else tuple(parts)


def kernel_names(text: str) -> list[str]:
    """Returns the names of all kernels of a PTX text."""
    return [match[1] for match in _ENTRY.finditer(_without_comments(text))]


def parse(text: str, name: str) -> Kernel:
    """Reads a kernel.

    Args:
        text: PTX of a module.
        name: name of the entry.

    Raises:
        PTXError: there is no such kernel, or a statement is not understood.
    """
    clean = _without_comments(text)
    entry = next((match for match in _ENTRY.finditer(clean) if match[1] == name), None)
    if entry is None:
        raise PTXError(f"there is no kernel {name}: the text has {', '.join(kernel_names(text)) or 'none'}")
    end = clean.find("\n}", entry.end())
    body = clean[entry.end() : end]
    parameters, sizes, parameter_bytes = _parameters(entry[2])
    # Static variables of the module and of this kernel, then dynamic shared memory.
    outside = clean[: _ENTRY.search(clean).start()]  # type: ignore[union-attr]
    shared, static = _shared(outside + body)
    registers: dict[str, str] = {}
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    sources = _sources(text)
    line, counted = 1, 0
    for kind, content, position in _statements(body):
        if kind == "label":
            labels[content] = len(statements)
        elif content.startswith("."):
            _declare(content, registers)
        else:
            line += clean.count("\n", counted, entry.end() + position)
            counted = entry.end() + position
            match = _STATEMENT.fullmatch(content)
            if match is None:
                raise PTXError(f"line {line}: {content!r} is not an instruction")
            operands = split_operands(re.sub(r"\s+", " ", match[4]))
            statements.append(Statement(match[3], operands, match[2], match[1] == "!", line, sources(line)))
    return Kernel(name, parameters, sizes, parameter_bytes, registers, shared, static, tuple(statements), labels)


def _without_comments(text: str) -> str:
    """Removes comments and keeps the lines."""
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def _sources(text: str):
    """Returns a function from a line number to the source of its instruction."""
    found, current = [], ""
    for line in text.split("\n"):
        if match := _SOURCE.search(line):
            current = match[1]
        found.append(current)
    return lambda number: found[number - 1]


def _parameters(text: str) -> tuple[dict[str, int], tuple[int, ...], int]:
    offsets, sizes, at = {}, [], 0
    for parameter in split_operands(text):
        kind = parameter.split()[1].lstrip(".")
        size = 8 if kind.endswith("64") else _BYTES.get(kind, 4)
        at = -(-at // size) * size
        offsets[parameter.split()[-1]] = at
        sizes.append(size)
        at += size
    return offsets, tuple(sizes), at


def _shared(text: str) -> tuple[dict[str, int], int]:
    offsets, at, dynamic = {}, 0, []
    for alignment, name, size in _SHARED.findall(text):
        if not size:
            dynamic.append(name)
            continue
        align = int(alignment or 1)
        at = -(-at // align) * align
        offsets[name] = at
        at += int(size)
    at = -(-at // 16) * 16
    return offsets | dict.fromkeys(dynamic, at), at


def _declare(content: str, registers: dict[str, str]) -> None:
    match = _REGISTERS.fullmatch(content)
    if match is None:
        if content.split()[0] in (".shared", ".pragma"):
            return
        raise PTXError(f"the directive {content!r} is not understood")
    for name in match[2].split(","):
        name = name.strip()
        if several := re.fullmatch(r"(.+)<(\d+)>", name):
            registers |= dict.fromkeys((f"{several[1]}{i}" for i in range(int(several[2]))), match[1])
        elif registers.setdefault(name, match[1]) != match[1]:
            raise PTXError(f"two scopes declare {name} with different types")


def _statements(body: str) -> Iterator[tuple[str, str, int]]:
    """Yields labels and statements with their positions; a scope's braces are ignored."""
    at, size = 0, len(body)
    while at < size:
        if body[at].isspace() or body[at] in "{};":
            at += 1
        elif directive := _LINE_DIRECTIVE.match(body, at):
            at = directive.end()
        elif label := _LABEL.match(body, at):
            yield "label", label[1], at
            at = label.end()
        else:
            end = body.find(";", at)
            # An inline assembly text may have a directive within an instruction's lines.
            yield "statement", _LINE_DIRECTIVE.sub("", body[at:end]).strip(), at
            at = end + 1
