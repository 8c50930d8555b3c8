"""What many edits do to a layer, in closed form, for independent keys with a given second moment.

The derivation is in docs/capacity.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.prior import Prior

_STEPS = 400  # of the quadrature, evenly spaced in log c
_LINEAR = 1e-6  # c tr(Sigma C0) up to which everything is proportional to c


@dataclass(frozen=True)
class AsymptoticPoint:
    """A layer after `t` edits whose changes are independent with mean square 1; squares scale with the mean square.

    Attributes:
        edits: `t`.
        left: fraction of a change that is left over when it is written, `1 / (1 + g)`.
        objective: `J`.
        weight: `||W - W0||_F`.
        anchors: `||K0 (W - W0)^T||_F`; None without anchors.
    """

    edits: float
    left: float
    objective: float
    weight: float
    anchors: float | None


class Asymptotics:
    """Asymptotic formulas for one row per edit, with keys of second moment `Sigma` and a prior `S0`.

    With `T = (S0 + c Sigma)^-1`, `g = tr Sigma T`, `h = c tr(Sigma T Sigma T)` and `c (1 + g) = t`, an edit leaves
    `1 / (1 + g)` of its change over. If every value is a fixed one, `J = c`, and `||W - W0||^2 = dJ/d lam^2` is
    `c tr(T Sigma T) / (1 + g - h)`. If every value is the present output plus its change, as the editor writes it, `J`
    is the integral of `(1 + g - h) / (1 + g)` over c, and `||W - W0||^2` that of `tr(T Sigma T) / (1 + g)`. For the
    anchors, `T Sigma T` is `T Sigma T M` instead.

    Args:
        sigma: `Sigma = E[k k^T] [d_k, d_k]`.
        prior: the prior, with a moment if it has anchors.

    Raises:
        InputError: the moment is not a finite square matrix, or the prior has anchor keys instead of a moment.
        PriorError: the precision of the prior is not positive definite.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Asymptotics, Prior
        >>> formulas = Asymptotics(torch.eye(50), Prior(lam=0.1))
        >>> [round(formulas.fixed(edits).weight, 1) for edits in (20, 50, 200)]
        [0.8, 5.9, 0.6]
        >>> [round(formulas.relative(edits).weight, 1) for edits in (20, 50, 200)]
        [0.7, 2.1, 2.9]
    """

    @torch.no_grad()
    def __init__(self, sigma: Tensor, prior: Prior) -> None:
        checks.matrix("sigma", sigma, columns=sigma.shape[0])
        checks.finite(sigma=sigma)
        if prior.anchor_keys is not None:
            raise InputError("the prior has anchor_keys; pass anchor_moment, K0^T K0")
        lower = torch.linalg.cholesky(prior.precision(len(sigma), sigma.device))
        half = torch.linalg.solve_triangular(lower, sigma.double(), upper=False)
        values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(lower, half.T, upper=False))
        rows = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
        self._values = values.clamp_min(0.0)
        self._weight = rows.square().sum(0)
        self._anchors = (1 - prior.lam**2 * self._weight).clamp_min(0.0) / prior.mu**2 if prior.mu else None

    def fixed(self, edits: float) -> AsymptoticPoint:
        """Returns the layer after a number of edits, above 0, whose values are `K W0^T` plus their changes."""
        c = self._c(edits)
        g, h = self._sums(c)
        rates = self._values / (1 + c * self._values).square()  # eigenvalues of T Sigma T

        def size(metric: Tensor | None) -> float | None:
            return None if metric is None else math.sqrt(c * float((rates * metric).sum()) / (1 + g - h))

        return AsymptoticPoint(edits, 1 / (1 + g), c, size(self._weight) or 0.0, size(self._anchors))

    def relative(self, edits: float) -> AsymptoticPoint:
        """Returns the layer after a number of edits, above 0, with values relative to the present outputs."""
        end = self._c(edits)
        start = min(end, _LINEAR / float(self._values.sum()) if bool(self._values.any()) else end)
        grid = torch.linspace(math.log(start), math.log(end), _STEPS, dtype=torch.float64).exp().to(self._values.device)
        shrunk = self._values / (1 + grid[:, None] * self._values)
        g, h = shrunk.sum(1), grid * shrunk.square().sum(1)

        def integral(heights: Tensor) -> float:
            """Integrates over log c; below the grid the integrand is proportional to c."""
            values = grid * heights
            return float(values[0] + torch.trapezoid(values, grid.log()))

        def size(metric: Tensor | None) -> float | None:
            if metric is None:
                return None
            rates = self._values / (1 + grid[:, None] * self._values).square() @ metric
            return math.sqrt(integral(rates / (1 + g)))

        left = 1 / (1 + float(g[-1]))
        objective = integral((1 + g - h) / (1 + g))
        return AsymptoticPoint(edits, left, objective, size(self._weight) or 0.0, size(self._anchors))

    def _c(self, edits: float) -> float:
        """Returns c with `c (1 + g) = t`."""
        from scipy.optimize import brentq  # slow to import

        if not 0 < edits < math.inf:
            raise InputError(f"edits={edits}: expected a finite number above 0")
        return float(brentq(lambda c: c * (1 + self._sums(c)[0]) - edits, 0.0, edits, xtol=1e-14 * edits, rtol=1e-12))

    def _sums(self, c: float) -> tuple[float, float]:
        """Returns g and h."""
        shrunk = self._values / (1 + c * self._values)
        return float(shrunk.sum()), c * float(shrunk.square().sum())
