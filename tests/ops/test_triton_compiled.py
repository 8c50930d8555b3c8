"""Compiles every Triton kernel in every configuration and precision for the supported devices, without a GPU.

Checks that there are no spills and no stack, that tensor cores are used where expected, that shared memory fits, that
addresses are 64-bit, and that global memory is accessed 16 bytes at a time. A kernel is compiled once per session.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("rlsedit_fast.kernels", reason="needs an installed package: pip install -e .")

from rlsedit_fast.kernels import correct, downdate, moment, panel, tables  # noqa: E402
from rlsedit_fast.kernels.precision import PRECISIONS  # noqa: E402

CAPABILITIES = (80, 90)
SHARED_KB = {80: 163, 90: 227}
MIN_SHARED_KB = 99  # other devices, which use the default of the tables
FLOATS = "base keys pending signs parts coefficients projected weight whitened rows moment x".split()
DIMENSIONS = ("d", "height", "width")
EDITS = (1, panel.FEW, 16, 32, 64, panel.MAX_ROWS)


@dataclass(frozen=True)
class Launch:
    """A kernel with the settings of one table entry."""

    kernel: Any
    table: str
    rows: int
    precision: str
    constants: dict[str, Any] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    tensor_cores: bool = True

    def __str__(self) -> str:
        what = "-".join(map(str, (*self.constants.values(), *self.types.values()))).replace("*", "")
        return f"{self.kernel.fn.__name__}-{self.rows}-{self.precision}" + (f"-{what}" if what else "")


def launches():
    """Yields all launches, for the rows at which a table entry ends and for the edits per program."""

    def ends(table):
        return sorted({entry["rows"] for entries in tables.table(table).values() for entry in entries})

    for precision in PRECISIONS:
        for table, kernel, edits in (
            ("panel", panel.rows_kernel, EDITS),
            ("panel_triangle", panel.triangle_kernel, [n for n in EDITS if n <= panel.TRIANGLE_MAX_ROWS]),
        ):
            for n in edits:
                if n > panel.FEW or precision == "ieee":  # few rows use no dot product
                    yield Launch(kernel, table, n, precision, {"EDITS": n}, tensor_cores=n > panel.FEW)
        for n in (16, panel.FINISH_MAX_ROWS):
            for block in (0, 128):
                yield Launch(panel.finish_kernel, "panel_finish", n, precision, {"EDITS": n, "BLOCK": block})
        for n in ends("downdate"):
            yield Launch(downdate.downdate_kernel, "downdate", n, precision)
        for n in ends("correct"):
            for kernel in (correct.correct_kernel, correct.correct_split_kernel):
                columns = [name for name in kernel.arg_names if name.endswith("_column")]
                yield Launch(kernel, "correct", n, precision, dict.fromkeys(columns, 1))
        for n in ends("moment"):
            yield Launch(moment.moment_kernel, "moment", n, precision, {"WIDEN": False})
            for dtype in ("*bf16", "*fp16"):
                narrow = {"WIDEN": False, "PRECISION": "ieee"}  # in the settings of every precision
                yield Launch(moment.moment_kernel, "moment", n, precision, narrow, {"x": dtype})


LAUNCHES = {str(launch): launch for launch in launches()}


@cache
def cuobjdump() -> Path | None:
    """Returns the disassembler of the triton package."""
    for place in ("backends/nvidia/bin/cuobjdump", "third_party/cuda/bin/cuobjdump"):
        if (tool := Path(triton.__file__).parent / place).exists():
            return tool
    return None


@cache
def compiled(name: str, capability: int):
    """Compiles a kernel for aligned operands with widths divisible by 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = LAUNCHES[name]
    settings = tables.configuration(launch.table, f"sm_{capability}", launch.rows, launch.precision)
    constants = {"PRECISION": launch.precision, **launch.constants}
    arguments = launch.kernel.arg_names
    constants |= {key: value for key, value in settings.items() if key in arguments}
    options = {key: value for key, value in settings.items() if key not in arguments}
    types = dict.fromkeys(FLOATS, "*fp32") | {"high": "*i16", "low": "*i16"} | launch.types
    signature = {key: "constexpr" if key in constants else types.get(key, "i32") for key in arguments}
    aligned = [
        (position,)
        for position, (key, kind) in enumerate(signature.items())
        if kind[0] == "*"
        or (kind == "i32" and (key in DIMENSIONS or key.endswith(("_row", "_layer", "_split", "_column"))))
    ]
    # In the order and with the entries of a launch, so that both share a compiled kernel in Triton's cache.
    constants = {key: constants[key] for key in arguments if key in constants}
    attributes = {key: [["tt.divisibility", 16]] for key in aligned}
    attributes |= {(position,): [] for position, key in enumerate(arguments) if key in constants}
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=dict(sorted(attributes.items())))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled_kernel(capability, name, tmp_path):
    if cuobjdump() is None:
        pytest.skip("this triton ships no cuobjdump")
    launch, kernel = LAUNCHES[name], compiled(name, capability)

    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([cuobjdump(), "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    assert re.search(r"REG:\d+ STACK:0 .*LOCAL:0 ", usage), usage
    own_table = f"sm_{capability}" in tables.table(launch.table)
    assert kernel.metadata.shared <= (SHARED_KB[capability] if own_table else MIN_SHARED_KB) << 10

    ptx = kernel.asm["ptx"]
    narrow = bool(launch.types)
    tensor_cores = "wgmma" if capability == 90 else "mma.sync"
    assert (tensor_cores in ptx) == (launch.tensor_cores and (launch.precision != "ieee" or narrow))

    addresses = [line for line in kernel.asm["ttgir"].splitlines() if "tt.addptr" in line and "tensor<" in line]
    assert addresses
    assert all("i64" in line for line in addresses), "32-bit address"

    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+|\d+)", ptx)
    direct = re.findall(r"(?:ld|st)\.global\S*", ptx)
    moved = [int(size, 0) for size in copies]
    assert sum(size for size in moved if size == 16) >= 0.75 * sum(moved), "narrow copies"
    if launch.table in ("downdate", "correct", "moment"):  # the matrix is accessed without shared memory
        assert direct
        assert all(".v4" in access for access in direct), "narrow access to the matrix"
