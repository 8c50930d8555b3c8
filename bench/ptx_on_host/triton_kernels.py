"""Runs the Triton kernels of the package as Triton compiles them, on CPU tensors.

Triton's launcher runs as usual: it specializes a kernel by its arguments and compiles it. Only the driver is replaced,
by one that runs the PTX on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from rlsedit_fast.kernels import correct, downdate, moment, panel
from rlsedit_fast.ops import triton as backend

from . import machine
from .launches import Launch
from .parser import parse
from .translation import Program, translate

MODULES = (panel, downdate, correct, moment)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
DEVICE = 7000  # kernels are cached by device: numbers that no device has


@dataclass
class Host:
    """A device that runs kernels on the CPU.

    Attributes:
        capability: 80 or 90.
        mode: how to run kernels.
        processors: number of multiprocessors.
        launched: names of kernels with their settings, in order.
        recorded: receives every launch, as it is before it runs.
        compiled: the compiled kernel of every recorded launch.
    """

    capability: int
    mode: machine.Mode = machine.MODES[0]
    processors: int = 4
    launched: list[str] = field(default_factory=list)
    recorded: list[Launch] | None = None
    compiled: list[CompiledKernel] = field(default_factory=list)

    def launch(self, compiled: CompiledKernel, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        """Runs a compiled kernel."""
        text = compiled.asm["ptx"]
        program = translated(text, compiled.metadata.name)
        types = compiled.src.signature.values()
        given = [value for kind, value in zip(types, arguments, strict=True) if kind != "constexpr"]
        launch = Launch(program, grid, 32 * compiled.metadata.num_warps, compiled.metadata.shared, tuple(given))
        self.launched.append(described(compiled))
        if self.recorded is not None:
            self.recorded.append(launch.copied())
            self.compiled.append(compiled)
        launch.run(self.mode)

    # Triton's interface of a driver

    @property
    def utils(self) -> Host:
        return self

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        """Does nothing."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.capability], "multiprocessor_count": self.processors}

    def get_current_device(self) -> int:
        return DEVICE + self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_interface(self) -> Any:
        return torch

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Not called: `on_host` replaces what would."""
        raise NotImplementedError


@cache
def translated(text: str, name: str) -> Program:
    """Returns the program of a PTX text."""
    return translate(parse(text, name))


def described(compiled: CompiledKernel) -> str:
    """Returns the name of a kernel with its constants, such as `rows_kernel ROWS=64 ...`."""
    names = compiled.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in compiled.src.constants.items()}
    text = " ".join(f"{name}={value}" for name, value in constants.items() if name.isupper())
    return f"{compiled.metadata.name} {text} warps={compiled.metadata.num_warps} stages={compiled.metadata.num_stages}"


@contextlib.contextmanager
def on_host(host: Host) -> Iterator[Host]:
    """Runs Triton kernels and the `triton` backend on CPU tensors inside the block."""

    def prepare(compiled: CompiledKernel) -> None:
        def run(x: int, y: int, z: int, *others: Any) -> None:
            # stream, function, metadata twice and two hooks come before the arguments
            driver.active.launch(compiled, (x, y, z), others[6:])

        compiled._run = run

    before = driver._active
    driver.set_active(host)
    named = (f"sm_{host.capability}", host.processors)
    with contextlib.ExitStack() as stack:
        stack.callback(driver.set_active, before)
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "device", return_value=named))
        stack.enter_context(mock.patch.object(torch.cuda, "device_of", contextlib.nullcontext))
        stack.enter_context(mock.patch.object(CompiledKernel, "_init_handles", prepare))
        stack.enter_context(mock.patch.object(backend, "unavailable_reason", return_value=None))
        stack.enter_context(mock.patch.object(backend, "unsupported_reason", return_value=None))
        yield host
