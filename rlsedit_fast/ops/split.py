"""A float32 number in two halves of 16 bits: the bfloat16 that a model computes with, and what that one lacks."""

from __future__ import annotations

import torch
from torch import Tensor

SPLIT_CHUNK = 1 << 22
"""Entries of a weight in two halves that are put together at a time: 16 MB in float32."""

_HALF = 0x8000  # half of the last bit that the upper half keeps


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`(high bfloat16, low int16)` of a float32 tensor, of its shape; `join` gives it back bit for bit.

    With `bits` the number's own, `high = (bits + 0x8000) >> 16` and `low = bits - (high << 16)`. `high` is the nearest
    bfloat16, halves away from zero: to even, a remainder of +32768 would occur, and int16 has no such number.
    """
    bits = weight.view(torch.int32)
    high = (bits + _HALF) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 tensor of which `high` (bfloat16) and `low` (int16) are the halves."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)
