"""PRUNE: what MEMIT has added up to, with its large singular values pressed down to those of the original weight."""

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
    free: Tensor  # the sum of MEMIT's changes, unrestrained


@dataclass(frozen=True, kw_only=True)
class PRUNE(Rule):
    """Ma et al. 2025, Perturbation-Restrained Sequential Model Editing (arXiv 2405.16821), over MEMIT.

    With `A = sum of all changes = sum_i s_i u_i v_i^T` the weight is `W0 + sum_i f(s_i) u_i v_i^T`, where
    `f(s) = log_a(s) - log_a(s_max) + s_max` above `s_max`, the largest singular value of `W0`, and `f(s) = s` below.

    Left open: the paper restrains once, behind the last edit. Here the weight is restrained behind every batch, so that
    it can be looked at at any time, while MEMIT goes on from the unrestrained sum, towards the same outputs. (Code that
    is in use adds the restrained sum to the weights that hold the unrestrained one already; the paper does not.)

    Attributes:
        base: `a`, of the logarithm, above 1; the release has e, 2, 1.5 and 1.2, by model and method.
    """

    name: ClassVar[str] = "prune"
    base: float = 1.2

    def __post_init__(self) -> None:
        if not 1 < self.base < float("inf"):
            raise InputError(f"base={self.base}: expected a finite number above 1")

    def memory_numel(self, d_v: int, d_k: int) -> int:
        """MEMIT's factor, the original weight and the unrestrained sum."""
        return d_k * d_k + 2 * d_v * d_k

    def start(self, original: Tensor, prior: Prior, name: str) -> _Memory:
        """MEMIT's factor, and the largest singular value of the original weight."""
        limit = float(torch.linalg.matrix_norm(original, 2))
        return _Memory(MEMIT().start(original, prior, name), original, limit, torch.zeros_like(original))

    def change(self, batch: Batch, weight: Tensor, memory: _Memory) -> tuple[Tensor, _Memory]:
        """See `Rule`."""
        wanted = batch.keys @ weight.T + batch.innovation
        from_free = wanted - batch.keys @ (memory.original + memory.free).T
        step, _ = MEMIT().change(Batch(batch.keys, from_free, batch.weights), weight, memory.base)
        free = memory.free + step
        left, values, right = torch.linalg.svd(free, full_matrices=False)
        above = values > memory.limit
        pressed = torch.log(values / memory.limit) / math.log(self.base) + memory.limit
        restrained = left * torch.where(above, pressed, values) @ right
        return memory.original + restrained - weight, _Memory(memory.base, memory.original, memory.limit, free)
