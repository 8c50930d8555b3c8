"""Storage of rows in half the bytes: float16 values, scaled by a power of two per row."""

from __future__ import annotations

import torch
from torch import Tensor

_TOP = 15
"""Rows are scaled below 2^15, half of the largest float16 number, so that rounding up stays within its range."""


def packed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Packs rows `[n, d]` into `(halves, exponents)`: float16 `[n, d]` and int16 `[n]`.

    The error of an entry is at most 2^-11 of the entry or 2^-29 of the largest entry of its row, whichever is larger.
    """
    exponents = torch.frexp(rows.abs().amax(1)).exponent.to(torch.int16)
    return (rows.double() * _powers(_TOP - exponents)).half(), exponents


def unpacked(halves: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the rows of `packed` in `dtype`; exactly equal to `rounded` of the original rows."""
    return (halves.double() * _powers(exponents - _TOP)).to(dtype)


def rounded(rows: Tensor) -> Tensor:
    """Returns rows `[n, d]` after packing and unpacking, in their own dtype."""
    return unpacked(*packed(rows), rows.dtype)


def _powers(exponents: Tensor) -> Tensor:
    """Returns powers of two `[n, 1]`, float64, built from their bits; library functions may be off by one ulp."""
    return ((exponents.long() + 1023) << 52).view(torch.float64)[:, None]
