"""A mixture of experts that is edited by a baseline rule, expert by expert."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rlsedit_fast.baselines.base import Batch, Rule
from rlsedit_fast.baselines.layer import RulePanel, WithoutHistory
from rlsedit_fast.errors import InputError, UpdateError
from rlsedit_fast.rls import BlockPrior, Prior, Step, Terms, checks
from rlsedit_fast.rls.block_base import BlockBase
from rlsedit_fast.rls.block_weights import SavedBlocks
from rlsedit_fast.rls.blocks import Group

_versions = itertools.count(1)
_orders = itertools.count(1)

Carriers = Literal["split", "shared", "top"]
"""Experts of a token that carry its change.

`split`: all of them and the shared one, each with an equal part. `shared`: the shared expert. `top`: the routed expert
with the largest key.
"""


@dataclass(eq=False)
class ExpertRuleSnapshot:
    """A point to which `ExpertRuleLayer.restore` can return.

    Attributes:
        memory: memory of the rule per block.
        edits: number of rows.
        version: version of the layer.
        order: position among the snapshots.
        blocks: the blocks that were written since, as they were.
    """

    memory: dict[int, Any]
    edits: int
    version: int
    order: int
    blocks: SavedBlocks = field(default_factory=dict)


class ExpertRuleLayer(WithoutHistory, BlockBase):
    """Edits the experts of a mixture separately with a baseline rule, each as if it was an ordinary layer.

    The rule of an expert sees the keys of its tokens, which contain the weights of the router, and its part of the
    innovation. Its prior is that of the block in `BlockPrior`, so that rules and RLS have the same one.

    Args:
        weights: the blocks, as for `BlockState`; updated in place.
        prior: prior of the layer.
        rule: the rule.
        carriers: experts that carry the change of a token.
        name: name of the layer, for error messages.

    Raises:
        InputError: the blocks do not match the prior, or there is no shared expert for `carriers="shared"`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.baselines import MEMIT, ExpertRuleLayer
        >>> from rlsedit_fast.rls import BlockLayout, BlockPrior
        >>> layout = BlockLayout(experts=3, width=1, active=2)
        >>> weight = torch.zeros(3, 1, 1)
        >>> layer = ExpertRuleLayer(list(weight), BlockPrior(layout=layout, lam=1.0), MEMIT(), "split")
        >>> step = layer.update_projected(layer.project(torch.tensor([[1.0, 1.0, 0.0, 2.0]])), torch.tensor([[4.0]]))
        >>> weight.flatten().tolist(), step.residual.tolist()
        ([1.0, 0.0, 1.0], [[2.0]])
    """

    @torch.no_grad()
    def __init__(
        self, weights: Sequence[Tensor], prior: BlockPrior, rule: Rule, carriers: Carriers, *, name: str = "layer"
    ) -> None:
        super().__init__(weights, prior, dtype=None, name=name)
        if carriers == "shared" and not prior.layout.shared:
            raise InputError(f"experts='shared': {name} has no shared expert; use 'split' or 'top'")
        self._rule, self._carriers = rule, carriers
        self._memory: dict[int, Any] = {}
        self._edits = 0
        self._snapshots: weakref.WeakSet[ExpertRuleSnapshot] = weakref.WeakSet()
        self._version = next(_versions)

    @property
    def edits(self) -> int:
        """The number of edit rows applied."""
        return self._edits

    def terms(self) -> Terms:
        """Returns the change of the weight; the others are not known."""
        return Terms(weight=self.deviation(), anchors=None, edits=None)

    @torch.no_grad()
    def project(self, keys: Tensor, weights: Tensor | None = None) -> RulePanel:
        """Checks a batch of keys; see `RuleLayer.project`."""
        keys, weights, _ = self._batch(keys, weights)
        return RulePanel(keys, weights, self._version)

    @torch.no_grad()
    def update_projected(self, panel: RulePanel, innovation: Tensor) -> Step:
        """Applies a batch with the rule; see `RuleLayer.update_projected`."""
        innovation = self._checked_innovation(panel, innovation)
        features, wide = self._layout.features(panel.keys), innovation.double()
        memory, changes = dict(self._memory), dict[int, Tensor]()
        before, pairs, originals = self.outputs(panel.keys), self.weights(), self.originals()
        for group, part in self._parts(panel.keys):
            keys = self._layout.part(features, group).double()
            if group.block not in memory:
                memory[group.block] = self._fresh(group.block)
            batch = Batch(keys[part], wide[group.rows][part] / self._carrying, panel.weights[group.rows][part].double())
            pair = pairs[group.block]
            weight = (originals[group.block] if pair is None else pair[1]).double()
            change, memory[group.block] = self._rule.step(batch, weight, memory[group.block])
            changes[group.block] = change.to(self._dtype)
            if not checks.all_finite(changes[group.block], (weight + change).to(self._dtype)):
                raise UpdateError(
                    f"rule {self._rule.name!r} on block {group.block} of {self._name}: the weight overflows "
                    f"{self._dtype}. No weight was modified. Increase lam or mu, or change the options of the rule."
                )
        energy = self._write(changes)
        self._memory, self._edits, self._version = memory, self._edits + len(panel.keys), next(_versions)
        residual = innovation - (self.outputs(panel.keys) - before)
        return Step(residual, innovation, math.nan, math.sqrt(energy))

    def update(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Applies a batch of edits with values; see `RuleLayer.update`."""
        panel = self.project(keys, weights)
        return self.update_projected(panel, values - self.outputs(panel.keys))

    def snapshot(self) -> ExpertRuleSnapshot:
        """Takes a snapshot for `restore`. Later steps copy each block once before they write it."""
        taken = ExpertRuleSnapshot(dict(self._memory), self._edits, self._version, next(_orders))
        self._snapshots.add(taken)
        return taken

    @torch.no_grad()
    def restore(self, snapshot: ExpertRuleSnapshot) -> None:
        """Restores a snapshot bit for bit."""
        self._check_snapshot(snapshot in self._snapshots)
        for later in [other for other in self._snapshots if other.order > snapshot.order]:
            self._snapshots.discard(later)
        self._memory, self._edits, self._version = dict(snapshot.memory), snapshot.edits, snapshot.version
        self._weights.restore(snapshot.blocks)

    @property
    def _carrying(self) -> int:
        """The number of experts that carry the change of a token."""
        return self._layout.overlap if self._carriers == "split" else 1

    def _parts(self, keys: Tensor) -> list[tuple[Group, Tensor]]:
        """Returns the groups of blocks that carry changes, and which of their rows do, bool."""
        groups = self._layout.groups(keys)
        everything = [torch.ones(len(group.rows), dtype=torch.bool, device=keys.device) for group in groups]
        if self._carriers == "shared":
            return [(groups[-1], everything[-1])]
        if self._carriers == "split":
            return list(zip(groups, everything, strict=True))
        routed = self._layout.features(keys)[:, : self._layout.routed]
        top = routed.unflatten(1, (self._layout.active, self._layout.width)).norm(dim=2).argmax(1)
        found = [(group, top[group.rows] == group.slots) for group in groups if group.slots is not None]
        return [(group, part) for group, part in found if bool(part.any())]

    def _fresh(self, block: int) -> Any:
        """Returns the memory of a block before its first batch."""
        prior, moment = self._prior, self._prior.moment
        own = Prior(
            lam=math.sqrt(float(prior.ridges()[block])),
            mu=prior.mu * math.sqrt(prior.kappa),
            anchor_moment=None if moment is None else moment.block(block),
        )
        return self._rule.init_memory(self.originals()[block].double(), own, f"block {block} of {self._name}")

    def _write(self, changes: dict[int, Tensor]) -> float:
        """Adds changes to the blocks; returns `||W_new - W_old||^2`."""
        undo: SavedBlocks = {}
        energy = 0.0
        try:
            for block, change in changes.items():
                lacking = [undo, *(one.blocks for one in self._snapshots if block not in one.blocks)]
                energy += self._weights.add(block, change, lacking)
        except BaseException:
            self._weights.restore(undo)
            raise
        return energy
