"""Results of states of mixtures of experts: projected batches, and snapshots of `BlockState`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlsedit_fast.rls.block_rows import AppliedRows
from rlsedit_fast.rls.block_weights import SavedBlocks


@dataclass(frozen=True, eq=False)
class BlockPanel:
    """A batch of keys projected with the current state (`BlockState.project`, `SeparateState.project`).

    Attributes:
        keys: rows of keys `[n, key_width]` in the dtype of the state.
        weights: `w [n]`.
        gram: `G = K C K^T [n, n]`, float64, symmetric.
        version: version of the state; any change of the state makes the panel stale.
        projected: features of `K C0 [n, features]`; of `K C` in a `SeparateState`.
        coupling: `L^-1 K_old C0 K^T [rows, n]`, float64, for the applied rows `K_old`; no rows in a `SeparateState`.
        cross_of: `cross` of the state.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import BlockLayout, BlockPrior, BlockState
        >>> layout = BlockLayout(experts=2, width=2, active=1)
        >>> state = BlockState(list(torch.zeros(2, 1, 2)), BlockPrior(layout=layout, lam=1.0))
        >>> state.project(torch.tensor([[3.0, 4.0, 0.0]])).gram
        tensor([[25.]], dtype=torch.float64)
    """

    keys: Tensor
    weights: Tensor
    gram: Tensor
    version: int
    projected: Tensor
    coupling: Tensor
    cross_of: Callable[[Tensor, BlockPanel], Tensor]

    @property
    def noise(self) -> Tensor:
        """`1/w [n]`."""
        return 1 / self.weights

    def cross(self, keys: Tensor) -> Tensor:
        """Returns `K' C K^T [m, n]`, float64, for rows of keys `K' [m, key_width]`."""
        return self.cross_of(keys, self)


@dataclass(eq=False)
class BlockSnapshot:
    """A point to which `BlockState.restore` can return; copies of blocks are taken before they are written.

    Attributes:
        rows: the applied rows.
        count: their number.
        blocks: the blocks that were written since, as they were.
        objective: `J`.
        version: version of the state.
        order: position among the snapshots.
    """

    rows: AppliedRows
    count: int
    blocks: SavedBlocks
    objective: float
    version: int
    order: int
