"""AlphaEdit: ridge regression in the null space of the anchors, with the keys of earlier edits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule
from rlsedit_fast.errors import InputError, PriorError
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, eq=False)
class _Memory:
    basis: Tensor  # [d_k, r], orthonormal: P = basis @ basis.T
    precision: Tensor  # basis^T (Kp^T Kp) basis + ridge I, [r, r]


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(Rule):
    """Fang et al. 2025, AlphaEdit: Null-Space Constrained Knowledge Editing (arXiv 2410.02355), eq. 13-14.

    `D = E^T K P (Kp^T Kp P + K^T K P + ridge I)^-1`, where `P` projects onto the eigenvectors of `E[k k^T]` with
    eigenvalues below `threshold`. The system is solved within the range of `P`, which is equivalent. Within this range
    the rule is recursive least squares with the prior `ridge I`, so sequential batches equal one batch.

    Attributes:
        threshold: threshold on the eigenvalues of the mean moment of the anchors, 0.02 as in the released code (0.01 in
            the paper). It depends on the scale of the model's keys.
        null_share: fraction of directions to keep (those with the smallest eigenvalues) instead of a threshold, which
            transfers between models.
        ridge: `L2`, 10 as in the released code (1 in the equation of the paper). It depends on the scale of the keys.

    Example:
        >>> from rlsedit_fast.baselines import AlphaEdit
        >>> AlphaEdit(null_share=0.5).memory_numel(d_v=2, d_k=4)
        12
    """

    name: ClassVar[str] = "alphaedit"
    accumulates_keys: ClassVar[bool] = True
    threshold: float = 0.02
    null_share: float | None = None
    ridge: float = 10.0

    def __post_init__(self) -> None:
        for name in ("threshold", "ridge"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)}: expected a finite number above 0")
        if self.null_share is not None and not 0 < self.null_share <= 1:
            raise InputError(f"null_share={self.null_share}: expected a number above 0 and at most 1, or None")

    def memory_numel(self, d_v: int, d_k: int) -> int:
        """Counts the basis and the precision; with a threshold the basis can have up to d_k columns."""
        width = d_k if self.null_share is None else max(1, round(self.null_share * d_k))
        return d_k * width + width * width

    def init_memory(self, original: Tensor, prior: Prior, name: str) -> _Memory:
        """Computes the null space; the moment need not have full rank."""
        if prior.mu == 0:
            raise PriorError(f"{name}: rule='alphaedit' requires anchors, because it writes into their null space.")
        moment = prior.precision(original.shape[1], original.device)
        moment.diagonal().sub_(prior.lam**2)
        values, vectors = torch.linalg.eigh(moment.div_(prior.mu**2))  # ascending
        if self.null_share is not None:
            count = max(1, round(self.null_share * len(values)))
        else:
            count = int((values < self.threshold).sum())
        if not count:
            raise PriorError(
                f"{name}: no eigenvalue of the anchor moment is below threshold={self.threshold:g} (the smallest is "
                f"{float(values[0]):.3g}). Increase the threshold, or set null_share."
            )
        basis = vectors[:, :count].contiguous()
        return _Memory(basis, self.ridge * torch.eye(count, dtype=basis.dtype, device=basis.device))

    def step(self, batch: Batch, weight: Tensor, memory: _Memory) -> tuple[Tensor, _Memory]:
        """See `Rule.step`."""
        keys = batch.keys @ memory.basis
        weighted = keys * batch.weights[:, None]
        precision = memory.precision + weighted.T @ keys
        inner = torch.cholesky_solve(weighted.T @ batch.innovation, torch.linalg.cholesky(precision))
        return (memory.basis @ inner).T, _Memory(memory.basis, precision)
