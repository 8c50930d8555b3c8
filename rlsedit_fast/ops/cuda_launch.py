"""Launches the kernels of csrc/cuda, from the prebuilt library or compiled at run time by CuPy.

Both launchers accept the same `Launch` objects and use torch's current stream on the device of the tensors.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlsedit_fast.errors import BackendError
from rlsedit_fast.ops.cuda_plan import Launch

LIBRARY = Path(__file__).with_name("librlsedit_cuda.so")
SOURCES = "rlsedit_fast.cuda_sources"
COMPILER_OPTIONS = ("-std=c++17",)

# Must match csrc/include/rlsedit/cuda.h.
_SIGNATURE = (c_char_p, c_char_p, ctypes.POINTER(c_void_p), *(c_int64,) * 5, c_int, c_void_p)


class Launcher(Protocol):
    """Interface of a kernel launcher."""

    @property
    def origin(self) -> str:
        """Where the kernels come from."""

    def problem(self, device: int | None) -> str | None:
        """Returns why the kernels cannot run with the driver or on the CUDA device of that index, or None.

        Args:
            device: index of a device, whose context is created; None checks only the driver.
        """

    def launch(self, launch: Launch, device: int, stream: int) -> None:
        """Launches a kernel.

        Args:
            launch: kernel, grid and arguments.
            device: index of the CUDA device.
            stream: address of a CUDA stream on that device.

        Raises:
            BackendError: the kernel does not exist, its arguments do not match or CUDA reports an error.
        """


class Library:
    """The library that setup.py builds with nvcc. It does not depend on torch and loads without a driver.

    Args:
        path: path of the library.

    Raises:
        BackendError: the library does not exist or cannot be loaded.
    """

    origin = "the prebuilt library"

    def __init__(self, path: Path = LIBRARY) -> None:
        if not path.exists():
            raise BackendError("the CUDA library was not built; `python -m rlsedit_fast` shows why")
        try:
            self.functions = ctypes.CDLL(str(path))
            self.functions.rlsedit_cuda_launch.argtypes = _SIGNATURE
            self.functions.rlsedit_cuda_check.argtypes = (c_int,)
            self.functions.rlsedit_cuda_last_error.restype = c_char_p
        except (OSError, AttributeError) as error:
            raise BackendError(
                f"the CUDA library cannot be loaded ({error}); reinstall the package to rebuild it"
            ) from error

    def problem(self, device: int | None) -> str | None:
        """See `Launcher.problem`."""
        status = self.functions.rlsedit_cuda_check(-1 if device is None else device)
        return self.functions.rlsedit_cuda_last_error().decode() if status else None

    def launch(self, launch: Launch, device: int, stream: int) -> None:
        """See `Launcher.launch`."""
        letters = {c_void_p: "p", c_int64: "q", c_float: "f"}
        values = [_as_c(argument) for argument in launch.arguments]
        pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        types = "".join(letters[type(value)] for value in values)
        status = self.functions.rlsedit_cuda_launch(
            *(launch.kernel.encode(), types.encode(), pointers, *launch.grid, launch.threads, launch.shared),
            *(device, stream),
        )
        if status:
            raise BackendError(self.functions.rlsedit_cuda_last_error().decode())


class Compiled:
    """The kernel sources, compiled by NVRTC through CuPy on first use.

    Raises:
        BackendError: CuPy cannot be imported, or the sources are not installed.
    """

    origin = "the kernel sources, compiled at run time by CuPy"

    def __init__(self) -> None:
        try:
            self.cupy = importlib.import_module("cupy")
        except Exception as error:  # a broken CUDA installation can raise anything
            raise BackendError(f"CuPy cannot be imported ({error}): pip install cupy-cuda13x") from error
        self.module = self.cupy.RawModule(code=source(), options=COMPILER_OPTIONS, backend="nvrtc")

    def problem(self, device: int | None) -> str | None:
        """See `Launcher.problem`. The kernels are compiled for the device."""
        try:
            driver, runtime = self.cupy.cuda.runtime.driverGetVersion(), self.cupy.cuda.runtime.runtimeGetVersion()
        except Exception as error:  # an error of the CUDA runtime
            return f"CuPy cannot use the driver: {error}"
        if driver // 1000 >= runtime // 1000:
            return None
        versions = [f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime)]
        return (
            "the driver supports CUDA {}, but CuPy is for CUDA {}: update the driver, or install another CuPy".format(
                *versions
            )
        )

    def launch(self, launch: Launch, device: int, stream: int) -> None:
        """See `Launcher.launch`. The first launch compiles and must not be captured in a CUDA graph."""
        numbers = tuple(_as_numpy(argument) for argument in launch.arguments)
        try:
            with self.cupy.cuda.Device(device), self.cupy.cuda.ExternalStream(stream, device):
                kernel = self.module.get_function(f"rlsedit_{launch.kernel}")
                if launch.shared > 48 << 10:  # larger sizes must be requested
                    kernel.max_dynamic_shared_size_bytes = launch.shared
                kernel(launch.grid, (launch.threads, 1, 1), numbers, shared_mem=launch.shared)
        except Exception as error:
            raise BackendError(f"{launch.kernel}: CuPy cannot compile or launch it: {error}") from error


def _as_c(argument: Tensor | int | float) -> c_void_p | c_int64 | c_float:
    if isinstance(argument, Tensor):
        return c_void_p(argument.data_ptr())
    return c_int64(argument) if isinstance(argument, int) else c_float(argument)


def _as_numpy(argument: Tensor | int | float) -> np.generic:
    if isinstance(argument, Tensor):
        return np.uint64(argument.data_ptr())
    return np.int64(argument) if isinstance(argument, int) else np.float32(argument)


def source() -> str:
    """Returns all kernels as one source text, with every header inlined at its first include.

    Raises:
        BackendError: the sources are not installed.
    """
    try:
        folder = resources.files(SOURCES)
        return _inlined(folder, "kernels.cuh", set())
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise BackendError(f"the kernel sources cannot be read ({error}); reinstall the package") from error


def _inlined(folder: Any, name: str, seen: set[str]) -> str:
    if name in seen:
        return ""
    seen.add(name)
    text = (folder / name).read_text().replace("#pragma once\n", "")
    return re.sub(r'#include "(.+?)"\n', lambda include: _inlined(folder, include[1], seen), text)


@cache
def launcher() -> Launcher | str:
    """Returns the launcher for this machine, or why there is none."""
    reasons = []
    for candidate in (Library, Compiled):
        try:
            return candidate()
        except BackendError as error:
            reasons.append(str(error))
    return "; ".join(reasons)


def _where(device: torch.device) -> tuple[int, int]:
    """Returns the device index and the address of torch's current stream on it."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def run(launches: list[Launch], device: torch.device) -> None:
    """Launches kernels in order on torch's current stream of `device`.

    Raises:
        BackendError: there is no launcher, or a launch failed; the launches before it have run.
    """
    found = launcher()
    if isinstance(found, str):
        raise BackendError(found)
    where = _where(device)
    for launch in launches:
        found.launch(launch, *where)
