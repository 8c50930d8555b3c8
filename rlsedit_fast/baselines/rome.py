"""ROME: fits one edit at a time exactly, with the smallest change in the norm of the moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, factor_prior, reject_weights
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, kw_only=True)
class ROME(Rule):
    """Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv 2202.05262), eq. 2.

    `D = e^T (C^-1 k) / (k^T C^-1 k)` for one edit (`k [d_k]`, `e [d_v]`) with `C = E[k k^T]`, up to scale. ROME has no
    batches: the edits of a batch are applied in order, each from the weight after the previous one. (The released code
    takes the direction from a key averaged over contexts and the length from the key of the bare prompt; here, as in
    all rules, both use the keys of the batch.)

    Example:
        >>> from rlsedit_fast.baselines import ROME
        >>> ROME.name
        'rome'
    """

    name: ClassVar[str] = "rome"

    def init_memory(self, original: Tensor, prior: Prior, name: str) -> Tensor:
        """Returns the Cholesky factor of `C`."""
        return factor_prior(prior, original.shape[1], original.device, name)

    def step(self, batch: Batch, weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule.step`."""
        reject_weights(batch, self.name)
        projected = torch.cholesky_solve(batch.keys.T, memory).T
        total = torch.zeros_like(weight)
        for key, row, wanted in zip(batch.keys, projected, batch.innovation, strict=True):
            total += torch.outer((wanted - total @ key) / (row @ key), row)
        return total, memory
