"""UltraEdit: outputs pushed along normalised gradients, as hard as the normalised keys say, by ridge regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule, refuse_weights
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, eq=False)
class _Memory:
    """Of all rows `[k, g]` so far: how many, their mean, and the sum of their squared deviations from it."""

    count: int
    mean: Tensor
    squares: Tensor


@dataclass(frozen=True, kw_only=True)
class UltraEdit(Rule):
    """Gu et al. 2025, UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing (arXiv 2505.14679), as released.

    Keys `k` and gradients `g` of the layer's output are normalised, coordinate by coordinate, by the mean and the
    standard deviation of all rows so far, this batch's included (the "lifelong normalisation"). With the normalised
    `k~`, `g~` the outputs are to change by `v_i = -rate ||k~_i||^2 g~_i`, and `D = V^T K (K^T K + ridge I)^-1`.

    Left open, and taken for a comparison on shared values: the gradient is that of `||K W^T - V||^2 / 2`, which is
    `-E`. Its length is lost in the normalisation, so `rate` must be found for each model; the release's 1e-6 goes with
    gradients of the NLL over every token of a prompt. Rows are normalised layer by layer, where the release joins the
    layers of one shape.

    Attributes:
        rate: above 0.
        ridge: 1 as released.
    """

    name: ClassVar[str] = "ultraedit"
    rate: float = 1e-6
    ridge: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rate", "ridge"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)}: expected a finite number above 0")

    def memory_numel(self, d_v: int, d_k: int) -> int:
        """A mean and a sum of squares."""
        return 2 * (d_v + d_k)

    def start(self, original: Tensor, prior: Prior, name: str) -> _Memory:
        """No rows yet; the prior plays no part."""
        nothing = original.new_zeros(sum(original.shape))
        return _Memory(0, nothing, nothing)

    def change(self, batch: Batch, weight: Tensor, memory: _Memory) -> tuple[Tensor, _Memory]:
        """See `Rule`."""
        refuse_weights(batch, self.name)
        rows = torch.cat((batch.keys, -batch.innovation), 1)
        memory = _seen(memory, rows)
        deviation = (memory.squares / max(memory.count - 1, 1)).sqrt()
        flat = deviation <= torch.finfo(rows.dtype).eps * memory.mean.abs()  # never varied: nothing to normalise by
        normal = torch.where(flat, 0.0, (rows - memory.mean) / torch.where(flat, 1.0, deviation))
        keys, gradients = normal.split(list(reversed(weight.shape)), dim=1)
        wanted = -self.rate * keys.square().sum(1, keepdim=True) * gradients
        gram = batch.keys @ batch.keys.T
        gram.diagonal().add_(self.ridge)
        return torch.linalg.solve(gram, wanted).T @ batch.keys, memory


def _seen(memory: _Memory, rows: Tensor) -> _Memory:
    """With some more rows; means and squares of two groups joined (Chan et al. 1979)."""
    count = memory.count + len(rows)
    mean = rows.mean(0)
    apart = mean - memory.mean
    squares = memory.squares + (rows - mean).square().sum(0) + apart.square() * (memory.count * len(rows) / count)
    return _Memory(count, memory.mean + apart * (len(rows) / count), squares)
