"""Fine-tuning: gradient descent on the batch, unconstrained or within a box around the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, reject_weights
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior

_CONVERGED = 1e-12  # relative step length at which the descent stops


@dataclass(frozen=True, kw_only=True)
class FineTuning(Rule):
    """Gradient descent on `||K (W + D)^T - V||^2 / 2` from `D = 0`, accelerated (Nesterov 1983, restarted).

    The baseline of ROME (Meng et al. 2022, arXiv 2202.05262, sec. 3.2) on the weight of one layer. It fits the values
    that all rules share, where the original baseline minimizes the NLL with Adam. It ignores the prior. At convergence
    it is the smallest change that fits the batch, `D = E^T (K K^T)^-1 K`.

    Attributes:
        steps: maximum number of steps per batch.

    Example:
        >>> from rlsedit_fast.baselines import FineTuning
        >>> FineTuning(steps=25)
        FineTuning(steps=25)
    """

    name: ClassVar[str] = "ft"
    steps: int = 1000

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: expected at least 1")

    def memory_numel(self, d_v: int, d_k: int) -> int:
        """Returns 0: the rule has no memory."""
        return 0

    def init_memory(self, original: Tensor, prior: Prior, name: str) -> None:
        """Does nothing: the rule has no memory and ignores the prior."""

    def step(self, batch: Batch, weight: Tensor, memory: None) -> tuple[Tensor, None]:
        """See `Rule.step`."""
        reject_weights(batch, self.name)
        return _descend(batch, self.steps, None), None


@dataclass(frozen=True, kw_only=True)
class BoundedFineTuning(Rule):
    """Fine-tuning with `|D_ij| <= bound`: FT-L (Zhu et al. 2020, Modifying Memories in Transformer Models, arXiv
    2012.00363) with the maximum norm, as in ROME. Each step is projected onto the box.

    The box of a batch is centered at the weight before the batch, as in the released baseline of ROME.

    Attributes:
        bound: bound on the entries, above 0; 5e-4 and 5e-5 in the baselines of ROME. It depends on the scale of keys
            and weights.
        steps: maximum number of steps per batch.

    Example:
        >>> from rlsedit_fast.baselines import BoundedFineTuning
        >>> BoundedFineTuning(bound=5e-5)
        BoundedFineTuning(bound=5e-05, steps=1000)
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
        """Returns 0: the rule has no memory."""
        return 0

    def init_memory(self, original: Tensor, prior: Prior, name: str) -> None:
        """Does nothing: the rule has no memory and ignores the prior."""

    def step(self, batch: Batch, weight: Tensor, memory: None) -> tuple[Tensor, None]:
        """See `Rule.step`."""
        reject_weights(batch, self.name)
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
        if float(moved.norm()) <= _CONVERGED * float(new.norm()):
            return new
        if float((slope * moved).sum()) > 0:  # uphill: restart the momentum
            momentum = 1.0
        following = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
        ahead = new + (momentum - 1) / following * moved
        now, momentum = new, following
    return now
