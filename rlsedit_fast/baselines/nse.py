"""NSE: history-aware MEMIT on the neurons that a batch's keys excite most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, factored, ridge_step
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, kw_only=True)
class NSE(Rule):
    """Jiang et al. 2025, Neuron-Level Sequential Editing for Large Language Models (arXiv 2410.04045), as released.

    The neurons of a batch are the fewest whose activations `sum_i |K_ij|` make up the share `activation` of all. With
    the moment, the keys `Kp` of all batches before and those of this one cut down to them,
    `D = E^T K' (C0' + Kp'^T Kp' + K'^T K')^-1` in their columns, and 0 in the others.

    Left out, as it belongs to the values and not to the write: values are searched on the original weights, and edits
    that did not take are made again. Left to the editor: its going through the layers. (The released
    code stops a neuron short of the share, and so mostly takes one fewer.)

    Attributes:
        activation: share of the activation, above 0 and up to 1; 0.8 in the release, 1 there for some models.
    """

    name: ClassVar[str] = "nse"
    accumulates_keys: ClassVar[bool] = True
    activation: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.activation <= 1:
            raise InputError(f"activation={self.activation}: expected a share above 0 and up to 1")

    def start(self, original: Tensor, prior: Prior, name: str) -> Tensor:
        """`C0`, to which the keys are added; the part of a batch's neurons is positive definite if it is."""
        factored(prior, original.shape[1], original.device, name)
        return prior.precision(original.shape[1], original.device)

    def change(self, batch: Batch, weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
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
