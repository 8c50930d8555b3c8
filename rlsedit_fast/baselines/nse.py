"""NSE: history-aware MEMIT on the most active neurons of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, factor_prior, ridge_step
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, kw_only=True)
class NSE(Rule):
    """Jiang et al. 2025, Neuron-Level Sequential Editing for Large Language Models (arXiv 2410.04045), as released.

    The selected neurons are the smallest set whose activations `sum_i |K_ij|` sum to the fraction `activation` of the
    total. With the moment, the keys `Kp` of all earlier batches and the keys of this batch restricted to them,
    `D = E^T K' (C0' + Kp'^T Kp' + K'^T K')^-1` in their columns and 0 in the others.

    The search of values on the original weights and the repetition of failed edits concern the values, not the update
    rule, and are not included. (The released code stops one neuron before the fraction is reached, so it usually
    selects one neuron fewer.)

    Attributes:
        activation: fraction of the activation, above 0 and at most 1; 0.8 in the released code, 1 for some models.

    Example:
        >>> from rlsedit_fast.baselines import NSE
        >>> NSE()
        NSE(activation=0.8)
    """

    name: ClassVar[str] = "nse"
    accumulates_keys: ClassVar[bool] = True
    activation: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.activation <= 1:
            raise InputError(f"activation={self.activation}: expected a number above 0 and at most 1")

    def init_memory(self, original: Tensor, prior: Prior, name: str) -> Tensor:
        """Returns `C0`, to which the keys are added."""
        factor_prior(prior, original.shape[1], original.device, name)
        return prior.precision(original.shape[1], original.device)

    def step(self, batch: Batch, weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule.step`."""
        activation, order = batch.keys.abs().sum(0).sort(descending=True)
        reached = activation.cumsum(0)
        count = int((reached < self.activation * reached[-1]).sum()) + 1
        chosen = order[:count].sort().values
        part = batch.keys[:, chosen]
        lower = torch.linalg.cholesky(memory[chosen][:, chosen])
        change = torch.zeros_like(weight)
        projected = torch.cholesky_solve(part.T, lower).T
        change[:, chosen] = ridge_step(projected, Batch(part, batch.innovation, batch.weights))
        return change, memory + (batch.keys * batch.weights[:, None]).T @ batch.keys
