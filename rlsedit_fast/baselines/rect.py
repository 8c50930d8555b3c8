"""RECT: keeps the entries of the change of MEMIT with the largest relative size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule
from rlsedit_fast.baselines.memit import MEMIT
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, kw_only=True)
class RECT(Rule):
    """Gu et al. 2024, Model Editing Harms General Abilities: Regularization to the Rescue (arXiv 2401.04700).

    The fraction `share` of the entries of MEMIT's `D` with the largest relative change `|D_ij / W_ij|` is kept; the
    others are set to 0. The paper leaves open: `W` is the weight before the batch; a change of an entry that is 0
    counts as infinite; ties with the last kept entry are kept.

    Attributes:
        share: fraction of entries to keep, above 0 and at most 1; the paper's top-k %, of which it recommends 40.

    Example:
        >>> from rlsedit_fast.baselines import RECT
        >>> RECT()
        RECT(share=0.4)
    """

    name: ClassVar[str] = "rect"
    share: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share={self.share}: expected a number above 0 and at most 1")

    def init_memory(self, original: Tensor, prior: Prior, name: str) -> Tensor:
        """Returns the factor of MEMIT."""
        return MEMIT().init_memory(original, prior, name)

    def step(self, batch: Batch, weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule.step`."""
        full, _ = MEMIT().step(batch, weight, memory)
        relative = torch.where(full == 0, 0.0, (full / weight).abs())
        kept = max(1, round(self.share * full.numel()))
        least = relative.flatten().kthvalue(full.numel() - kept + 1).values
        return torch.where(relative >= least, full, 0.0), memory
