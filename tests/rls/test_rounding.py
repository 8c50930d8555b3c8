"""Rows packed as float16 with exponents equal the rounded rows exactly, at every scale."""

import pytest
import torch

from rlsedit_fast.rls.rounding import packed, rounded, unpacked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 3e38, 1e-38])
def test_rounding_is_idempotent_and_within_its_bound(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 40, generator=generator, dtype=dtype) * torch.logspace(-3, 0, 50, dtype=dtype)[:, None]
    rows = rows / rows.abs().max() * scale
    once = rounded(rows)
    assert once.dtype == dtype
    largest = rows.abs().amax(1, keepdim=True)
    bound = torch.maximum(rows.abs().double() * 2.0**-11, largest.double() * 2.0**-29)
    assert bool(((once.double() - rows.double()).abs() <= bound).all())
    assert torch.equal(rounded(once), once)
    halves, exponents = packed(rows)
    assert (halves.dtype, exponents.dtype) == (torch.float16, torch.int16)
    assert torch.equal(unpacked(halves, exponents, dtype), once)


def test_rows_of_zeros_and_rows_that_are_not_finite_stay_so():
    rows = torch.tensor([[0.0, 0.0], [1.0, torch.nan], [torch.inf, 1.0]])
    once = rounded(rows)
    assert torch.equal(once[0], rows[0])
    assert not bool(once[1].isfinite().all())
    assert not bool(once[2].isfinite().all())
