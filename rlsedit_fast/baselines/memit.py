"""MEMIT: ridge regression of a batch against the moment of what is to stay, and nothing remembered of earlier edits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, factored, ridge_step
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, kw_only=True)
class MEMIT(Rule):
    """Meng et al. 2023, Mass-Editing Memory in a Transformer (arXiv 2210.07229), eq. 14.

    `D = E^T K (C0 + K^T K)^-1` with `C0 = moment_weight * E[k k^T]`: the minimiser of
    `||K (W + D)^T - V||^2 + tr(D C0 D^T)` for one batch. Weights of edits come in as `K^T w K`.
    """

    name: ClassVar[str] = "memit"

    def start(self, original: Tensor, prior: Prior, name: str) -> Tensor:
        """The Cholesky factor of `C0`."""
        return factored(prior, original.shape[1], original.device, name)

    def change(self, batch: Batch, weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        return ridge_step(torch.cholesky_solve(batch.keys.T, memory).T, batch), memory
