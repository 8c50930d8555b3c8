"""MEMIT: ridge regression of a batch against the moment of the anchors, without memory of earlier edits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, factor_prior, ridge_step
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, kw_only=True)
class MEMIT(Rule):
    """Meng et al. 2023, Mass-Editing Memory in a Transformer (arXiv 2210.07229), eq. 14.

    `D = E^T K (C0 + K^T K)^-1` with `C0 = moment_weight * E[k k^T]`, the minimizer of
    `||K (W + D)^T - V||^2 + tr(D C0 D^T)` for one batch. Edit weights enter as `K^T w K`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.baselines import MEMIT, Batch
        >>> from rlsedit_fast.rls import Prior
        >>> weight = torch.zeros(1, 3, dtype=torch.float64)
        >>> memory = MEMIT().init_memory(weight, Prior(lam=1.0), "layer 0")
        >>> ones = torch.ones(1, 3, dtype=torch.float64)
        >>> batch = Batch(keys=ones, innovation=4 * ones[:, :1], weights=ones[0, :1])
        >>> change, memory = MEMIT().step(batch, weight, memory)
        >>> change.tolist()
        [[1.0, 1.0, 1.0]]
    """

    name: ClassVar[str] = "memit"

    def init_memory(self, original: Tensor, prior: Prior, name: str) -> Tensor:
        """Returns the Cholesky factor of `C0`."""
        return factor_prior(prior, original.shape[1], original.device, name)

    def step(self, batch: Batch, weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule.step`."""
        return ridge_step(torch.cholesky_solve(batch.keys.T, memory).T, batch), memory
