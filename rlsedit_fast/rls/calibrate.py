"""Tries batches of edits on a layer under a family of priors, with a single factorization."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlsedit_fast.errors import PriorError
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.block_covariance import Covariances
from rlsedit_fast.rls.block_prior import BlockPrior
from rlsedit_fast.rls.blocks import BlockLayout, BlockMoment
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

    def outputs(self, keys: Tensor, shared: Tensor) -> Tensor:
        """Returns `K' dW^T [m, d_v]` of that change, for keys `K' [m, d_k]`, float64."""
        return keys.double() @ self.change(shared).T

    def leakage(self, shared: Tensor) -> float:
        """Returns `||K0 dW^T||_F` of that change, from `F M F^T = G - ridge F F^T`."""
        energy = self.gram - self._ridge * (self.projected @ self.projected.T)
        return math.sqrt(max(float((shared * (energy @ shared)).sum()), 0.0))


class BlockTrialLayer:
    """The same for a layer of experts.

    Args:
        layout: layout of the keys.
        moment: moments of the anchors; None for none, then the precision of every block is the identity.
        ridge: above 0 with a moment.
        device: device to compute on.
        name: name of the layer.

    Raises:
        PriorError: the ridge is 0, or a precision is not positive definite.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import BlockLayout, BlockTrialLayer
        >>> layout = BlockLayout(experts=2, width=1, active=2)
        >>> layer = BlockTrialLayer(layout, None, 0.0, torch.device("cpu"), "layer 0")
        >>> panel = layer.project(torch.tensor([[3.0, 4.0, 0.0, 1.0]]))
        >>> panel.gram.tolist(), panel.change(torch.ones(1, 1, dtype=torch.float64))[1].tolist()
        ([[25.0]], [[4.0]])
    """

    @torch.no_grad()
    def __init__(
        self, layout: BlockLayout, moment: BlockMoment | None, ridge: float, device: torch.device, name: str
    ) -> None:
        lam, mu = (1.0, 0.0) if moment is None else (math.sqrt(ridge), 1.0)
        self.prior = BlockPrior(layout=layout, lam=lam, mu=mu, moment=moment)
        self.covariances = Covariances(self.prior, device, torch.float64, name)

    @torch.no_grad()
    def project(self, keys: Tensor) -> BlockTrialPanel:
        """Projects rows of keys of a batch, any floating dtype."""
        return BlockTrialPanel(self, keys.double())


class BlockTrialPanel:
    """A batch projected by a `BlockTrialLayer`.

    Attributes:
        gram: `G = K C0 K^T [n, n]`, float64.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import BlockLayout, BlockTrialLayer
        >>> layout = BlockLayout(experts=1, width=1, active=1)
        >>> panel = BlockTrialLayer(layout, None, 0.0, torch.device("cpu"), "layer").project(torch.tensor([[2.0, 0.0]]))
        >>> panel.leakage(torch.ones(1, 1, dtype=torch.float64))
        2.0
    """

    def __init__(self, layer: BlockTrialLayer, keys: Tensor) -> None:
        self._layer, self._keys = layer, keys
        self._projected, self._groups = layer.covariances.project(keys)
        gram = layer.covariances.gram(keys, keys, self._projected)
        self.gram = 0.5 * (gram + gram.T)

    def change(self, shared: Tensor) -> dict[int, Tensor]:
        """Returns the change of each block that the batch reaches, `[d_v, block width]`, for `X [n, d_v]`, float64."""
        layout = self._layer.prior.layout
        return {g.block: shared[g.rows].T @ layout.part(self._projected, g) for g in self._groups}

    def outputs(self, keys: Tensor, shared: Tensor) -> Tensor:
        """Returns the outputs of that change at rows of keys, `[m, d_v]`, float64."""
        return self._layer.covariances.gram(keys.double(), self._keys, self._projected) @ shared

    def leakage(self, shared: Tensor) -> float:
        """Returns an upper bound of `||K0 dW^T||_F` of that change; without anchors `||dW||_F`."""
        prior, energy = self._layer.prior, 0.0
        for block, change in self.change(shared).items():
            if prior.moment is None:
                energy += float(change.square().sum())
            else:
                moment = prior.moment.block(block).to(change.device, torch.float64)
                energy += prior.kappa * float(((change @ moment) * change).sum())
        return math.sqrt(max(energy, 0.0))
