"""Limits on what the compiled kernels do, counted by bench/ptx_on_host; see bench/kernel_counts.py."""

from __future__ import annotations

import pytest
from ptx_on_host import cases, counting, cuda_kernels, machine

pytestmark = [pytest.mark.slow, pytest.mark.skipif(machine.compiler() is None, reason="needs a C++ compiler")]

CONFLICTS = 2.0  # wavefronts of shared memory for every necessary one
SECTORS = 1.1  # sectors of global memory for every necessary one, in a launch


def test_bank_conflicts_of_the_cuda_kernels():
    try:
        launches = cases.of_cuda(cuda_kernels.nvrtc_ptx())
    except cuda_kernels.Missing as error:
        pytest.skip(str(error))
    for name, launch in launches.items():
        counts = counting.counted(launch)
        assert counts.wavefronts <= 1.15 * counts.least_wavefronts, name


@pytest.mark.parametrize("capability", [80, 90])
def test_bank_conflicts_of_default_configurations(capability):
    """No instruction of a default configuration has more than two wavefronts for every necessary one."""
    pytest.importorskip("triton", reason="needs triton")
    from rlsedit_fast.kernels.precision import PRECISIONS

    checked = set()
    for precision in PRECISIONS:
        for name, launch in cases.of_triton(capability, precision).items():
            if not cases.is_default(name, capability, precision):
                continue
            checked.add(name)
            counts = counting.counted(launch)
            for one in counts.shared:
                assert one.ratio <= CONFLICTS, f"{name}: {one}"
            assert counts.sectors <= SECTORS * counts.least_sectors, name
    assert len(checked) >= 20


def test_tf32_stores_of_transposed_operands_conflict():
    """The reason for bf16x6 on sm_90. If this fails, the compiler has changed: compare the defaults again."""
    pytest.importorskip("triton", reason="needs triton")
    worst = {}
    for name, launch in cases.of_triton(90, "tf32x3").items():
        ratio = max(one.ratio for one in counting.counted(launch).shared)
        worst[name.split()[0]] = max(worst.get(name.split()[0], 0), ratio)
    assert worst["downdate_kernel"] == worst["correct_kernel"] == worst["moment_kernel"] == 16
    assert worst["rows_kernel"] <= CONFLICTS
