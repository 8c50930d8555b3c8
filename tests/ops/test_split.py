"""Splitting and joining float32 numbers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsedit_fast import ops

EDGES = [0x00000000, 0x80000000, 0x3F808000, 0x3F807FFF, 0xBF808000, 0xBF80FFFF, 0x00000001, 0x807FFFFF, 0x7F7F7FFF]


def tensor(bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_join_restores_every_number(bits):
    given_bits = tensor(EDGES + bits)
    assert torch.equal(ops.join(*ops.split(given_bits)).view(torch.int32), given_bits.view(torch.int32))


def test_high_is_the_nearest_bfloat16():
    weight = torch.randn(100_000) * torch.logspace(-30, 30, 100_000)
    high, low = ops.split(weight)
    assert low.dtype == torch.int16
    nearest = weight.bfloat16()
    ties = low.int().abs() == 2**15
    assert torch.equal(high[~ties], nearest[~ties])
    assert torch.equal(ops.split(tensor([0x3F808000]))[0].view(torch.int16), torch.tensor([0x3F81], dtype=torch.int16))
