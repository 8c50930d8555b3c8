"""Removes every barrier, fence and wait of the compiled kernels in turn: the checks find it, or it is redundant.

The result of all kernels is bench/results/kernel-mistakes.json.
"""

from __future__ import annotations

import pytest
from ptx_on_host import cases, cuda_kernels, machine, mistakes
from ptx_on_host.mistakes import outcomes, planted

from rlsedit_fast.ops.cuda_launch import source

pytestmark = [pytest.mark.slow, pytest.mark.skipif(machine.compiler() is None, reason="needs a C++ compiler")]

# The end of an unrolled loop, after which nothing is read.
CUDA_REDUNDANT = {"downdate": 1, "factor": 1}
QUICK = [(80, "bf16x6", "downdate_kernel TILE=64"), (90, "bf16x6", "rows_kernel ROWS=64 DEPTH=32")]


@pytest.fixture(scope="module")
def cuda_launches():
    try:
        return cases.of_cuda(cuda_kernels.nvrtc_ptx())
    except cuda_kernels.Missing as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["downdate", "panel4", "panel8", "panel_sum", "gram", "sigma", "factor", "update"])
def test_every_barrier_of_the_cuda_kernels_is_needed(cuda_launches, name):
    found = outcomes(cuda_launches[name])
    assert found
    assert {outcome.state for outcome in found} <= {"found", "redundant"}
    redundant = [outcome for outcome in found if outcome.state == "redundant"]
    assert len(redundant) == CUDA_REDUNDANT.get(name, 0)


def test_a_barrier_removed_from_the_source_is_found(monkeypatch):
    """The same through the compiler, which could have moved accesses instead."""
    text = source()
    barrier = "__syncthreads();  // wait until the previous slab has been read"
    assert text.count(barrier) == 1
    monkeypatch.setattr(cuda_kernels.cuda_launch, "source", lambda: text.replace(barrier, ""))
    try:
        changed = cuda_kernels.nvrtc_ptx.__wrapped__()
    except cuda_kernels.Missing as error:
        pytest.skip(str(error))
    with pytest.raises(machine.MachineError, match=r"rlsedit_gram: shared memory: thread \d+ .* with no barrier"):
        cases.of_cuda(changed)


def check_triton(launch):
    found = outcomes(launch)
    assert found
    assert {outcome.state for outcome in found} <= {"found", "redundant"}
    caught = {outcome.mistake.kind for outcome in found if outcome.state == "found"}
    # Of each kind of instruction that the kernel has, one at least is needed, in every form of the mistake.
    assert caught == {outcome.mistake.kind for outcome in found}
    # All those that are redundant together leave a kernel that is right in every order of execution.
    together = mistakes.redundant_together(launch, found)
    correct = launch.copied()
    correct.run()
    assert not mistakes.failure(launch, planted(launch.program, *together), correct)


@pytest.mark.parametrize(("capability", "precision", "start"), QUICK)
def test_mistakes_of_triton_kernels(capability, precision, start):
    pytest.importorskip("triton", reason="needs triton")
    launches = cases.of_triton(capability, precision)
    (launch,) = (launch for name, launch in launches.items() if name.startswith(start))
    check_triton(launch)


@pytest.mark.soak
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("precision", ["tf32x3", "bf16x6", "ieee"])
def test_mistakes_of_every_triton_configuration(capability, precision):
    pytest.importorskip("triton", reason="needs triton")
    for launch in cases.of_triton(capability, precision).values():
        check_triton(launch)
