"""Monitors the drift of the precision inverse C from the inverse of the exact precision S."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsedit_fast.rls.columns import WHOLE, Columns

PROBE_SEED = 20261
"""Fixed seed: the same state gives the same residual in every run."""

ROWS = 512
"""Rows of C that are converted to float64 at a time."""

GAIN = 4.0
"""A refresh is recommended only if the residual exceeds its value after the last refresh by this factor: for an
ill-conditioned precision, storing C in float32 alone can exceed `LIMITS`."""

LIMITS = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Residual above which a refresh is recommended. In measured streams (bench/results/solver-accuracy.json) the relative
error of C was less than half of the residual at condition number 1e2 of S and a sixteenth at 1e4, so 1e-3 corresponds
to a relative error of 6e-5 at 1e4, within the float32 target of 1e-4."""


@dataclass(frozen=True)
class Monitor:
    """Drift of `C`.

    Attributes:
        residual: `||C S x - x|| / ||x||` for a fixed random x.
        needs_refresh: whether the residual exceeds the limit and a refresh with the applied edits would reduce it.
        advice: the same as text.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, RLSState
        >>> state = RLSState(torch.zeros(2, 3), Prior(lam=1.0))
        >>> state.monitor().needs_refresh
        False
    """

    residual: float
    needs_refresh: bool
    advice: str


def probe(d_k: int, device: torch.device) -> Tensor:
    """Returns the fixed random `x [d_k]`, float64."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return torch.randn(d_k, device="cpu", dtype=torch.float64, generator=generator).to(device)


@dataclass(frozen=True, eq=False)
class Sketch:
    """A float64 sketch of the precision `S`, stored instead of `S`; of both vectors the entries of the held columns.

    Attributes:
        probe: fixed random `x [d_k]`.
        image: `S x [d_k]`.
        floor: residual after the last build or refresh, caused by rounding C to its dtype.
    """

    probe: Tensor
    image: Tensor
    floor: float = 0.0

    @classmethod
    def of(cls, precision: Tensor) -> Sketch:
        """Returns the sketch of `S [d_k, d_k]`, float64. x is the same on every device."""
        x = probe(precision.shape[0], precision.device)
        return cls(x, precision @ x)

    def settled(self, inverse: Tensor) -> Sketch:
        """Returns the sketch with its floor, for a newly built `C [d_k, d_k]`."""
        return replace(self, floor=self.residual(inverse, inverse[:0], inverse[:0, 0]))

    def residual(self, base: Tensor, pending: Tensor, signs: Tensor, columns: Columns = WHOLE) -> float:
        """Returns `||C S x - x|| / ||x||` for `C = base - U_p^T D U_p` in float64, reading `base` once in chunks."""
        image = columns.gather(self.image, "monitor")
        product = torch.cat([part.double() @ image for part in torch.split(base, ROWS)])
        rows = pending.double()
        product -= rows.T @ (signs.double() * columns.total(rows @ self.image, "monitor"))
        return columns.norm(product - self.probe) / columns.norm(self.probe)

    def moved(self, keys: Tensor, noise: Tensor, sign: int, columns: Columns = WHOLE) -> Sketch:
        """Returns the sketch of `S + sign * K^T w K`, for `K [n, d_k]` and `1/w [n]` of any floating dtype."""
        keys = keys.double()
        seen = columns.total(keys @ self.probe, "sketch")
        return replace(self, image=torch.addmv(self.image, keys.T, seen / noise, alpha=sign))


def inspect(sketch: Sketch, base: Tensor, pending: Tensor, signs: Tensor, columns: Columns) -> Monitor:
    """Compares `C = base - U_p^T D U_p` with the sketch of `S`."""
    residual = sketch.residual(base, pending, signs, columns)
    limit = max(LIMITS[base.dtype], GAIN * sketch.floor)
    measured = f"residual {residual:.1e}, limit {limit:.0e}"
    if residual <= limit:  # false for NaN
        return Monitor(residual, False, f"C is accurate: {measured}.")
    return Monitor(residual, True, f"C has drifted: {measured}. Call refresh with all applied edits.")
