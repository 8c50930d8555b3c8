"""Fine-tuning: gradient descent on the batch alone, free or within a box around the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, refuse_weights
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior

_SETTLED = 1e-12  # relative change of the weight's change in a step, below which the descent has arrived


@dataclass(frozen=True, kw_only=True)
class FineTuning(Rule):
    """Gradient descent on `||K (W + D)^T - V||^2 / 2` from `D = 0`, accelerated (Nesterov 1983, restarted).

    The baseline of ROME (Meng et al. 2022, arXiv 2202.05262, sec. 3.2), of one layer's weight, on the values that all
    rules share in place of the NLL, which that baseline descends with Adam. It knows nothing of what is to stay. Run to
    its end it is the shortest change that leaves nothing over, `D = E^T (K K^T)^-1 K`; fewer steps stop short of it.

    Attributes:
        steps: most steps of a batch.
    """

    name: ClassVar[str] = "ft"
    steps: int = 1000

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: expected at least 1")

    def memory_numel(self, d_v: int, d_k: int) -> int:
        """Nothing."""
        return 0

    def start(self, original: Tensor, prior: Prior, name: str) -> None:
        """Nothing; the prior plays no part."""

    def change(self, batch: Batch, weight: Tensor, memory: None) -> tuple[Tensor, None]:
        """See `Rule`."""
        refuse_weights(batch, self.name)
        return _descend(batch, self.steps, None), None


@dataclass(frozen=True, kw_only=True)
class BoundedFineTuning(Rule):
    """The same under `|D_ij| <= bound`: FT-L (Zhu et al. 2020, Modifying Memories in Transformer Models, arXiv
    2012.00363, the norm being the largest entry's, as ROME has it), each step projected onto the box.

    The box is that of a batch, around the weight that the batch before it left, as in ROME's released baseline.

    Attributes:
        bound: above 0; 5e-4 and 5e-5 in ROME's baselines. It goes with the scale of keys and weights.
        steps: most steps of a batch.
    """

    name: ClassVar[str] = "ft-bounded"
    bound: float = 5e-4
    steps: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.bound < float("inf"):
            raise InputError(f"bound={self.bound}: expected a finite number above 0")
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: expected at least 1")

    def memory_numel(self, d_v: int, d_k: int) -> int:
        """Nothing."""
        return 0

    def start(self, original: Tensor, prior: Prior, name: str) -> None:
        """Nothing; the prior plays no part."""

    def change(self, batch: Batch, weight: Tensor, memory: None) -> tuple[Tensor, None]:
        """See `Rule`."""
        refuse_weights(batch, self.name)
        return _descend(batch, self.steps, self.bound), None


def _descend(batch: Batch, steps: int, bound: float | None) -> Tensor:
    keys, innovation = batch.keys, batch.innovation
    rate = 1 / torch.linalg.matrix_norm(keys, 2).square().clamp_min(torch.finfo(keys.dtype).tiny)
    now = ahead = innovation.new_zeros(innovation.shape[1], keys.shape[1])
    momentum = 1.0
    for _ in range(steps):
        slope = (keys @ ahead.T - innovation).T @ keys
        new = ahead - rate * slope
        if bound is not None:
            new = new.clamp(-bound, bound)
        moved = new - now
        if float(moved.norm()) <= _SETTLED * float(new.norm()):
            return new
        if float((slope * moved).sum()) > 0:  # uphill: the momentum has overshot
            momentum = 1.0
        following = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
        ahead = new + (momentum - 1) / following * moved
        now, momentum = new, following
    return now
