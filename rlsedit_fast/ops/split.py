"""Splits a float32 number into two 16-bit halves: the bfloat16 that the model uses, and the remainder."""

from __future__ import annotations

import torch
from torch import Tensor

SPLIT_CHUNK = 1 << 22
"""Entries of a split weight that are joined at a time (16 MB in float32)."""

_HALF = 0x8000  # half of the last bit that the upper half keeps


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a float32 tensor into a bfloat16 and an int16 tensor; `join` restores every number bit for bit.

    With `bits` the bit pattern of a number, `high = (bits + 0x8000) >> 16` and `low = bits - (high << 16)`. `high` is
    the nearest bfloat16, with ties rounded away from zero: rounding ties to even would need a remainder of +32768,
    which int16 cannot represent. The upper half of a number next to infinity is infinite, and `join` restores the
    number. A NaN becomes the quiet NaN 0x7FC00000: rounding could turn its payload into a number or an infinity.

    Args:
        weight: float32 tensor of any shape.

    Returns:
        `(high, low)`, bfloat16 and int16, both of the shape of `weight`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.ops import split
        >>> split(torch.tensor([1.0, 0.1]))
        (tensor([1.0000, 0.1001], dtype=torch.bfloat16), tensor([     0, -13107], dtype=torch.int16))
    """
    bits = weight.masked_fill(weight.isnan(), torch.nan).view(torch.int32)
    high = (bits + _HALF) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """Joins the halves that `split` returned.

    Args:
        high: bfloat16 tensor of any shape.
        low: int16 tensor of the same shape.

    Returns:
        A float32 tensor of that shape.

    Example:
        >>> import torch
        >>> from rlsedit_fast.ops import join, split
        >>> weight = torch.tensor([1.0, 0.1])
        >>> torch.equal(join(*split(weight)), weight)
        True
    """
    return high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(low).view(torch.float32)
