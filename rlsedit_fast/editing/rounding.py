"""Rows in half of their bytes: sixteen-bit floats under a power of two of each row's own."""

from __future__ import annotations

import torch
from torch import Tensor

_TOP = 15
"""Rows are scaled to below 2^15, half of the largest sixteen-bit float, so that rounding up cannot leave its range."""


def packed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`(halves, exponents)` of rows `[n, d]`: float16 `[n, d]` and int16 `[n]`.

    An entry is off by at most 2^-11 of itself, or of 2^-29 of its row's largest, whichever is more.
    """
    exponents = torch.frexp(rows.abs().amax(1)).exponent.to(torch.int16)
    return (rows.double() * _powers(_TOP - exponents)).half(), exponents


def unpacked(halves: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows again, exactly as `rounded` has them."""
    return (halves.double() * _powers(exponents - _TOP)).to(dtype)


def rounded(rows: Tensor) -> Tensor:
    """Rows `[n, d]` as packing leaves them, in their own dtype."""
    return unpacked(*packed(rows), rows.dtype)


def _powers(exponents: Tensor) -> Tensor:
    """Powers of two `[n, 1]`, float64, made of their bits: library functions may be off in the last place."""
    return ((exponents.long() + 1023) << 52).view(torch.float64)[:, None]
