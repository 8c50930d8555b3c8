"""Tries batches of edits on a layer under a family of priors, with a single factorization."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlsedit_fast.errors import PriorError
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.prior import symmetric


class TrialLayer:
    """Factored precision `S = M + ridge I` of one layer.

    A prior with anchor moment M, any `mu` and `lam = mu sqrt(ridge)` has the precision `mu^2 S`, so projecting a batch
    with S projects it with all of these priors, up to the factor `1/mu^2`.

    Args:
        moment: `K0^T K0 [d_k, d_k]`, float32 or float64, as in `Prior.anchor_moment`; on any device.
        ridge: at least 0.
        device: device to compute on.
        name: name of the layer, for error messages.

    Raises:
        InputError: the moment is not a finite square matrix.
        PriorError: S is not positive definite.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import TrialLayer
        >>> layer = TrialLayer(torch.eye(3), ridge=3.0, device=torch.device("cpu"), name="layer 0")
        >>> layer.project(torch.tensor([[4.0, 0.0, 0.0]])).projected.tolist()
        [[1.0, 0.0, 0.0]]
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
                f"{name}: the anchor moment with ridge {ridge:g} is not positive definite. Increase ridge or lam, or "
                "use more anchor text."
            )
        self._ridge = ridge

    @torch.no_grad()
    def project(self, keys: Tensor) -> TrialPanel:
        """Projects the keys `K [n, d_k]` of a batch, any floating dtype."""
        keys = keys.double()
        projected = torch.cholesky_solve(keys.T, self._lower).T
        gram = projected @ keys.T
        return TrialPanel(projected, 0.5 * (gram + gram.T), self._ridge)


class TrialPanel:
    """A batch projected by a `TrialLayer`.

    Attributes:
        projected: `F = K S^-1 [n, d_k]`, float64.
        gram: `G = F K^T [n, n]`, float64.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import TrialLayer
        >>> layer = TrialLayer(torch.eye(2), ridge=3.0, device=torch.device("cpu"), name="layer 0")
        >>> panel = layer.project(torch.tensor([[4.0, 0.0]]))
        >>> shared = torch.ones(1, 3, dtype=torch.float64)
        >>> panel.change(shared).tolist()
        [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
        >>> round(panel.leakage(shared), 4)
        1.7321
    """

    def __init__(self, projected: Tensor, gram: Tensor, ridge: float) -> None:
        self.projected, self.gram = projected, gram
        self._ridge = ridge

    def change(self, shared: Tensor) -> Tensor:
        """Returns the weight change `dW = X^T F [d_v, d_k]` for `X [n, d_v]`, float64."""
        return shared.T @ self.projected

    def leakage(self, shared: Tensor) -> float:
        """Returns `||K0 dW^T||_F` of that change, from `F M F^T = G - ridge F F^T`."""
        energy = self.gram - self._ridge * (self.projected @ self.projected.T)
        return math.sqrt(max(float((shared * (energy @ shared)).sum()), 0.0))
