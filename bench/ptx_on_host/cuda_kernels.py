"""Runs the kernels of csrc/cuda, as nvcc or NVRTC compiles them to PTX."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlsedit_fast.ops import cuda_launch
from rlsedit_fast.ops.cuda_plan import Launch

from . import machine
from .parser import Kernel, parse
from .translation import Program, translate

ARCHITECTURE = 80  # of the PTX in the library


class Missing(Exception):
    """A compiler is not installed."""


@cache
def nvcc_ptx(architecture: int = ARCHITECTURE) -> str:
    """Returns the PTX of all kernels from nvcc, with the options of the library.

    Raises:
        Missing: there is no nvcc.
    """
    try:
        version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Missing("nvcc is not installed") from error
    text = cuda_launch.source()

    def build(path: Path) -> None:
        source = path.with_suffix(".cu")
        source.write_text(text)
        command = ["nvcc", "-std=c++17", "-O3", "-ptx", f"-arch=compute_{architecture}", source, "-o", path]
        subprocess.run(command, check=True, capture_output=True)

    return machine.cached(f"nvcc-{architecture}.ptx", version + text.encode(), build).read_text()


@cache
def nvrtc_ptx(architecture: int = ARCHITECTURE) -> str:
    """Returns the PTX of all kernels from NVRTC, with the options that CuPy passes.

    Raises:
        Missing: the package nvidia-cuda-nvrtc is not installed.
    """
    try:
        version = metadata.version("nvidia-cuda-nvrtc")
        files = metadata.files("nvidia-cuda-nvrtc") or []
    except metadata.PackageNotFoundError as error:
        raise Missing("nvidia-cuda-nvrtc is not installed") from error
    found = [file.locate() for file in files if file.name.startswith("libnvrtc.so")]
    if not found:
        raise Missing("nvidia-cuda-nvrtc has no libnvrtc.so")
    text = cuda_launch.source()
    options = (*cuda_launch.COMPILER_OPTIONS, f"--gpu-architecture=compute_{architecture}")

    def build(path: Path) -> None:
        path.write_text(_compiled(ctypes.CDLL(str(found[0])), text, options))

    key = repr((version, options, text)).encode()
    return machine.cached(f"nvrtc-{architecture}.ptx", key, build).read_text()


def _compiled(nvrtc: ctypes.CDLL, text: str, options: tuple[str, ...]) -> str:
    """Compiles a source to PTX."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
    kind = "ProgramLog" if failed else "PTX"
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    result = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, result)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(f"NVRTC: {result.value.decode()}")
    return result.value.decode()


def region(tensor: Tensor) -> machine.Region:
    """Returns the memory from the first to the last element of a tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = last + 1 if tensor.numel() else 0
    return machine.Region(tensor.data_ptr(), count * tensor.element_size(), tensor.element_size())


def packed(kernel: Kernel, values: list[Tensor | int | float]) -> bytes:
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


class Kernels:
    """The kernels of a PTX text, with the interface of `cuda_launch.Launcher`.

    Args:
        text: PTX of all kernels.
        mode: how to run them.

    Attributes:
        counts: of every launch since the last `clear`: kernel, program and counts.
    """

    origin = "compiled kernels on the CPU"

    def __init__(self, text: str, mode: machine.Mode = machine.MODES[0]) -> None:
        self.text, self.mode = text, mode
        self.programs: dict[str, Program] = {}
        self.counts: list[tuple[str, Program, np.ndarray]] = []

    def kernel(self, name: str) -> Kernel:
        """Returns a parsed kernel by its name without prefix."""
        return parse(self.text, f"rlsedit_{name}")

    def program(self, name: str) -> Program:
        """Returns a translated kernel."""
        if name not in self.programs:
            self.programs[name] = translate(self.kernel(name))
        return self.programs[name]

    def launch(self, launch: Launch, device: int, stream: int) -> None:
        """Runs a launch on host memory; see `cuda_launch.Launcher.launch`."""
        program = self.program(launch.kernel)
        tensors = {a.data_ptr(): a for a in launch.arguments if isinstance(a, torch.Tensor)}
        counts = machine.run(
            program,
            launch.grid,
            launch.threads,
            launch.shared,
            packed(program.kernel, list(launch.arguments)),
            [region(tensor) for tensor in tensors.values()],
            self.mode,
        )
        if self.mode.counting:
            self.counts.append((launch.kernel, program, counts))
