"""Compiles the interpreter and runs translated kernels with it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from rlsedit_fast.statistics.cache import cache_folder

from .operations import MACHINE
from .translation import Program

FLAGS = (
    "-std=c++17",
    "-O2",
    "-march=native",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fwrapv",
    "-shared",
    "-fPIC",
)
LIMIT = 10**9  # instructions of warps in one launch
COUNT = np.dtype([(name, np.int64) for name in ("executed", "requests", "units", "least", "bytes")])


class MachineError(Exception):
    """A kernel does what it must not do, such as an access with no barrier before it."""


class _Specials(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("thread", "lane", "threads")),
        *((f"block_{axis}", ctypes.c_int32) for axis in "xyz"),
        *((f"blocks_{axis}", ctypes.c_int32) for axis in "xyz"),
    ]


class _Program(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("code", "lists", "constants")),
        *((name, ctypes.c_int32) for name in ("size", "constant_count", "rows", "granule")),
        ("specials", _Specials),
    ]


class _Region(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("granule", ctypes.c_int64)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("parameters", ctypes.c_char_p),
        ("regions", ctypes.POINTER(_Region)),
        *((name, ctypes.c_int32) for name in ("parameter_bytes", "region_count")),
        ("grid", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("threads", "shared")),
        *((name, ctypes.c_int32) for name in ("late", "backwards", "counting")),
        ("limit", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class Mode:
    """How to run a kernel, where the order is not determined.

    Attributes:
        late: asynchronous copies and products run when they are waited for, else when they are issued.
        backwards: blocks, warps and lanes run in reverse order.
        counting: accesses to memory are counted.
    """

    late: bool = False
    backwards: bool = False
    counting: bool = False


MODES = (Mode(), Mode(late=True, backwards=True))


def compiler() -> list[str] | None:
    """Returns the command of the C++ compiler, or None."""
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    return None


def cached(name: str, content: bytes, make) -> Path:
    """Returns a file of the cache with this content hash; `make(path)` makes it if it does not exist."""
    path = cache_folder() / "ptx_on_host" / f"{hashlib.sha256(content).hexdigest()[:20]}-{name}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / name
            make(temporary)
            os.replace(temporary, path)
    return path


@cache
def library() -> ctypes.CDLL:
    """Compiles the interpreter, or takes it from the cache, and loads it."""
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler was found: install one (Debian: apt install g++) or set CXX")
    version = subprocess.run([*command, "--version"], capture_output=True, check=True).stdout
    processor = Path("/proc/cpuinfo")
    features = [line for line in processor.read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
    sources = b"".join(path.read_bytes() for path in sorted(MACHINE.iterdir()) if path.is_file())
    key = sources + version + repr((FLAGS, features)).encode()

    def build(path: Path) -> None:
        done = subprocess.run([*command, *FLAGS, MACHINE / "machine.cpp", "-o", path], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the interpreter does not compile:\n{done.stderr[-4000:]}")

    loaded = ctypes.CDLL(str(cached("machine.so", key, build)))
    loaded.ptx_run.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_size_t]
    return loaded


@dataclass(frozen=True)
class Region:
    """Global memory that a kernel may access: address, bytes, and bytes of an element."""

    begin: int
    bytes: int
    element: int


def run(
    program: Program,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    parameters: bytes,
    regions: list[Region],
    mode: Mode = Mode(),
    limit: int = LIMIT,
) -> np.ndarray:
    """Runs a kernel.

    Args:
        program: the translated kernel.
        grid: number of blocks in x, y and z.
        threads: threads per block, whole warps.
        shared: dynamic shared memory in bytes.
        parameters: the parameters as they lie in memory.
        regions: global memory that it may access.
        mode: see `Mode`.
        limit: most instructions of warps.

    Returns:
        An array of `COUNT`, one per instruction of `program.code`.

    Raises:
        MachineError: a check failed; the message names the instruction.
    """
    if threads % 32:
        raise ValueError(f"{threads} threads: expected whole warps of 32")
    counts = np.zeros(len(program.code), COUNT)
    specials = _Specials(**{name: program.specials.get(name, -1) for name, _ in _Specials._fields_})
    given = _Program(
        program.code.ctypes.data,
        program.lists.ctypes.data,
        program.constants.ctypes.data,
        *(len(program.code), len(program.constants), program.rows, program.granule),
        specials,
    )
    array = (_Region * len(regions))(*(_Region(region.begin, region.bytes, region.element) for region in regions))
    launch = _Launch(
        parameters,
        array,
        *(len(parameters), len(regions)),
        (ctypes.c_uint32 * 3)(*grid),
        *(threads, program.kernel.static_shared + shared),
        *(mode.late, mode.backwards, mode.counting, limit),
    )
    message = ctypes.create_string_buffer(600)
    failed = library().ptx_run(
        ctypes.addressof(given), ctypes.addressof(launch), counts.ctypes.data, ctypes.addressof(message), len(message)
    )
    if failed:
        raise MachineError(_explained(program, message.value.decode()))
    return counts


def _explained(program: Program, message: str) -> str:
    """Adds the instruction to a message that names its line."""
    for number in program.statements:
        if number < len(program.kernel.statements):
            statement = program.kernel.statements[number]
            if f"(line {statement.line} of the PTX" in message:
                source = f", {statement.source}" if statement.source else ""
                return f"{program.kernel.name}: {message}: {str(statement)[:120]}{source}"
    return f"{program.kernel.name}: {message}"
