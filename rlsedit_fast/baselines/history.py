"""History-aware MEMIT: the keys of all edits so far are among what is to stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, factored
from rlsedit_fast.errors import UpdateError
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, kw_only=True)
class HistoryMEMIT(Rule):
    """MEMIT with the cache of keys that AlphaEdit (Fang et al. 2025, arXiv 2410.02355, eq. 15) gives it, without its
    projection; third parties report it as MEMIT+, MEMIT-seq or history-aware MEMIT.

    `D = E^T K (C0 + Kp^T Kp + K^T K)^-1`, `Kp` being the keys of all batches before. Solved as published, by a
    factorisation of `[d_k, d_k]` per batch, which is what the recursive rule saves: with lam = 0 the two are one.
    """

    name: ClassVar[str] = "memit-history"
    accumulates_keys: ClassVar[bool] = True

    def start(self, original: Tensor, prior: Prior, name: str) -> Tensor:
        """`C0`, to which the keys are added."""
        factored(prior, original.shape[1], original.device, name)
        return prior.precision(original.shape[1], original.device)

    def change(self, batch: Batch, weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        held = memory + (batch.keys * batch.weights[:, None]).T @ batch.keys
        lower, failed = torch.linalg.cholesky_ex(held)
        if int(failed):
            raise UpdateError("C0 + Kp^T Kp + K^T K is no longer positive definite; nothing was changed. Raise lam")
        pull = (batch.keys * batch.weights[:, None]).T @ batch.innovation
        return torch.cholesky_solve(pull, lower).T, held
