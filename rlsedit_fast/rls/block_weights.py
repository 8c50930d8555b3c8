"""The weights of a layer of experts, block by block; blocks that were never written take no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlsedit_fast.rls import checks
from rlsedit_fast.rls.blocks import BlockLayout
from rlsedit_fast.rls.master import Master, master_of

SavedBlocks = dict[int, tuple[Tensor, ...]]
"""Copies of the tensors of the exact weights of some blocks."""


class BlockWeights:
    """Exact weights of blocks `[d_v, block width]`, kept up to date in the model.

    Args:
        views: the blocks in the model, any floating dtype; updated in place.
        dtype: dtype of the exact weights, float32 or float64.
    """

    def __init__(self, views: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._views, self._dtype = [view.detach() for view in views], dtype
        self._masters: dict[int, Master] = {}
        self._originals: dict[int, Tensor] = {}
        self.written: set[int] = set()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._views[0].device

    @property
    def rows(self) -> int:
        """`d_v`."""
        return self._views[0].shape[0]

    def originals(self) -> list[Tensor]:
        """Returns the original weight of each block; for a block that was never written a view of the model."""
        return [self._original(block) for block in range(len(self._views))]

    def pairs(self) -> list[tuple[Tensor, Tensor] | None]:
        """Returns the original and the exact weight of each block; None for a block that was never written."""
        return [
            (self._originals[block], self._masters[block].read()) if block in self._masters else None
            for block in range(len(self._views))
        ]

    def times(self, layout: BlockLayout, keys: Tensor, *, original: bool = False) -> Tensor:
        """Returns `K W^T [n, d_v]`, or `K W0^T`, for rows of keys in the dtype of the exact weights."""
        result = keys.new_zeros(len(keys), self.rows)
        features = layout.features(keys)
        for group in layout.groups(keys):
            part = layout.part(features, group)
            if original or group.block not in self._masters:
                product = part @ self._original(group.block).to(self._dtype).T
            else:
                product = self._masters[group.block].times(part)
            result.index_add_(0, group.rows, product)
        return result

    def write(self, block: int, delta: Tensor | None, lacking: Sequence[SavedBlocks]) -> float:
        """Sets a block to `W0 + delta`, or to `W0`.

        Args:
            block: the block.
            delta: `[d_v, block width]`, or None.
            lacking: receive a copy of the block as it is before.

        Returns:
            `||W_new - W_old||^2`.

        Raises:
            InputError: the original weight is not finite.
        """
        return self._set(
            block, lambda _old: None if delta is None else self._originals[block].to(self._dtype) + delta, lacking
        )

    def add(self, block: int, delta: Tensor, lacking: Sequence[SavedBlocks]) -> float:
        """Adds `delta [d_v, block width]` to a block; see `write`."""
        return self._set(block, lambda old: old + delta, lacking)

    def reset(self, saved: Sequence[SavedBlocks]) -> None:
        """Sets all blocks to `W0`; each of `saved` receives a copy of the blocks that it lacks."""
        for block in sorted(self.written):
            self._set(block, lambda _old: None, [one for one in saved if block not in one])

    def _set(self, block: int, make: Callable[[Tensor], Tensor | None], lacking: Sequence[SavedBlocks]) -> float:
        """Sets a block to what `make` returns for the present one, or to `W0` for None; see `write`."""
        if block not in self._masters:
            view = self._views[block]
            checks.finite(weight=view)
            self._originals[block] = view.clone(memory_format=torch.contiguous_format)
            self._masters[block] = master_of(view, self._dtype, in_place=True)
        master = self._masters[block]
        for saved in lacking:
            saved[block] = tuple(tensor.clone() for tensor in master.tensors)
        old = master.read()
        new = make(old)
        if new is None:
            new = self._originals[block].to(self._dtype)
            self.written.discard(block)
        else:
            self.written.add(block)
        energy = float((new - old).double().square().sum())
        master.write(new)
        return energy

    def restore(self, blocks: SavedBlocks) -> None:
        """Restores blocks bit for bit."""
        for block, kept in blocks.items():
            for tensor, old in zip(self._masters[block].tensors, kept, strict=True):
                tensor.copy_(old)
            self._masters[block].settle()
            if torch.equal(self._masters[block].read(), self._originals[block].to(self._dtype)):
                self.written.discard(block)
            else:
                self.written.add(block)

    def _original(self, block: int) -> Tensor:
        return self._originals.get(block, self._views[block])
