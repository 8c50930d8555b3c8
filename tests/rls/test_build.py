"""The blocked float64 factorization and inverse."""

from __future__ import annotations

import pytest
import torch

from rlsedit_fast.errors import PriorError
from rlsedit_fast.rls import Prior, build
from rlsedit_fast.rls.prior import symmetric


def made(d: int) -> torch.Tensor:
    """Returns a precision whose features span three decades."""
    generator = torch.Generator().manual_seed(d)
    scale = torch.logspace(0, -3, d, dtype=torch.float64)
    rows = torch.randn(2 * d, d, dtype=torch.float64, generator=generator) * scale
    return rows.T @ rows + 1e-4 * torch.eye(d, dtype=torch.float64)


@pytest.fixture(autouse=True)
def blocks(monkeypatch) -> None:
    monkeypatch.setattr(build, "MIN_BLOCK", 16)


@pytest.mark.parametrize("d", [1, 16, 17, 203])
def test_blocked_factor(d) -> None:
    precision = made(d)
    found = build._factor_(precision.clone(), 1.0, 0.0, "layer").tril()
    size = precision.diagonal().sqrt()
    eps = torch.finfo(torch.float64).eps
    assert float(((found @ found.T - precision) / (size[:, None] * size)).abs().max()) <= 2 * d * eps


@pytest.mark.parametrize("index", [0, 15, 16, 40, 202])
def test_error_names_the_failed_pivot(index) -> None:
    lower = torch.linalg.cholesky(made(203))
    lower[index, index] = 0
    precision = lower @ lower.T
    precision[index, index] -= 0.25 * precision.diagonal().max()
    pivot = -0.25 * float((lower @ lower.T).diagonal().max())
    with pytest.raises(PriorError, match=rf"smallest pivot {pivot:g} at feature {index}\."):
        build._factor_(precision, 1.0, 0.0, "layer")


@pytest.mark.parametrize("d", [1, 16, 17, 203])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocked_inverse(d, dtype) -> None:
    precision = made(d)
    found = build._inverse_(build._factor_(precision.clone(), 1.0, 0.0, "layer"), dtype)
    assert found.dtype == dtype
    assert torch.equal(found, found.T)
    # Relative to the scales of the features; float64 loses the condition of the scaled matrix, float32 rounds once.
    size = precision.diagonal().sqrt()
    scaled = size[:, None] * found.double() * size
    truth = torch.linalg.inv(precision / (size[:, None] * size))
    condition = float(torch.linalg.cond(precision / (size[:, None] * size)))
    allowed = torch.finfo(dtype).eps + 4 * d * torch.finfo(torch.float64).eps * condition
    assert float((scaled - truth).norm() / truth.norm()) <= allowed


def test_chunked_symmetrization(monkeypatch) -> None:
    monkeypatch.setattr("rlsedit_fast.rls.prior.CHUNK", 5)
    moment = torch.randn(13, 13, generator=torch.Generator().manual_seed(0))
    exact = (moment.double() + moment.double().T) / 2
    assert torch.equal(symmetric(moment, moment.device), exact)
    asymmetric = exact.clone()
    asymmetric[12, 3] += 1
    with pytest.raises(ValueError, match="not symmetric: it differs from its transpose by up to 1 "):
        Prior(lam=1.0, mu=1.0, anchor_moment=asymmetric)


def test_failed_pivot_with_an_earlier_rounding_failure() -> None:
    assert build._failed_pivot(torch.diag(torch.tensor([1.0, -1e-20, -1.0], dtype=torch.float64)), 2) == 0.0
