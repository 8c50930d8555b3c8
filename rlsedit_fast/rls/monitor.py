"""How far the precision inverse has drifted from the inverse of what the state is known to hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PROBE_SEED = 20261
"""Any fixed seed: the same state must give the same residual on every run."""

ROWS = 512
"""Rows of C turned into float64 at a time."""

GAIN = 4.0
"""What the residual must exceed of its value when C was last made afresh, for a refresh to be worth it: on an
ill-conditioned precision merely storing C in float32 leaves a residual over the limit."""

LIMITS = {torch.float32: 1e-3, torch.float64: 1e-8}
"""The residual from which on a refresh is advised. In measured streams (bench/results/solver-accuracy.json) the
relative error of C was a part of the residual that shrinks with the condition of S: under a half at 1e2, a sixteenth at
1e4. So 1e-3 stands for a drift of 6e-5 at condition 1e4, where float32 is to stay within 1e-4; a better conditioned
state drifts less."""


@dataclass(frozen=True)
class Monitor:
    """The health of `C`.

    Attributes:
        residual: `||C S x - x|| / ||x||` for a fixed random x.
        needs_refresh: the residual is over the limit, and a refresh would lower it; call it with the edits held.
        advice: the same in words.
    """

    residual: float
    needs_refresh: bool
    advice: str


def probe(d_k: int, device: torch.device) -> Tensor:
    """The fixed random `x [d_k]`, float64."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return torch.randn(d_k, device="cpu", dtype=torch.float64, generator=generator).to(device)


@dataclass(frozen=True, eq=False)
class Sketch:
    """What is kept of the precision `S` in place of `S`, in float64.

    Attributes:
        probe: a fixed random `x [d_k]`.
        image: `S x [d_k]`.
        floor: the residual when C was last made afresh, from storing it in its dtype alone.
    """

    probe: Tensor
    image: Tensor
    floor: float = 0.0

    @classmethod
    def of(cls, precision: Tensor) -> Sketch:
        """The sketch of `S [d_k, d_k]`, float64; x is the same on every device."""
        x = probe(precision.shape[0], precision.device)
        return cls(x, precision @ x)

    def settled(self, inverse: Tensor) -> Sketch:
        """The sketch with its floor, for `C [d_k, d_k]` as it has just been made."""
        return replace(self, floor=self.residual(inverse, inverse[:0], inverse[:0, 0]))

    def residual(self, base: Tensor, pending: Tensor, signs: Tensor) -> float:
        """`||C S x - x|| / ||x||` for `C = base - U_p^T D U_p`, in float64; reads the base once, a chunk at a time."""
        product = torch.cat([part.double() @ self.image for part in torch.split(base, ROWS)])
        rows = pending.double()
        product -= rows.T @ (signs.double() * (rows @ self.image))
        return float((product - self.probe).norm() / self.probe.norm())

    def moved(self, keys: Tensor, weights: Tensor, sign: int) -> Sketch:
        """The sketch of `S + sign * K^T w K`, for `K [n, d_k]` and `w [n]` of any floating dtype."""
        keys = keys.double()
        return replace(self, image=self.image + sign * (keys.T @ (weights.double() * (keys @ self.probe))))


def inspect(sketch: Sketch, base: Tensor, pending: Tensor, signs: Tensor) -> Monitor:
    """Compares `C = base - U_p^T D U_p` with the sketch of S."""
    residual = sketch.residual(base, pending, signs)
    limit = max(LIMITS[base.dtype], GAIN * sketch.floor)
    measured = f"residual {residual:.1e}, limit {limit:.0e}"
    if residual <= limit:  # a NaN is not
        return Monitor(residual, False, f"C is as it should be: {measured}.")
    return Monitor(residual, True, f"C has drifted: {measured}; call refresh with all the edits held.")
