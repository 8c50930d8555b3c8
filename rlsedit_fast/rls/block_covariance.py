"""Products of block-sparse keys with the prior covariance `C0 = blockdiag(S0_e^-1)` of a layer of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsedit_fast.rls.block_prior import BlockPrior
from rlsedit_fast.rls.blocks import Group


class Covariances:
    """The blocks of `C0`; each is computed in float64 when the first key reaches it.

    Args:
        prior: prior of the layer.
        device: device to compute on.
        dtype: dtype of the blocks.
        name: name of the layer, for error messages.
    """

    def __init__(self, prior: BlockPrior, device: torch.device, dtype: torch.dtype, name: str) -> None:
        self._prior, self._device, self._dtype, self._name = prior, device, dtype, name
        self._blocks: dict[int, Tensor] = {}

    def block(self, block: int) -> Tensor:
        """Returns `C0_e` of a block.

        Raises:
            PriorError: the precision is not positive definite, or its inverse overflows.
        """
        if block not in self._blocks:
            self._blocks[block] = self.fresh(block)
        return self._blocks[block]

    def fresh(self, block: int) -> Tensor:
        """Computes `C0_e` of a block and does not keep it; errors are those of `block`."""
        return self._prior.covariance(block, self._device, self._dtype, self._name)

    def project(self, keys: Tensor) -> tuple[Tensor, list[Group]]:
        """Returns the features of `K C0 [n, features]` and the groups of the rows of keys."""
        layout = self._prior.layout
        features, groups = layout.features(keys), layout.groups(keys)
        projected = torch.empty_like(features, memory_format=torch.contiguous_format)
        for group in groups:
            layout.put(projected, group, layout.part(features, group) @ self.block(group.block))
        return projected, groups

    def gram(self, left: Tensor, keys: Tensor, projected: Tensor) -> Tensor:
        """Returns `K_left C0 K^T [m, n]`, float64, from rows of keys and the projected features of the latter."""
        layout = self._prior.layout
        result = torch.zeros(len(left), len(keys), dtype=torch.float64, device=left.device)
        others = {group.block: group for group in layout.groups(left)}
        features = layout.features(left)
        for group in layout.groups(keys):
            if (other := others.get(group.block)) is not None:
                product = layout.part(features, other) @ layout.part(projected, group).T
                result.index_put_((other.rows[:, None], group.rows[None, :]), product.double(), accumulate=True)
        return result
