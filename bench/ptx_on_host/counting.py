"""Summaries of what a launch does: instructions of warps, wavefronts of shared memory, sectors of global memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .launches import Launch
from .machine import Mode
from .translation import Program

COUNTING = Mode(counting=True)
_SHARED = re.compile(r"(ld|st)\.shared|ldmatrix|stmatrix")
_GLOBAL = re.compile(r"(ld|st)\.global|cp\.async\.c[ag]")
_PRODUCT = re.compile(r"m(\d+)n(\d+)k(\d+)\.(?:row\.col\.)?f32\.(\w+)")


@dataclass(frozen=True)
class Instruction:
    """What an instruction that accesses memory did.

    Attributes:
        text: the instruction.
        line: line of the PTX.
        requests: executions by warps.
        units: wavefronts of shared memory, or sectors of global memory.
        least: the fewest units for the same bytes.
        bytes: bytes of all lanes.
    """

    text: str
    line: int
    requests: int
    units: int
    least: int
    bytes: int

    @property
    def ratio(self) -> float:
        """Units for every necessary one."""
        return self.units / max(self.least, 1)


@dataclass(frozen=True)
class Counts:
    """What all warps of a launch did.

    Attributes:
        instructions: instructions.
        shared: accesses to shared memory, by instruction.
        global_memory: accesses to global memory, by instruction; their order is that of the program.
        products: multiplications of matrix instructions by format, without those of other instructions.
        fused: fused multiply-adds of other instructions, by lanes.
        barriers: barriers.
        waits: waits for copies and products that leave no group unfinished.
    """

    instructions: int
    shared: tuple[Instruction, ...]
    global_memory: tuple[Instruction, ...]
    products: dict[str, int]
    fused: int
    barriers: int
    waits: int

    @property
    def wavefronts(self) -> int:
        """Wavefronts of shared memory."""
        return sum(one.units for one in self.shared)

    @property
    def least_wavefronts(self) -> int:
        """The fewest wavefronts for the same bytes."""
        return sum(one.least for one in self.shared)

    @property
    def sectors(self) -> int:
        """Sectors of global memory."""
        return sum(one.units for one in self.global_memory)

    @property
    def least_sectors(self) -> int:
        """The fewest sectors for the same bytes."""
        return sum(one.least for one in self.global_memory)


def counted(launch: Launch) -> Counts:
    """Runs a launch on copies of its operands and returns its counts."""
    return summary(launch.program, launch.copied().run(COUNTING))


def summary(program: Program, counts: np.ndarray) -> Counts:
    """Returns the summary of counts by instruction."""
    shared, global_memory, products = [], [], {}
    fused = barriers = waits = 0
    for statement, count in _by_statement(program, counts):
        executed = int(count["executed"])
        opcode = statement.opcode
        found = Instruction(
            str(statement)[:80], statement.line, executed, int(count["units"]), int(count["least"]), int(count["bytes"])
        )
        if found.units and _SHARED.match(opcode):
            shared.append(found)
        elif found.units and _GLOBAL.match(opcode):
            global_memory.append(found)
        elif match := _PRODUCT.search(opcode):
            columns, depth = int(match[2]), int(match[3])
            products[match[4]] = products.get(match[4], 0) + executed * 16 * columns * depth  # 16 rows of a warp
        elif opcode.startswith("fma."):
            fused += 32 * executed
        elif opcode.startswith("bar."):
            barriers += executed
        elif "wait_group" in opcode and statement.operands and int(statement.operands[0], 0) == 0:
            waits += executed
    return Counts(int(counts["executed"].sum()), tuple(shared), tuple(global_memory), products, fused, barriers, waits)


def _by_statement(program: Program, counts: np.ndarray) -> Iterator[tuple]:
    for number, count in zip(program.statements, counts, strict=True):
        if number < len(program.kernel.statements):
            yield program.kernel.statements[number], count
