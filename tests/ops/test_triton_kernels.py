"""The Triton kernels without a GPU: right in the interpreter, and compiled for the devices that they ship for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("rlsedit_fast.kernels", reason="needs an installed package: pip install -e .")

# Triton reads TRITON_INTERPRET when it is imported, so the interpreter has a process of its own.
INTERPRETED = """
import torch
from rlsedit_fast import ops
from rlsedit_fast.ops import reference

torch.manual_seed(0)
for d, r in ((1, 1), (3, 7), (17, 1), (64, 33), (100, 7), (200, 40), (130, 0)):
    square = torch.randn(d, d)
    base, pending = square @ square.T, torch.randn(r, d)
    base = base.tril() + base.tril(-1).T
    signs = torch.where(torch.arange(r) % 3 == 1, -1.0, 1.0)
    wide = torch.full((d, d + 3), float("nan"))
    wide[:, :d] = base
    got = wide[:, :d]
    ops.downdate_(got, pending, signs, backend="triton")
    truth = base.double()
    reference.downdate_(truth, pending.double(), signs.double())
    magnitude = base.double().abs() + pending.double().abs().T @ pending.double().abs()
    assert ((got - truth).abs() <= (r + 3) * 2.0**-24 * magnitude).all(), (d, r)
    assert torch.equal(got, got.T) and wide[:, d:].isnan().all(), (d, r)
print("passed")
"""


def old_interpreter_with_new_numpy():
    """Triton 3.6's interpreter turns one-element arrays into integers, which NumPy refuses from 2.4 on."""
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    return triton < (3, 7) and numpy >= (2, 4)


@pytest.mark.skipif(old_interpreter_with_new_numpy(), reason="Triton 3.6 interprets with NumPy before 2.4 only")
def test_downdate_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "passed", done.stderr


@pytest.fixture(scope="module")
def cuobjdump():
    import triton

    for place in ("backends/nvidia/bin/cuobjdump", "third_party/cuda/bin/cuobjdump"):
        if (tool := Path(triton.__file__).parent / place).exists():
            return tool
    pytest.skip("this triton ships no cuobjdump")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
@pytest.mark.parametrize("capability", [80, 90])
def test_downdate_compiles_without_spills(capability, precision, cuobjdump, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlsedit_fast.kernels import downdate

    assert precision in downdate.PRECISIONS
    table = downdate.configurations()
    options = dict(table.get(f"sm_{capability}", table["default"]))
    constants = {"TILE": options.pop("TILE"), "DEPTH": options.pop("DEPTH"), "PRECISION": precision}
    names = ("base", "pending", "signs", "base_stride", "pending_stride", "d", "r")
    signature = dict(zip(names, ("*fp32", "*fp32", "*fp32", "i32", "i32", "i32", "i32"), strict=True))
    source = ASTSource(
        downdate.downdate_kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constexprs=constants
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([cuobjdump, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    assert re.search(r"REG:\d+ STACK:0 .*LOCAL:0 ", usage), usage
    assert compiled.metadata.shared <= {80: 163, 90: 227}[capability] << 10
    if precision != "ieee":  # the products run on the tensor cores
        assert {80: "mma.sync", 90: "wgmma"}[capability] in compiled.asm["ptx"]
    stores = [line for line in compiled.asm["ttgir"].splitlines() if "tt.addptr" in line and "tensor<" in line]
    assert stores
    assert all("i64" in line for line in stores), "an address is computed in 32 bits"
