"""Plants mistakes in translated kernels: removes a barrier, fence or wait, or lets a wait leave one more group.

A mistake is found if a check of the interpreter fails or the results change. One that is not found is redundant for the
accesses of the launch: the checks do not depend on the order of execution, so every pair of accesses that it would
order is ordered by something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from . import machine
from .launches import Launch
from .machine import MachineError
from .operations import operations
from .translation import Program

# Operation of the interpreter: name in PTX, and whether it waits for all but some groups.
SYNCHRONIZATION = {
    "barrier": ("bar.sync", False),
    "proxy_fence": ("fence.proxy.async", False),
    "wgmma_fence": ("wgmma.fence", False),
    "wgmma_wait": ("wgmma.wait_group", True),
    "copy_wait": ("cp.async.wait_group", True),
}


@dataclass(frozen=True)
class Mistake:
    """A change of one instruction.

    Attributes:
        kind: what is changed, such as `bar.sync removed`.
        at: number of the instruction in the program.
        operation: its new operation.
        offset: its new number of groups.
        line: line of the PTX.
    """

    kind: str
    at: int
    operation: int
    offset: int
    line: int


@dataclass(frozen=True)
class Outcome:
    """What became of a mistake.

    Attributes:
        mistake: the mistake.
        state: `found`, `redundant`, or `not reached` if no warp executes the instruction.
        how: message of the check that failed, or `the results change`.
    """

    mistake: Mistake
    state: str
    how: str = ""


def mistakes(program: Program) -> Iterator[Mistake]:
    """Yields all mistakes of a program."""
    others = operations()[1]
    for name, (text, waits) in SYNCHRONIZATION.items():
        for at in (program.code["operation"] == others[name]).nonzero()[0]:
            found = program.code[at]
            at, line, offset = int(at), int(found["line"]), int(found["offset"])
            yield Mistake(f"{text} removed", at, others["nothing"], 0, line)
            if waits:
                yield Mistake(f"{text} relaxed", at, others[name], offset + 1, line)


def planted(program: Program, *changes: Mistake) -> Program:
    """Returns the program with mistakes."""
    code = program.code.copy()
    for mistake in changes:
        code[mistake.at]["operation"] = mistake.operation
        code[mistake.at]["offset"] = mistake.offset
    return replace(program, code=code)


def outcomes(launch: Launch) -> list[Outcome]:
    """Plants every mistake in the program of a launch, one at a time, and runs it in every mode."""
    correct = launch.copied()
    counts = correct.run()
    found = []
    for mistake in mistakes(launch.program):
        if counts[mistake.at]["executed"] == 0:
            found.append(Outcome(mistake, "not reached"))
            continue
        how = failure(launch, planted(launch.program, mistake), correct)
        found.append(Outcome(mistake, "found" if how else "redundant", how))
    return found


def failure(launch: Launch, program: Program, correct: Launch) -> str:
    """Returns how a program fails in some mode, or an empty text; `correct` has the right results."""
    for mode in machine.MODES:
        tried = launch.copied()
        try:
            tried.run(mode, program)
        except MachineError as error:
            return str(error)
        for got, wanted in zip(tried.tensors(), correct.tensors(), strict=True):
            if not torch.equal(_bits(got), _bits(wanted)):
                return "the results change"
    return ""


def redundant_together(launch: Launch, found: list[Outcome]) -> list[Mistake]:
    """Returns mistakes that are redundant even together, and to which no other redundant one can be added."""
    correct = launch.copied()
    correct.run()
    chosen: list[Mistake] = []
    for outcome in found:
        if outcome.state == "redundant":
            program = planted(launch.program, *chosen, outcome.mistake)
            if not failure(launch, program, correct):
                chosen.append(outcome.mistake)
    return chosen


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bit patterns, which compare NaN as equal."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
