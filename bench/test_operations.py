"""pytest-benchmark cases of every operation, on each backend that runs it on this machine.

pytest bench/test_operations.py --benchmark-only --benchmark-group-by=param:op,param:n
"""

from __future__ import annotations

import pytest
import torch

from rlsedit_fast import ops
from rlsedit_fast.ops import dispatch

D_K, D_V = 4096, 1024
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(op, n):
    """Returns arguments that can be reused in repeated calls."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    keys, small = (scale * torch.randn(n, D_K, generator=generator, device=DEVICE) for scale in (D_K**-0.5, 1e-6))
    innovation, ones = torch.randn(n, D_V, generator=generator, device=DEVICE), torch.ones(n, device=DEVICE)
    return {
        "panel": lambda: (torch.eye(D_K, device=DEVICE), keys, small, ones),
        "factor": lambda: (keys, keys, innovation, ones, 1),
        "downdate_": lambda: (torch.eye(D_K, device=DEVICE), small, ones),
        "correct_": lambda: (torch.zeros(D_V, D_K, device=DEVICE), innovation, small, 1),
        "correct_split_": lambda: (*ops.split(torch.zeros(D_V, D_K, device=DEVICE)), innovation, small, 1),
        "moment_": lambda: (torch.eye(D_K, device=DEVICE), small.bfloat16()),
    }[op]()


@pytest.mark.parametrize("n", [1, 16, 100])
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("op", dispatch.OPERATIONS)
def test_operation(benchmark, op, backend, n):
    given = operands(op, n)
    if reason := dispatch.unsupported_reason(backend, op, [x for x in given if isinstance(x, torch.Tensor)]):
        pytest.skip(reason)

    def run():
        getattr(ops, op)(*given, backend=backend)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
    assert all(
        tensor.isfinite().all() for tensor in given if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    )
