"""History-aware MEMIT: the keys of earlier edits are added to the moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, factor_prior
from rlsedit_fast.errors import UpdateError
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, kw_only=True)
class HistoryMEMIT(Rule):
    """MEMIT with the key cache of AlphaEdit (Fang et al. 2025, arXiv 2410.02355, eq. 15) but without its projection.

    Other papers report it as MEMIT+, MEMIT-seq or history-aware MEMIT. `D = E^T K (C0 + Kp^T Kp + K^T K)^-1`, where
    `Kp` are the keys of all earlier batches. It is solved as published, with a `[d_k, d_k]` factorization per batch,
    which RLS avoids; for lam = 0 the results are equal.

    Example:
        >>> from rlsedit_fast.baselines import HistoryMEMIT
        >>> HistoryMEMIT.accumulates_keys
        True
    """

    name: ClassVar[str] = "memit-history"
    accumulates_keys: ClassVar[bool] = True

    def init_memory(self, original: Tensor, prior: Prior, name: str) -> Tensor:
        """Returns `C0`, to which the keys are added."""
        factor_prior(prior, original.shape[1], original.device, name)
        return prior.precision(original.shape[1], original.device)

    def step(self, batch: Batch, weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule.step`."""
        precision = memory + (batch.keys * batch.weights[:, None]).T @ batch.keys
        lower, failed = torch.linalg.cholesky_ex(precision)
        if int(failed):
            raise UpdateError("C0 + Kp^T Kp + K^T K is not positive definite. No weight was modified. Increase lam.")
        pull = (batch.keys * batch.weights[:, None]).T @ batch.innovation
        return torch.cholesky_solve(pull, lower).T, precision
