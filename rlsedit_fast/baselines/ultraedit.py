"""UltraEdit: ridge regression towards steps along normalized gradients, scaled by normalized keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, reject_weights
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, eq=False)
class _Memory:
    """Count, mean and sum of squared deviations of all rows `[k, g]` so far."""

    count: int
    mean: Tensor
    squares: Tensor


@dataclass(frozen=True, kw_only=True)
class UltraEdit(Rule):
    """Gu et al. 2025, UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing (arXiv 2505.14679), as released.

    Keys `k` and gradients `g` of the layer's output are normalized per coordinate by the mean and the standard
    deviation of all rows so far, including this batch ("lifelong normalization"). With the normalized `k~` and `g~` the
    requested change of the outputs is `v_i = -rate ||k~_i||^2 g~_i`, and `D = V^T K (K^T K + ridge I)^-1`.

    For a comparison on shared values, the gradient is that of `||K W^T - V||^2 / 2`, which is `-E`. The normalization
    removes its length, so `rate` must be tuned per model; 1e-6 of the released code belongs to gradients of the NLL
    over every token of a prompt. Rows are normalized per layer; the released code joins layers of equal shape.

    Attributes:
        rate: step size, above 0.
        ridge: ridge, above 0; 1 in the released code.

    Example:
        >>> from rlsedit_fast.baselines import UltraEdit
        >>> UltraEdit(rate=0.1)
        UltraEdit(rate=0.1, ridge=1.0)
    """

    name: ClassVar[str] = "ultraedit"
    rate: float = 1e-6
    ridge: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rate", "ridge"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)}: expected a finite number above 0")

    def memory_numel(self, d_v: int, d_k: int) -> int:
        """Counts a mean and a sum of squares."""
        return 2 * (d_v + d_k)

    def init_memory(self, original: Tensor, prior: Prior, name: str) -> _Memory:
        """Returns empty statistics; the rule ignores the prior."""
        zeros = original.new_zeros(sum(original.shape))
        return _Memory(0, zeros, zeros)

    def step(self, batch: Batch, weight: Tensor, memory: _Memory) -> tuple[Tensor, _Memory]:
        """See `Rule.step`."""
        reject_weights(batch, self.name)
        rows = torch.cat((batch.keys, -batch.innovation), 1)
        memory = _add_rows(memory, rows)
        deviation = (memory.squares / max(memory.count - 1, 1)).sqrt()
        flat = deviation <= torch.finfo(rows.dtype).eps * memory.mean.abs()  # constant so far
        normal = torch.where(flat, 0.0, (rows - memory.mean) / torch.where(flat, 1.0, deviation))
        keys, gradients = normal.split(list(reversed(weight.shape)), dim=1)
        wanted = -self.rate * keys.square().sum(1, keepdim=True) * gradients
        gram = batch.keys @ batch.keys.T
        gram.diagonal().add_(self.ridge)
        return torch.linalg.solve(gram, wanted).T @ batch.keys, memory


def _add_rows(memory: _Memory, rows: Tensor) -> _Memory:
    """Adds rows to the statistics; merges means and sums of squares (Chan et al. 1979)."""
    count = memory.count + len(rows)
    mean = rows.mean(0)
    shift = mean - memory.mean
    squares = memory.squares + (rows - mean).square().sum(0) + shift.square() * (memory.count * len(rows) / count)
    return _Memory(count, memory.mean + shift * (len(rows) / count), squares)
