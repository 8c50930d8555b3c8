"""An approximation for mixtures of experts whose cost does not grow with the number of edits."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlsedit_fast.errors import RemovalError
from rlsedit_fast.ops.precision import full_float32
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.block_base import BlockBase
from rlsedit_fast.rls.block_panel import BlockPanel
from rlsedit_fast.rls.block_prior import BlockPrior
from rlsedit_fast.rls.block_weights import SavedBlocks
from rlsedit_fast.rls.monitor import Monitor
from rlsedit_fast.rls.prior import parts
from rlsedit_fast.rls.results import Bounds, Step, Terms

_versions = itertools.count(1)
_orders = itertools.count(1)

_ROWS_AT_ONCE = 512  # rows per step of a refresh


@dataclass(eq=False)
class SeparateSnapshot:
    """A point to which `SeparateState.restore` can return.

    Attributes:
        covariances: `C_e` of the blocks that had one; every step creates new ones.
        edits: number of rows.
        energy: energy of each changed block.
        version: version of the state.
        order: position among the snapshots.
        blocks: the blocks that were written since, as they were.
    """

    covariances: dict[int, Tensor]
    edits: int
    energy: dict[int, float]
    version: int
    order: int
    blocks: SavedBlocks = field(default_factory=dict)


class SeparateState(BlockBase):
    """Edits the stacked weight of a mixture of experts with one covariance per expert.

    The products of the keys of different experts are dropped from the precision of earlier edits:

        F_e = K_e C_e,   S = diag(1/w) + sum_e K_e F_e^T,   W_e <- W_e + (S^-1 E)^T F_e,
        C_e <- C_e - F_e^T (diag(1/w) + K_e F_e^T)^-1 F_e

    Within a batch the sum over the experts of a token is exact. Earlier batches are protected only approximately where
    their tokens reached several experts. A step takes `O(sum_e f^2 n_e)` operations, however many edits were applied.

    An edit cannot be removed by a step; `remove` always raises RemovalError, and `refresh` with the remaining edits is
    required. `objective` is the prior's part of the objective at the current weight, computed from the weight, so that
    the bounds on the weight and the anchors hold exactly.

    Arguments and errors are those of `BlockState`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import BlockLayout, BlockPrior, SeparateState
        >>> layout = BlockLayout(experts=3, width=1, active=2)
        >>> weight = torch.zeros(3, 1, 1)
        >>> state = SeparateState(list(weight), BlockPrior(layout=layout, lam=1.0))
        >>> step = state.update(torch.tensor([[1.0, 1.0, 0.0, 2.0]]), torch.tensor([[3.0]]))
        >>> weight.flatten().tolist(), step.residual.tolist(), step.objective
        ([1.0, 0.0, 1.0], [[1.0]], 2.0)
    """

    @torch.no_grad()
    def __init__(
        self, weights: Sequence[Tensor], prior: BlockPrior, *, dtype: torch.dtype | None = None, name: str = "layer"
    ) -> None:
        super().__init__(weights, prior, dtype=dtype, name=name)
        self._present: dict[int, Tensor] = {}
        self._edits = 0
        self._energy: dict[int, float] = {}
        self._snapshots: weakref.WeakSet[SeparateSnapshot] = weakref.WeakSet()
        self._version = next(_versions)

    @property
    def edits(self) -> int:
        """The number of edit rows applied."""
        return self._edits

    @property
    def objective(self) -> float:
        """The prior's part of the objective at the current weight; at least 0."""
        return math.fsum(self._energy.values())

    def bounds(self) -> Bounds:
        """Returns bounds on the weight and the anchors; there is none on the edits."""
        root, prior = math.sqrt(self.objective), self._prior
        return Bounds(root / prior.lam, root / prior.mu if prior.mu else math.inf, math.inf)

    @torch.no_grad()
    def terms(self) -> Terms:
        """Returns the terms of the prior at the current weight; that of the anchors is an upper bound."""
        return self._terms(self.objective, None)

    def monitor(self) -> Monitor:
        """Returns a residual of 0: there is no exact precision to compare with."""
        return Monitor(0.0, False, "the covariances of the experts are an approximation; refresh computes them again.")

    @torch.no_grad()
    @full_float32()
    def project(self, keys: Tensor, weights: Tensor | None = None) -> BlockPanel:
        """Projects a batch of keys with the current state; see `BlockState.project`."""
        keys, weights, _ = self._batch(keys, weights)
        features = self._layout.features(keys)
        projected = torch.empty_like(features, memory_format=torch.contiguous_format)
        for group in self._layout.groups(keys):
            part = self._layout.part(features, group) @ self._covariance(group.block)
            self._layout.put(projected, group, part)
        gram = self._covariances.gram(keys, keys, projected)
        coupling = gram.new_zeros(0, len(keys))
        return BlockPanel(keys, weights, 0.5 * (gram + gram.T), self._version, projected, coupling, self.cross)

    @torch.no_grad()
    @full_float32()
    def cross(self, keys: Tensor, panel: BlockPanel) -> Tensor:
        """Returns `K' C K^T [m, n]`, float64, for rows of keys `K'` and the keys `K` of a panel of this state."""
        keys, _, _ = self._batch(keys, None)
        return self._covariances.gram(keys, panel.keys, panel.projected)

    @torch.no_grad()
    def update(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Applies a batch of edits; see `BlockState.update`."""
        keys, weights, (values,) = self._batch(keys, weights, values=values)
        return self._apply(self.project(keys, weights), values - self.outputs(keys))

    @torch.no_grad()
    def update_projected(self, panel: BlockPanel, innovation: Tensor) -> Step:
        """Applies the edits of a panel; see `BlockState.update_projected`."""
        return self._apply(panel, self._checked_innovation(panel, innovation))

    def remove(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Not supported.

        Raises:
            RemovalError: always; use `refresh` with the remaining edits.
        """
        raise RemovalError(
            f"rows cannot be removed from {self._name}, whose experts have separate covariances. No state was "
            "modified. Call refresh(keys, values, weights) with the remaining edits."
        )

    def reweigh(self, keys: Tensor, values: Tensor, old_weights: Tensor, new_weights: Tensor) -> Step:
        """Not supported, see `remove`."""
        return self.remove(keys, values, old_weights)

    @torch.no_grad()
    def replace(self, keys: Tensor, old_values: Tensor, new_values: Tensor, weights: Tensor | None = None) -> Step:
        """Moves the outputs of applied edits: `W_e += (w (V_new - V_old))^T K_e C_e`; see `BlockState.replace`."""
        keys, weights, (old, new) = self._batch(keys, weights, old_values=old_values, new_values=new_values)
        before = new - self.outputs(keys)
        panel = self.project(keys, weights)
        change = self._write((new - old) * weights[:, None], panel, dict(self._present), self._edits)
        after = new - self.outputs(keys)
        return Step(after, before, self.objective, change)

    @torch.no_grad()
    def refresh(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> None:
        """Computes the state again from the prior and the given edits, in their order, which replace the applied ones.

        Arguments and errors are those of `BlockState.refresh`.
        """
        keys, weights, (values,) = self._batch(keys, weights, least=0, values=values)
        taken = self.snapshot()
        try:
            self._weights.reset([taken.blocks, *(one.blocks for one in self._snapshots)])
            self._present, self._edits, self._energy, self._version = {}, 0, {}, next(_versions)
            for rows in parts(len(keys), _ROWS_AT_ONCE):
                self.update(keys[rows], values[rows], weights[rows])
        except BaseException:
            self.restore(taken)
            raise

    @torch.no_grad()
    def snapshot(self) -> SeparateSnapshot:
        """Takes a snapshot for `restore`. Later steps copy each block once before they write it."""
        taken = SeparateSnapshot(dict(self._present), self._edits, dict(self._energy), self._version, next(_orders))
        self._snapshots.add(taken)
        return taken

    @torch.no_grad()
    def restore(self, snapshot: SeparateSnapshot) -> None:
        """Restores a snapshot bit for bit; see `BlockState.restore`."""
        self._check_snapshot(snapshot in self._snapshots)
        for later in [other for other in self._snapshots if other.order > snapshot.order]:
            self._snapshots.discard(later)
        self._present, self._edits = dict(snapshot.covariances), snapshot.edits
        self._energy, self._version = dict(snapshot.energy), snapshot.version
        self._weights.restore(snapshot.blocks)

    def _covariance(self, block: int) -> Tensor:
        """Returns `C_e` of a block."""
        if block not in self._present:
            self._present[block] = self._covariances.fresh(block)
        return self._present[block]

    @full_float32()
    def _apply(self, panel: BlockPanel, innovation: Tensor) -> Step:
        noise = panel.noise.double()
        lower, info = torch.linalg.cholesky_ex(torch.diag(noise) + panel.gram)
        if int(info) or not bool(lower.isfinite().all()):
            raise self._not_factored(len(panel.keys), int(info))
        shared = torch.cholesky_solve(innovation.double(), lower)
        features, present = self._layout.features(panel.keys), dict(self._present)
        for group in self._layout.groups(panel.keys):
            projected = self._layout.part(panel.projected, group)
            own = torch.diag(noise[group.rows]) + (self._layout.part(features, group) @ projected.T).double()
            factor, info = torch.linalg.cholesky_ex(0.5 * (own + own.T))
            if int(info):
                raise self._not_factored(len(panel.keys), int(info))
            rows = torch.linalg.solve_triangular(factor, projected.double(), upper=False).to(self._dtype)
            present[group.block] = present[group.block] - rows.T @ rows
        change = self._write(shared.to(self._dtype), panel, present, self._edits + len(panel.keys))
        residual = (noise[:, None] * shared).to(self._dtype)
        whitened = torch.linalg.solve_triangular(lower, innovation.double(), upper=False)
        return Step(residual, innovation, self.objective, change, whitened)

    @full_float32()
    def _write(self, shared: Tensor, panel: BlockPanel, present: dict[int, Tensor], edits: int) -> float:
        """Adds `X^T K C` to the weights and enters the new covariances; returns `||W_new - W_old||_F`."""
        undo: SavedBlocks = {}
        energies, energy = dict(self._energy), 0.0
        try:
            for group in self._layout.groups(panel.keys):
                delta = shared[group.rows].T @ self._layout.part(panel.projected, group)
                if not checks.all_finite(delta, present[group.block]):
                    raise self._overflow(len(panel.keys))
                lacking = [undo, *(one.blocks for one in self._snapshots if group.block not in one.blocks)]
                energy += self._weights.add(group.block, delta, lacking)
                energies[group.block] = self._prior_energy(group.block)
        except BaseException:
            self._weights.restore(undo)
            raise
        self._present, self._edits, self._energy, self._version = present, edits, energies, next(_versions)
        return math.sqrt(energy)

    def _prior_energy(self, block: int) -> float:
        """Returns `tr(D_e S0_e D_e^T)` of a written block."""
        pair = self.weights()[block]
        assert pair is not None
        delta = pair[1].double() - pair[0].double()
        found = float(self._prior.ridges()[block]) * float(delta.square().sum())
        if self._prior.moment is not None:
            moment = self._prior.moment.block(block).to(delta.device, torch.float64)
            found += self._prior.kappa * self._prior.mu**2 * max(float(((delta @ moment) * delta).sum()), 0.0)
        return found
