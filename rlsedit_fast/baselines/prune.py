"""PRUNE: the accumulated change of MEMIT with its large singular values reduced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule
from rlsedit_fast.baselines.memit import MEMIT
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, eq=False)
class _Memory:
    base: Tensor
    original: Tensor
    limit: float  # largest singular value of W0
    total: Tensor  # sum of the changes of MEMIT, unrestrained


@dataclass(frozen=True, kw_only=True)
class PRUNE(Rule):
    """Ma et al. 2025, Perturbation-Restrained Sequential Model Editing (arXiv 2405.16821), over MEMIT.

    With `A = sum of all changes = sum_i s_i u_i v_i^T` the weight is `W0 + sum_i f(s_i) u_i v_i^T`, where
    `f(s) = log_a(s) - log_a(s_max) + s_max` for s above `s_max`, the largest singular value of `W0`, and `f(s) = s`
    otherwise.

    The paper restrains the change once, after the last edit. Here the weight is restrained after every batch, so that
    it can be evaluated at any time; MEMIT continues from the unrestrained sum, towards the same outputs. (A common
    implementation adds the restrained sum to weights that already include the unrestrained sum; the paper does not.)

    Attributes:
        base: base `a` of the logarithm, above 1; e, 2, 1.5 or 1.2 in the released code, by model and method.

    Example:
        >>> from rlsedit_fast.baselines import PRUNE
        >>> PRUNE(base=2.0)
        PRUNE(base=2.0)
    """

    name: ClassVar[str] = "prune"
    base: float = 1.2

    def __post_init__(self) -> None:
        if not 1 < self.base < float("inf"):
            raise InputError(f"base={self.base}: expected a finite number above 1")

    def memory_numel(self, d_v: int, d_k: int) -> int:
        """Counts the factor of MEMIT, the original weight and the unrestrained sum."""
        return d_k * d_k + 2 * d_v * d_k

    def init_memory(self, original: Tensor, prior: Prior, name: str) -> _Memory:
        """Returns the factor of MEMIT and the largest singular value of the original weight."""
        limit = float(torch.linalg.matrix_norm(original, 2))
        return _Memory(MEMIT().init_memory(original, prior, name), original, limit, torch.zeros_like(original))

    def step(self, batch: Batch, weight: Tensor, memory: _Memory) -> tuple[Tensor, _Memory]:
        """See `Rule.step`."""
        wanted = batch.keys @ weight.T + batch.innovation
        innovation = wanted - batch.keys @ (memory.original + memory.total).T
        step, _ = MEMIT().step(Batch(batch.keys, innovation, batch.weights), weight, memory.base)
        total = memory.total + step
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        above = values > memory.limit
        reduced = torch.log(values / memory.limit) / math.log(self.base) + memory.limit
        restrained = left * torch.where(above, reduced, values) @ right
        return memory.original + restrained - weight, _Memory(memory.base, memory.original, memory.limit, total)
