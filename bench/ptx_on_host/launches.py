"""Launches that can be repeated, on copies of their operands and with changed programs."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import machine
from .machine import Mode, Region
from .parser import Kernel
from .translation import Program

Value = Tensor | int | float


def region(tensor: Tensor) -> Region:
    """Returns the memory from the first to the last element of a tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = last + 1 if tensor.numel() else 0
    return Region(tensor.data_ptr(), count * tensor.element_size(), tensor.element_size())


def packed(kernel: Kernel, values: tuple[Value, ...]) -> bytes:
    """Returns the parameters as they lie in memory; missing ones at the end are zero."""
    memory = bytearray(kernel.parameter_bytes)
    for value, offset, size in zip(values, kernel.parameters.values(), kernel.parameter_sizes, strict=False):
        if isinstance(value, Tensor):
            memory[offset : offset + 8] = struct.pack("<Q", value.data_ptr())
        elif isinstance(value, float):
            memory[offset : offset + 4] = struct.pack("<f", value)
        else:
            memory[offset : offset + size] = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return bytes(memory)


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel.

    Attributes:
        program: the translated kernel.
        grid: number of blocks in x, y and z.
        threads: threads per block.
        shared: dynamic shared memory in bytes.
        values: arguments; tensors are passed as pointers.
    """

    program: Program
    grid: tuple[int, int, int]
    threads: int
    shared: int
    values: tuple[Value, ...]

    def run(self, mode: Mode = machine.MODES[0], program: Program | None = None) -> np.ndarray:
        """Runs it on its operands, optionally with another program; see `machine.run`."""
        tensors = {value.data_ptr(): value for value in self.values if isinstance(value, Tensor)}
        return machine.run(
            program or self.program,
            self.grid,
            self.threads,
            self.shared,
            packed(self.program.kernel, self.values),
            [region(tensor) for tensor in tensors.values()],
            mode,
        )

    def copied(self) -> Launch:
        """Returns the launch with copies of its operands, which keep strides, alignment and common memory."""
        copies: dict[int, Tensor] = {}

        def copy(value: Value) -> Value:
            if not isinstance(value, Tensor):
                return value
            storage = value.untyped_storage()
            if storage.data_ptr() not in copies:
                flat = torch.empty(0, dtype=torch.uint8).set_(storage)
                aligned = torch.empty(flat.numel() + 256, dtype=torch.uint8)
                start = (storage.data_ptr() - aligned.data_ptr()) % 256
                copies[storage.data_ptr()] = aligned[start : start + flat.numel()].copy_(flat)
            flat = copies[storage.data_ptr()]
            offset = flat.storage_offset() // value.element_size() + value.storage_offset()
            return torch.empty(0, dtype=value.dtype).set_(flat.untyped_storage(), offset, value.shape, value.stride())

        return Launch(self.program, self.grid, self.threads, self.shared, tuple(map(copy, self.values)))

    def tensors(self) -> list[Tensor]:
        """Returns the operands that are tensors."""
        return [value for value in self.values if isinstance(value, Tensor)]
