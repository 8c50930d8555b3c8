"""How far the precision inverse has drifted from the inverse of what the state is known to hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PROBE_SEED = 20261
"""Any fixed seed: the same state must give the same residual on every run."""

ROWS = 512
"""Rows of C turned into float64 at a time for the residual."""


@dataclass(frozen=True)
class Monitor:
    """The health of `C`.

    Attributes:
        residual: `||C S x - x|| / ||x||` for a fixed random x.
        needs_refresh: the residual is beyond what the dtype should show; call `refresh` with the edits held.
        advice: the same in words.
    """

    residual: float
    needs_refresh: bool
    advice: str


def probe(d_k: int, device: torch.device) -> Tensor:
    """The fixed random `x [d_k]`, float64, the same on every device."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return torch.randn(d_k, dtype=torch.float64, generator=generator).to(device)


def image_change(x: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """`K^T (w * (K x)) [d_k]` in float64: what a batch adds to `S x`."""
    keys = keys.double()
    return keys.T @ (weights.double() * (keys @ x))


def residual(x: Tensor, image: Tensor, base: Tensor, pending: Tensor, signs: Tensor) -> float:
    """`||C s - x|| / ||x||` for `C = base - U_p^T D U_p` and `s = S x`, in float64, the base read a chunk at a time."""
    product = torch.cat([part.double() @ image for part in torch.split(base, ROWS)])
    rows = pending.double()
    product -= rows.T @ (signs.double() * (rows @ image))
    return float((product - x).norm() / x.norm())


def judge(value: float, dtype: torch.dtype) -> Monitor:
    """The verdict on a residual for a state that computes in `dtype`."""
    limit = LIMITS[dtype]
    if value <= limit:  # a NaN is not
        return Monitor(value, False, f"C is as it should be: residual {value:.1e}, limit {limit:.0e}.")
    advice = f"C has drifted: residual {value:.1e} is over {limit:.0e}; call refresh with all the edits held."
    return Monitor(value, True, advice)


LIMITS = {torch.float32: 1e-2, torch.float64: 1e-8}
