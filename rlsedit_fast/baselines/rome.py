"""ROME: one edit at a time, each held exactly at the least change by the measure of the moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, factored, refuse_weights
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, kw_only=True)
class ROME(Rule):
    """Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv 2202.05262), eq. 2.

    `D = e^T (C^-1 k) / (k^T C^-1 k)` for one edit (`k [d_k]`, `e [d_v]`), `C = E[k k^T]`, of which only the direction
    matters. ROME knows no batches: the edits of one go in one after the other, each towards the output that was wanted
    of it, from the weight that those before it left. (The release takes the direction from a key that is averaged over
    contexts and the length from the bare prompt's; here, as in all rules, both have the batch's keys.)
    """

    name: ClassVar[str] = "rome"

    def start(self, original: Tensor, prior: Prior, name: str) -> Tensor:
        """The Cholesky factor of `C`."""
        return factored(prior, original.shape[1], original.device, name)

    def change(self, batch: Batch, weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        refuse_weights(batch, self.name)
        projected = torch.cholesky_solve(batch.keys.T, memory).T
        total = torch.zeros_like(weight)
        for key, row, wanted in zip(batch.keys, projected, batch.innovation, strict=True):
            total += torch.outer((wanted - total @ key) / (row @ key), row)
        return total, memory
