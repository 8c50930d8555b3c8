"""EMMET: a batch of edits, all held exactly, at the least change by the measure of the moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, exact_step, factored
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, kw_only=True)
class EMMET(Rule):
    """Gupta et al. 2024, A Unified Framework for Model Editing (arXiv 2403.14236): ROME for batches.

    `D = E^T (K C0^-1 K^T)^-1 K C0^-1`, the minimiser of `tr(D C0 D^T)` under `K (W + D)^T = V`. The released code adds
    `damping I` to the inner matrix against bad conditioning; with damping 1 that is MEMIT.

    Attributes:
        damping: 0 holds the edits exactly, as published; 0.1 in the release.
    """

    name: ClassVar[str] = "emmet"
    damping: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise InputError(f"damping={self.damping}: expected a finite number of at least 0")

    def start(self, original: Tensor, prior: Prior, name: str) -> Tensor:
        """The Cholesky factor of `C0`."""
        return factored(prior, original.shape[1], original.device, name)

    def change(self, batch: Batch, weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        return exact_step(torch.cholesky_solve(batch.keys.T, memory).T, batch, self.damping, self.name), memory
