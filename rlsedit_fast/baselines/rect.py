"""RECT: of MEMIT's change only the entries that are large beside the weight's own."""

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

    Of MEMIT's `D` those entries stay that are among the largest `share` by `|D_ij / W_ij|`, the relative change in
    weight; the others become 0. Left open: `W` is the weight before the batch; an entry of it that is 0 counts as an
    infinite relative change; entries that tie with the last one kept are kept.

    Attributes:
        share: of entries that stay, above 0 and up to 1; the paper's top-k %, of which it recommends 40.
    """

    name: ClassVar[str] = "rect"
    share: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share={self.share}: expected a share above 0 and up to 1")

    def start(self, original: Tensor, prior: Prior, name: str) -> Tensor:
        """MEMIT's factor."""
        return MEMIT().start(original, prior, name)

    def change(self, batch: Batch, weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        full, _ = MEMIT().change(batch, weight, memory)
        relative = torch.where(full == 0, 0.0, (full / weight).abs())
        kept = max(1, round(self.share * full.numel()))
        least = relative.flatten().kthvalue(full.numel() - kept + 1).values
        return torch.where(relative >= least, full, 0.0), memory
