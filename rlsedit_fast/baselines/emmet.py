"""EMMET: fits all edits of a batch exactly with the smallest change in the norm of the moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, exact_step, factor_prior
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, kw_only=True)
class EMMET(Rule):
    """Gupta et al. 2024, A Unified Framework for Model Editing (arXiv 2403.14236): ROME for batches.

    `D = E^T (K C0^-1 K^T)^-1 K C0^-1`, the minimizer of `tr(D C0 D^T)` subject to `K (W + D)^T = V`. The released code
    adds `damping I` to the inner matrix to improve its condition; with damping 1 this is MEMIT.

    Attributes:
        damping: 0 fits the edits exactly, as published; 0.1 in the released code.

    Example:
        >>> from rlsedit_fast.baselines import EMMET
        >>> EMMET(damping=0.1)
        EMMET(damping=0.1)
    """

    name: ClassVar[str] = "emmet"
    damping: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise InputError(f"damping={self.damping}: expected a finite number that is at least 0")

    def init_memory(self, original: Tensor, prior: Prior, name: str) -> Tensor:
        """Returns the Cholesky factor of `C0`."""
        return factor_prior(prior, original.shape[1], original.device, name)

    def step(self, batch: Batch, weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule.step`."""
        return exact_step(torch.cholesky_solve(batch.keys.T, memory).T, batch, self.damping, self.name), memory
