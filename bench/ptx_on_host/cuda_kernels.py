"""Runs the kernels of csrc/cuda, as nvcc or NVRTC compiles them to PTX."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from rlsedit_fast.ops import cuda_launch, cuda_plan

from . import machine
from .launches import Launch
from .parser import parse
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


class Kernels:
    """The kernels of a PTX text, with the interface of `cuda_launch.Launcher`.

    Args:
        text: PTX of all kernels.
        mode: how to run them.
        recorded: receives every launch, as it is before it runs.
    """

    origin = "compiled kernels on the CPU"

    def __init__(self, text: str, mode: machine.Mode = machine.MODES[0], recorded: list[Launch] | None = None) -> None:
        self.text, self.mode, self.recorded = text, mode, recorded
        self.programs: dict[str, Program] = {}

    def program(self, name: str) -> Program:
        """Returns a translated kernel by its name without prefix."""
        if name not in self.programs:
            self.programs[name] = translate(parse(self.text, f"rlsedit_{name}"))
        return self.programs[name]

    def launch(self, launch: cuda_plan.Launch, device: int, stream: int) -> None:
        """Runs a launch on host memory; see `cuda_launch.Launcher.launch`."""
        repeatable = Launch(self.program(launch.kernel), launch.grid, launch.threads, launch.shared, launch.arguments)
        if self.recorded is not None:
            self.recorded.append(repeatable.copied())
        repeatable.run(self.mode)
