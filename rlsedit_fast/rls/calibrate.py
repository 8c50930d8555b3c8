"""A layer on which a batch of edits is tried under any prior of one form, from a single factorization."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlsedit_fast.errors import PriorError
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.prior import symmetric


class TrialLayer:
    """The precision `S = M + ridge I` of one layer, factored once.

    A prior with anchor moment M, any `mu` and `lam = mu sqrt(ridge)` has the precision `mu^2 S`, so a batch projected
    through S is projected through all of these priors up to the factor `1/mu^2`.

    Args:
        moment: `K0^T K0 [d_k, d_k]`, as in `Prior.anchor_moment`, on any device.
        ridge: at least 0.
        device: where the work is done.
        name: of the layer, for errors.

    Raises:
        InputError: the moment is not a finite square matrix.
        PriorError: S is not positive definite.
    """

    @torch.no_grad()
    def __init__(self, moment: Tensor, ridge: float, device: torch.device, name: str) -> None:
        checks.matrix(f"{name}: anchor moment", moment, columns=moment.shape[0])
        checks.finite(**{f"{name}: anchor moment": moment})
        precision = symmetric(moment, device)
        precision.diagonal().add_(ridge)
        self._lower, info = torch.linalg.cholesky_ex(precision)
        if int(info):
            raise PriorError(
                f"{name}: the anchor moment with ridge {ridge:g} is not positive definite; raise ridge or lam, or "
                "anchor more text."
            )
        self._ridge = ridge

    @torch.no_grad()
    def project(self, keys: Tensor) -> TrialPanel:
        """A batch's keys `K [n, d_k]` through the layer."""
        keys = keys.double()
        projected = torch.cholesky_solve(keys.T, self._lower).T
        gram = projected @ keys.T
        return TrialPanel(projected, 0.5 * (gram + gram.T), self._ridge)


class TrialPanel:
    """A batch as a `TrialLayer` sees it.

    Attributes:
        projected: `F = K S^-1 [n, d_k]`, float64.
        gram: `G = F K^T [n, n]`, float64.
    """

    def __init__(self, projected: Tensor, gram: Tensor, ridge: float) -> None:
        self.projected, self.gram = projected, gram
        self._ridge = ridge

    def change(self, shared: Tensor) -> Tensor:
        """`dW = X^T F [d_v, d_k]` for `X [n, d_v]`."""
        return shared.T @ self.projected

    def leakage(self, shared: Tensor) -> float:
        """`||K0 dW^T||_F` of that change: `F M F^T = G - ridge F F^T`, so the moment is not read again."""
        energy = self.gram - self._ridge * (self.projected @ self.projected.T)
        return math.sqrt(max(float((shared * (energy @ shared)).sum()), 0.0))
