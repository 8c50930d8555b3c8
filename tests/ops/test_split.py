"""Splitting and joining float32 numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsedit_fast import ops

NANS = [
    sign | 0x7F800000 | payload
    for sign in (0, 0x80000000)
    for payload in (*(1 << bit for bit in range(23)), 0x7FFF, 0x8001, 0x3FFFFF, 0x407FFF, 0x7F7FFF, 0x7F8000, 0x7FFFFF)
]
EDGES = [0x00000000, 0x80000000, 0x3F808000, 0x3F807FFF, 0xBF808000, 0xBF80FFFF, 0x00000001, 0x807FFFFF, 0x7F7F7FFF]


def tensor(bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_join_restores_every_number(bits):
    numbers = tensor(EDGES + bits)
    joined = ops.join(*ops.split(numbers))
    same = joined.view(torch.int32) == numbers.view(torch.int32)
    assert torch.equal(same | numbers.isnan(), torch.ones_like(same))
    assert torch.equal(joined.isnan(), numbers.isnan())


def test_every_nan_stays_a_nan():
    """Also 0x7FFFFFFF, the NaN of NVIDIA GPUs, of which rounding would make -0.0."""
    nans = tensor(NANS)
    assert nans.isnan().all()
    high, low = ops.split(nans)
    assert high.isnan().all()
    assert ops.join(high, low).isnan().all()


@pytest.mark.parametrize("sign", [0, 0x80000000])
def test_numbers_next_to_infinity_round_to_infinity_and_are_restored(sign):
    numbers = tensor([sign | bits for bits in (0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000)])
    high, low = ops.split(numbers)
    assert high.isinf().tolist() == [False, True, True, True]
    assert torch.equal(ops.join(high, low), numbers)


def test_high_is_the_nearest_bfloat16():
    weight = torch.randn(100_000) * torch.logspace(-30, 30, 100_000)
    high, low = ops.split(weight)
    assert low.dtype == torch.int16
    nearest = weight.bfloat16()
    ties = low.int().abs() == 2**15
    assert torch.equal(high[~ties], nearest[~ties])
    assert torch.equal(ops.split(tensor([0x3F808000]))[0].view(torch.int16), torch.tensor([0x3F81], dtype=torch.int16))
