"""Translates a parsed kernel to instructions of the interpreter. An unknown instruction is an error that names it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .operations import CONSTANT, INSTRUCTION, operations
from .parser import Kernel, PTXError, Statement

SPECIALS = {
    "%tid.x": "thread",
    "%laneid": "lane",
    "%ntid.x": "threads",
    **{f"%ctaid.{axis}": f"block_{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"blocks_{axis}" for axis in "xyz"},
}
_FORMATS = {"tf32": 0, "bf16": 1, "f16": 2}
_INDIFFERENT = {"add", "sub", "and", "or", "xor", "not", "shl", "neg", "mov", "selp", "mad_lo", "mul_lo", "prmt"}
_NO_EFFECT = {"uni", "rn", "volatile", "relaxed", "gpu", "cta"}
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
_FLOAT = re.compile(r"0[fFdD]([0-9a-fA-F]+)")


def _bits(kind: str) -> int:
    return 1 if kind == "pred" else int(re.sub(r"\D", "", kind) or 32)


@dataclass(frozen=True)
class Program:
    """A translated kernel.

    Attributes:
        kernel: the kernel.
        code: array of `INSTRUCTION`, one or more per statement.
        statements: number of the statement of each instruction.
        lists: operands of vectors.
        constants: array of `CONSTANT`.
        rows: rows of registers of a warp.
        specials: row of each special register that is used.
        granule: bytes of shared memory that are checked together: those of the smallest store.
    """

    kernel: Kernel
    code: np.ndarray
    statements: np.ndarray
    lists: np.ndarray
    constants: np.ndarray
    rows: int
    specials: dict[str, int]
    granule: int


def translate(kernel: Kernel) -> Program:
    """Translates a kernel.

    Raises:
        PTXError: the interpreter does not have an instruction, or an operand is not understood.
    """
    return _Translation(kernel).program()


class _Translation:
    """Numbers registers and constants, and translates one statement after the other."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.arithmetic, self.others = operations()
        self.rows = 0
        self.registers: dict[str, int] = {}
        self.constants: dict[tuple[int, bool], int] = {}
        self.specials: dict[str, int] = {}
        self.lists: list[int] = []
        self.code: list[dict[str, int]] = []
        self.statements: list[int] = []
        self.starts: list[int] = []  # first instruction of each statement
        self.branches: list[tuple[dict[str, int], str]] = []
        self.tracked: set[int] = set()  # rows that a wgmma uses
        self.granule = 4
        self.guard: dict[str, int] = {}
        self.assigned: dict[str, set[str]] = {}
        for statement in kernel.statements:
            if len(statement.operands) > 1:
                self.assigned.setdefault(statement.operands[0], set()).add(statement.operands[1])

    def program(self) -> Program:
        for number, statement in enumerate(self.kernel.statements):
            self.starts.append(len(self.code))
            try:
                self.statement(statement)
            except (KeyError, IndexError, ValueError) as error:
                raise PTXError(
                    f"line {statement.line}: the operands of {statement} are not understood ({error!r})"
                ) from error
            self.statements += [number] * (len(self.code) - len(self.statements))
        self.emit("leave")
        self.statements.append(len(self.kernel.statements))
        self.starts.append(len(self.code) - 1)
        for instruction, label in self.branches:
            instruction["offset"] = self.starts[self.kernel.labels[label]]
        self.track()
        code = np.zeros(len(self.code), INSTRUCTION)
        for name in INSTRUCTION.names or ():
            code[name] = [instruction.get(name, 0) for instruction in self.code]
        constants = np.array([(row, wide, value) for (value, wide), row in self.constants.items()], CONSTANT)
        return Program(
            kernel=self.kernel,
            code=code,
            statements=np.array(self.statements),
            lists=np.array([*self.lists, 0], np.int32),
            constants=constants,
            rows=self.rows,
            specials=self.specials,
            granule=self.granule,
        )

    # Operands

    def new_row(self, wide: bool = False) -> int:
        row = self.rows
        self.rows += 2 if wide else 1
        return row

    def register(self, name: str) -> int:
        if name not in self.registers:
            self.registers[name] = self.new_row(self.kernel.registers[name].endswith("64"))
        return self.registers[name]

    def wide(self, name: str) -> bool:
        return self.kernel.registers.get(name, "").endswith("64")

    def constant(self, value: int, bits: int) -> int:
        key = (value & ((1 << max(bits, 32)) - 1), bits == 64)
        if key not in self.constants:
            self.constants[key] = self.new_row(bits == 64)
        return self.constants[key]

    def value(self, text: str, bits: int) -> int:
        """Returns the row of an operand that an instruction reads as a value of the given width in bits."""
        if text in self.kernel.registers:
            if (bits == 64) != self.wide(text):
                raise ValueError(f"{text} is not a register of {bits} bits")
            return self.register(text)
        if text in SPECIALS:
            return self.special(SPECIALS[text])
        if match := _FLOAT.fullmatch(text):
            return self.constant(int(match[1], 16), bits)
        if _NUMBER.fullmatch(text):
            number = int(text.rstrip("U"), 0)
            return self.constant(int(number != 0) if bits == 1 else number, bits)
        for symbols in (self.kernel.shared, self.kernel.parameters):
            if text in symbols:
                return self.constant(symbols[text], bits)
        raise KeyError(text)

    def special(self, name: str) -> int:
        if name not in self.specials:
            self.specials[name] = self.new_row()
        return self.specials[name]

    def address(self, text: str, bits: int) -> tuple[int, int]:
        """Returns the row and the offset of an address."""
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise ValueError(text)
        base = match[1]
        if bits == 32 and self.wide(base):  # shared memory by a 64-bit address: the lower row does not exist
            raise ValueError(f"{base} is a 64-bit address of shared memory")
        return self.value(base, bits), int(match[2] or "0", 0)

    def vector(self, text: str, bits: int) -> list[int]:
        names = split_vector(text)
        return [self.value(name, bits) for name in names]

    def listed(self, rows: list[int]) -> dict[str, int]:
        first = len(self.lists)
        self.lists += rows
        return {"first": first, "count": len(rows)}

    # Instructions

    def emit(self, name: str, **fields: int) -> dict[str, int]:
        number = self.arithmetic[name].number if name in self.arithmetic else self.others[name]
        instruction = {"operation": number, "guard": -1, "tracked": -1, **self.guard, **fields}
        self.code.append(instruction)
        return instruction

    def statement(self, statement: Statement) -> None:
        self.guard = {"line": statement.line}
        if statement.guard:
            self.guard |= {"guard": self.register(statement.guard), "negated": int(statement.negated)}
        name, *modifiers = statement.opcode.replace("::", ".").split(".")
        method = getattr(self, f"_{name}", None)
        if method is not None:
            done = method(statement, modifiers)
        else:
            done = self.arithmetic_statement(name, modifiers, statement.operands)
        if not done:
            raise PTXError(f"line {statement.line}: unknown instruction {statement.opcode} in `{statement}`")

    def arithmetic_statement(self, name: str, modifiers: list[str], operands: tuple[str, ...]) -> bool:
        """Emits an instruction of operations.inc; returns False if there is none."""
        *modifiers, kind = modifiers
        modifiers = [modifier for modifier in modifiers if modifier not in _NO_EFFECT]
        if "approx" in modifiers:
            modifiers = [modifier for modifier in modifiers if modifier != "ftz"]
        name = "_".join([name, *modifiers])
        if name in _INDIFFERENT and kind != "pred" and not (kind[0] == "f" and name not in ("mov", "selp")):
            kind = f"b{_bits(kind)}"
        found = self.arithmetic.get(f"{name}_{kind}")
        if found is None and kind[0] == "b":
            found = self.arithmetic.get(f"{name}_u{kind[1:]}")
            kind = f"u{kind[1:]}"
        if found is None or len(operands) != 1 + len(found.operands):
            return False
        self.apply(f"{name}_{kind}", operands[0], *operands[1:])
        return True

    def apply(self, name: str, result: str, *operands: str) -> None:
        found = self.arithmetic[name]
        rows = [self.value(text, _bits(kind)) for text, kind in zip(operands, found.operands, strict=True)]
        self.emit(name, result=self.register(result), **dict(zip("abc", rows, strict=False)))

    def _mov(self, statement: Statement, modifiers: list[str]) -> bool:
        result, source = statement.operands
        kind = modifiers[-1]
        if result.startswith("{"):
            low, high = split_vector(result)
            for name, half in ((low, "low"), (high, "high")):
                if name != "_":
                    self.apply(f"{half}_b{_bits(kind)}", name, source)
            return True
        if source.startswith("{"):
            self.apply(f"pack_b{_bits(kind)}", result, *split_vector(source))
            return True
        return self.arithmetic_statement("mov", modifiers, statement.operands)

    def _cvta(self, statement: Statement, modifiers: list[str]) -> bool:
        if "shared" in modifiers:
            return False
        self.apply("mov_b64", *statement.operands)
        return True

    def _cvt(self, statement: Statement, modifiers: list[str]) -> bool:
        *rounding, to, source = modifiers
        if to[0] == "f" and source[0] in "su":
            rounding = []
        name = "_".join(["cvt", *(mode for mode in rounding if mode != "rn"), to, source])
        if name not in self.arithmetic:
            return False
        result, *values = statement.operands
        if self.wide(values[0]) and _bits(source) < 64:  # the lower half of a wider register
            row = self.new_row()
            self.emit("low_b64", result=row, a=self.register(values[0]))
            self.emit(name, result=self.register(result), a=row)
        else:
            self.apply(name, result, *values)
        return True

    def _setp(self, statement: Statement, modifiers: list[str]) -> bool:
        comparison, *logic, kind = modifiers
        if kind[0] == "b":
            kind = f"u{kind[1:]}"
        if f"setp_{comparison}_{kind}" not in self.arithmetic or "|" in statement.operands[0]:
            return False
        result, a, b, *other = statement.operands
        self.apply(f"setp_{comparison}_{kind}", result, a, b)
        if logic:
            if result in other:
                return False
            self.apply(f"{logic[0]}_pred", result, result, *other)
        return True

    def _bra(self, statement: Statement, modifiers: list[str]) -> bool:
        self.branches.append((self.emit("branch"), statement.operands[0]))
        return True

    def _ret(self, statement: Statement, modifiers: list[str]) -> bool:
        self.emit("leave")
        return True

    def _nop(self, statement: Statement, modifiers: list[str]) -> bool:
        self.emit("nothing")
        return True

    def _bar(self, statement: Statement, modifiers: list[str]) -> bool:
        if modifiers[:1] != ["sync"] or statement.operands != ("0",):
            return False
        self.emit("barrier")
        return True

    def _fence(self, statement: Statement, modifiers: list[str]) -> bool:
        if modifiers[:2] != ["proxy", "async"]:
            return False
        self.emit("proxy_fence")
        return True

    def _ld(self, statement: Statement, modifiers: list[str]) -> bool:
        target, address = statement.operands
        return self.access("load", modifiers, address, target)

    def _st(self, statement: Statement, modifiers: list[str]) -> bool:
        address, source = statement.operands
        return self.access("store", modifiers, address, source)

    def access(self, direction: str, modifiers: list[str], address: str, vector: str) -> bool:
        space, *rest, kind = (modifier for modifier in modifiers if modifier not in (*_NO_EFFECT, "cta", "nc"))
        widths = {"v2": 2, "v4": 4}
        spaces = {"param": "parameter", "shared": "shared", "global": "global"}
        count = widths.get(rest[0], 0) if rest else 1
        if space not in spaces or count == 0 or len(rest) > 1:
            return False
        names, bits = split_vector(vector), _bits(kind)
        if direction == "store":
            wide = bits == 64
            rows = [self.value(name, bits) for name in names]
            if space == "shared":
                self.granule = min(self.granule, bits // 8)
        else:
            wide = self.wide(names[0])
            rows = [self.register(name) for name in names]
        base, offset = self.address(address, 64 if space == "global" else 32)
        self.emit(
            f"{direction}_{spaces[space]}",
            a=base,
            offset=offset,
            kind=bits // 8 | (kind[0] == "s") << 8 | wide << 9,
            **self.listed(rows),
        )
        return len(names) == count

    def _shfl(self, statement: Statement, modifiers: list[str]) -> bool:
        result, value, by, clamp, mask = statement.operands
        mode = {"idx": 0, "bfly": 1, "down": 2, "up": 3}[modifiers[1]]
        if not self.is_constant(clamp, 0 if mode == 3 else 31) or not self.is_constant(mask, 0xFFFFFFFF):
            return False
        result, *found = result.split("|")
        self.emit("shuffle", result=self.register(result), a=self.value(value, 32), b=self.value(by, 32), kind=mode)
        for name in found:
            self.apply("mov_pred", name, "1")
        return True

    def is_constant(self, text: str, wanted: int) -> bool:
        """Whether an operand is a constant, or a register that is only set to it."""
        if _NUMBER.fullmatch(text):
            return (int(text.rstrip("U"), 0) - wanted) % (1 << 32) == 0
        sources = self.assigned.get(text, set())
        return bool(sources) and all(_NUMBER.fullmatch(one) and self.is_constant(one, wanted) for one in sources)

    def _ldmatrix(self, statement: Statement, modifiers: list[str]) -> bool:
        target, address = statement.operands
        return self.matrices("load_matrix", modifiers, address, target)

    def _stmatrix(self, statement: Statement, modifiers: list[str]) -> bool:
        address, source = statement.operands
        return self.matrices("store_matrix", modifiers, address, source)

    def matrices(self, name: str, modifiers: list[str], address: str, vector: str) -> bool:
        if not {"sync", "aligned", "m8n8", "b16"} <= set(modifiers):
            return False
        base, offset = self.address(address, 32)
        self.emit(name, a=base, offset=offset, kind=int("trans" in modifiers), **self.listed(self.vector(vector, 32)))
        return True

    def _mma(self, statement: Statement, modifiers: list[str]) -> bool:
        match = re.fullmatch(
            r"sync\.aligned\.(m16n8k8|m16n8k16)\.row\.col\.f32\.(\w+)\.(\w+)\.f32", ".".join(modifiers)
        )
        if match is None or match[2] != match[3] or (match[1] == "m16n8k8") != (match[2] == "tf32"):
            return False
        rows = [row for operand in statement.operands for row in self.vector(operand, 32)]
        self.emit("multiply_matrix", kind=_FORMATS[match[2]], **self.listed(rows))
        return len(rows) == 14

    def _cp(self, statement: Statement, modifiers: list[str]) -> bool:
        operands = statement.operands
        if modifiers == ["async", "commit_group"]:
            self.emit("copy_commit")
        elif modifiers == ["async", "wait_group"]:
            self.emit("copy_wait", offset=int(operands[0], 0))
        elif modifiers == ["async", "wait_all"]:
            self.emit("copy_commit")
            self.emit("copy_wait", offset=0)
        elif modifiers[:1] == ["async"] and modifiers[1] in ("ca", "cg"):
            to, offset = self.address(operands[0], 32)
            source, offset_b = self.address(operands[1], 64)
            taken = self.value(operands[3], 32) if len(operands) > 3 else -1
            self.emit("copy", a=to, b=source, c=taken, offset=offset, offset_b=offset_b, kind=int(operands[2], 0))
        else:
            return False
        return True

    def _wgmma(self, statement: Statement, modifiers: list[str]) -> bool:
        operands = statement.operands
        if modifiers[0] == "fence":
            self.emit("wgmma_fence")
        elif modifiers[0] == "commit_group":
            self.emit("wgmma_commit")
        elif modifiers[0] == "wait_group":
            self.emit("wgmma_wait", offset=int(operands[0], 0))
        else:
            return self.product(".".join(modifiers), operands)
        return True

    def product(self, modifiers: str, operands: tuple[str, ...]) -> bool:
        match = re.fullmatch(r"mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)\.(\w+)", modifiers)
        if match is None or match[3] != match[4] or int(match[2]) != (8 if match[3] == "tf32" else 16):
            return False
        sums, left, right, scale, sign_a, sign_b, *transposed = operands
        columns = int(match[1])
        rows = self.vector(sums, 32)
        if len(rows) != columns // 2 or (sign_a, sign_b) != ("1", "1"):
            return False
        from_registers = left.startswith("{")
        along = [int(flag) for flag in transposed]
        if from_registers:
            rows += self.vector(left, 32)
            along = [0, *along]
        along += [0] * (2 - len(along))
        self.emit(
            "wgmma",
            a=-1 if from_registers else self.value(left, 64),
            b=self.value(right, 64),
            c=self.value(scale, 1),
            kind=_FORMATS[match[3]],
            offset=columns,
            offset_b=along[0] | along[1] << 1,
            **self.listed(rows),
        )
        self.tracked |= set(rows)
        return True

    def track(self) -> None:
        """Notes, for each instruction, the registers of a wgmma that it writes and reads."""
        arithmetic = {found.number: found for found in self.arithmetic.values()}
        loads = {self.others[name] for name in ("load_parameter", "load_shared", "load_global", "load_matrix")}
        stores = {self.others[name] for name in ("store_shared", "store_global", "store_matrix")}
        for instruction in self.code:
            number = instruction["operation"]
            first = instruction.get("first", 0)
            listed = self.lists[first : first + instruction.get("count", 0)]
            written, read = [], []
            if number in arithmetic:
                written = [instruction["result"]]
                read = [instruction[name] for name, _ in zip("abc", arithmetic[number].operands, strict=False)]
            elif number in loads:
                written, read = listed, [instruction["a"]]
            elif number in stores:
                read = [instruction["a"], *listed]
            elif number == self.others["shuffle"]:
                written, read = [instruction["result"]], [instruction["a"], instruction["b"]]
            written = [row for row in written if row in self.tracked]
            read = [row for row in read if row in self.tracked]
            if written or read:
                instruction["tracked"] = len(self.lists)
                self.lists += [len(written) + len(read), len(written), *written, *read]


def split_vector(text: str) -> list[str]:
    """Returns the registers of `{a, b}`, or of a single one."""
    text = text.strip()
    return [part.strip() for part in text[1:-1].split(",")] if text.startswith("{") else [text]
