"""AlphaEdit: ridge regression within the directions that the anchors hardly use, keys of earlier edits remembered."""

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
    held: Tensor  # basis^T (Kp^T Kp) basis + ridge I, [r, r]


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(Rule):
    """Fang et al. 2025, AlphaEdit: Null-Space Constrained Knowledge Editing (arXiv 2410.02355), eq. 13-14.

    `D = E^T K P (Kp^T Kp P + K^T K P + ridge I)^-1`, with `P` the projection onto the eigenvectors of `E[k k^T]` whose
    eigenvalues are below `threshold`. Since `P` is a projection the solve is done within its range, which is the same.
    Within it the rule is recursive least squares under `ridge I`: sequential = all at once.

    Attributes:
        threshold: on the eigenvalues of the anchors' mean moment, 0.02 as released (0.01 in the paper); it goes with
            the scale of a model's keys.
        null_share: the share of directions to keep, those of the smallest eigenvalues, instead of a threshold: what
            carries over between models.
        ridge: `L2`, 10 as released (1 in the paper's equation); it too goes with the scale of the keys.
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
            raise InputError(f"null_share={self.null_share}: expected a share above 0 and up to 1, or None")

    def memory_numel(self, d_v: int, d_k: int) -> int:
        """The basis, and the keys within it; by a threshold the basis may be anything up to the whole."""
        width = d_k if self.null_share is None else max(1, round(self.null_share * d_k))
        return d_k * width + width * width

    def start(self, original: Tensor, prior: Prior, name: str) -> _Memory:
        """The null space; a Cholesky factor has no part in it, so the moment need not be of full rank."""
        if prior.mu == 0:
            raise PriorError(f"{name}: rule='alphaedit' needs anchors, whose null space it writes into; name them")
        moment = prior.precision(original.shape[1], original.device)
        moment.diagonal().sub_(prior.lam**2)
        values, vectors = torch.linalg.eigh(moment.div_(prior.mu**2))  # ascending
        if self.null_share is not None:
            count = max(1, round(self.null_share * len(values)))
        else:
            count = int((values < self.threshold).sum())
        if not count:
            raise PriorError(
                f"{name}: no eigenvalue of the anchors' moment is below threshold={self.threshold:g} (the least is "
                f"{float(values[0]):.3g}); raise it, or give null_share"
            )
        basis = vectors[:, :count].contiguous()
        return _Memory(basis, self.ridge * torch.eye(count, dtype=basis.dtype, device=basis.device))

    def change(self, batch: Batch, weight: Tensor, memory: _Memory) -> tuple[Tensor, _Memory]:
        """See `Rule`."""
        keys = batch.keys @ memory.basis
        weighted = keys * batch.weights[:, None]
        held = memory.held + weighted.T @ keys
        inner = torch.cholesky_solve(weighted.T @ batch.innovation, torch.linalg.cholesky(held))
        return (memory.basis @ inner).T, _Memory(memory.basis, held)
