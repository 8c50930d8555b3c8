"""Recursive least squares on the stacked weight of a layer of experts, in the dual form."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.ops.precision import full_float32
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.block_base import BlockBase
from rlsedit_fast.rls.block_panel import BlockPanel, BlockSnapshot
from rlsedit_fast.rls.block_prior import BlockPrior
from rlsedit_fast.rls.block_rows import AppliedRows
from rlsedit_fast.rls.block_weights import SavedBlocks
from rlsedit_fast.rls.monitor import Monitor, probe
from rlsedit_fast.rls.results import Bounds, Step, Terms

_versions = itertools.count(1)
_orders = itertools.count(1)

_DRIFTED = 1e-6
"""Relative error of the factor above which a refresh is recommended: it is built from products in float32."""


class BlockState(BlockBase):
    """Minimizes `sum_i w_i ||K_i W^T - V_i||^2 + prior` over the stacked weight of a layer of experts.

    The minimizer and `C` are those of `RLSState` on the stacked weight, but `C` of size `(E f)^2` is never formed. With
    `C0 = blockdiag(S0_e^-1)`, `S = diag(1/w) + K C0 K^T = L L^T` over all applied rows, and `E0 = V - K W0^T`:

        C = C0 - C0 K^T S^-1 K C0,   W = W0 + (S^-1 E0)^T K C0,   J = ||L^-1 E0||^2

    An update appends rows to `L`, a removal takes them out and factors the rows after them again. `L` is float64, and W
    is written from W0 after every step, so nothing drifts, and the state without its last batch has the same bits as
    before that batch. The experts of one token share one S, so that the sum over the experts is exact.

    Memory is `8 N^2` bytes for `L` of N applied rows, and their keys, projected keys and innovations; a batch of n rows
    takes `O(N^2 (n + d_v))` operations. Blocks that no key reaches are not read, copied or written.

    A method that raises leaves the state unmodified.

    Args:
        weights: the blocks of `W0`, each `[d_v, block width]`, updated in place.
        prior: prior of the layer.
        dtype: dtype of keys, values and exact weights, float32 or float64; default: float64 for float64 weights, else
            float32.
        name: name of the layer, for error messages.

    Raises:
        InputError: the blocks do not have the layout of the prior.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import BlockLayout, BlockPrior, BlockState
        >>> layout = BlockLayout(experts=3, width=1, active=2)
        >>> weight = torch.zeros(3, 1, 1)
        >>> state = BlockState(list(weight), BlockPrior(layout=layout, lam=1.0))
        >>> keys = torch.tensor([[1.0, 1.0, 0.0, 2.0]])  # features, then the experts 0 and 2
        >>> step = state.update(keys, torch.tensor([[3.0]]))
        >>> weight.flatten().tolist(), step.residual.tolist(), round(step.objective, 6)
        ([1.0, 0.0, 1.0], [[1.0]], 3.0)
        >>> _ = state.remove(keys, torch.tensor([[3.0]]))
        >>> weight.flatten().tolist()
        [0.0, 0.0, 0.0]
    """

    @torch.no_grad()
    def __init__(
        self,
        weights: Sequence[Tensor],
        prior: BlockPrior,
        *,
        dtype: torch.dtype | None = None,
        name: str = "layer",
    ) -> None:
        super().__init__(weights, prior, dtype=dtype, name=name)
        self._rows = AppliedRows(self._layout, self.value_width, self._dtype, self.device)
        self._objective = 0.0
        self._snapshots: weakref.WeakSet[BlockSnapshot] = weakref.WeakSet()
        self._version = next(_versions)

    @property
    def edits(self) -> int:
        """The number of edit rows applied."""
        return len(self._rows)

    @property
    def objective(self) -> float:
        """The objective `J` at the current weight; at least 0."""
        return self._objective

    def bounds(self) -> Bounds:
        """Returns bounds on the weight, the anchors and the edits.

        The bounds on weight and anchors follow from the prior's part of `J`, `J` without the misfit of the edits.
        """
        root, prior = math.sqrt(max(self._objective - self._misfit(), 0.0)), self._prior
        return Bounds(root / prior.lam, root / prior.mu if prior.mu else math.inf, math.sqrt(self._objective))

    @torch.no_grad()
    def terms(self) -> Terms:
        """Returns the terms of `J` at the current weight; that of the anchors is an upper bound, see `BlockPrior`."""
        misfit = min(self._misfit(), self._objective)
        return self._terms(self._objective - misfit, math.sqrt(misfit))

    def _misfit(self) -> float:
        """Returns `sum_i w_i ||K_i W^T - V_i||^2`, from the residuals `X_i / w_i`."""
        rows = self._rows
        return float((rows.dual().square().sum(1) / rows.weights.double()).sum()) if len(rows) else 0.0

    @torch.no_grad()
    @full_float32()
    def monitor(self) -> Monitor:
        """Compares the factor with `S`, computed again from the applied keys, on a fixed random vector."""
        rows = self._rows
        if not len(rows):
            return Monitor(0.0, False, "no rows are applied.")
        x = probe(len(rows), self.device)
        pulled = self._pulled(rows.keys, rows.projected, x[:, None].to(self._dtype))
        direct = x / rows.weights.double() + self._product(rows.keys, pulled)[:, 0].double()
        residual = float((rows.lower @ (rows.lower.T @ x) - direct).norm() / direct.norm())
        if residual <= max(_DRIFTED, 1e3 * torch.finfo(self._dtype).eps):
            return Monitor(residual, False, f"the factor is accurate: residual {residual:.1e}.")
        return Monitor(residual, True, f"the factor is inaccurate: residual {residual:.1e}. Call refresh.")

    @torch.no_grad()
    def project(self, keys: Tensor, weights: Tensor | None = None) -> BlockPanel:
        """Projects a batch of keys with the current state; see `update_projected`.

        Args:
            keys: rows of keys `[n, key_width]`, any floating dtype.
            weights: `w [n]`, any floating dtype, positive; 1 by default.

        Returns:
            The panel of the batch.

        Raises:
            InputError: an argument is invalid.
        """
        keys, weights, _ = self._batch(keys, weights)
        return self._panel(keys, weights)

    @torch.no_grad()
    @full_float32()
    def cross(self, keys: Tensor, panel: BlockPanel) -> Tensor:
        """Returns `K' C K^T [m, n]`, float64, for rows of keys `K'` and the keys `K` of a panel of this state."""
        keys, _, _ = self._batch(keys, None)
        prior = self._covariances.gram(keys, panel.keys, panel.projected)
        if not len(self._rows):
            return prior
        old = self._covariances.gram(self._rows.keys, keys, self._covariances.project(keys)[0])
        return prior - torch.linalg.solve_triangular(self._rows.lower, old, upper=False).T @ panel.coupling

    @torch.no_grad()
    def update(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Applies a batch of edits.

        Args:
            keys: rows of keys `[n, key_width]`, any floating dtype.
            values: `V [n, d_v]`, any floating dtype.
            weights: `w [n]`, any floating dtype, positive; 1 by default.

        Returns:
            Residuals, realized fractions, the objective and the norm of the weight change.

        Raises:
            InputError: an argument is invalid.
            UpdateError: the batch could not be factored, or the result is not finite.
        """
        keys, weights, (values,) = self._batch(keys, weights, values=values)
        return self._append(self._panel(keys, weights), values - self.outputs(keys))

    @torch.no_grad()
    def update_projected(self, panel: BlockPanel, innovation: Tensor) -> Step:
        """Applies the edits of a panel with the values `V = K W^T + E` at the current weight.

        Args:
            panel: panel returned by `project` for the current state.
            innovation: `E [n, d_v]`, any floating dtype.

        Returns:
            See `update`.

        Raises:
            InputError: the panel is stale or from another state, or the innovation is invalid.
            UpdateError: the batch could not be factored, or the result is not finite.
        """
        return self._append(panel, self._checked_innovation(panel, innovation))

    @torch.no_grad()
    def remove(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Removes applied edits, however old. The result is the state without these edits.

        Args:
            keys: rows of keys `[n, key_width]`, as applied.
            values: `V [n, d_v]`, as applied; they decide between rows with equal keys.
            weights: `w [n]`, as applied.

        Returns:
            See `update`; `residual` is at the removed keys.

        Raises:
            InputError: an argument is invalid, or a row is not applied.
            UpdateError: the result is not finite.
        """
        keys, weights, (values,) = self._batch(keys, weights, values=values)
        before = values - self.outputs(keys)
        places = self._find(keys, values, weights)
        change = self._reduce(places)
        after = values - self.outputs(keys)
        return Step(after, before, self._objective, change)

    @torch.no_grad()
    def replace(self, keys: Tensor, old_values: Tensor, new_values: Tensor, weights: Tensor | None = None) -> Step:
        """Replaces the values of applied edits. `C` does not change.

        Args:
            keys: rows of keys `[n, key_width]`, as applied.
            old_values: `V_old [n, d_v]`, as applied.
            new_values: `V_new [n, d_v]`, any floating dtype.
            weights: `w [n]`, as applied; they do not change.

        Returns:
            See `update`.

        Raises:
            InputError: an argument is invalid, or a row is not applied.
            UpdateError: the result is not finite.
        """
        keys, weights, (old, new) = self._batch(keys, weights, old_values=old_values, new_values=new_values)
        before = new - self.outputs(keys)
        places = self._find(keys, old, weights)
        rows = self._rows.moved(places, new - old)
        change = self._write(rows, len(rows))
        after = new - self.outputs(keys)
        return Step(after, before, self._objective, change)

    @torch.no_grad()
    def reweigh(self, keys: Tensor, values: Tensor, old_weights: Tensor, new_weights: Tensor) -> Step:
        """Changes the weights of applied edits; see `RLSState.reweigh`. Rows after the first one are factored again.

        Args:
            keys: rows of keys `[n, key_width]`, as applied.
            values: `V [n, d_v]`, as applied; they decide between rows with equal keys.
            old_weights: `w [n]`, as applied.
            new_weights: `w_new [n]`, positive; all smaller than the old weights, or all larger.

        Returns:
            See `update`; `residual` is at the given keys.

        Raises:
            InputError: an argument is invalid, or a row is not applied.
            UpdateError: the result is not finite.
        """
        checks.lowered(old_weights, new_weights)
        keys, old, (values,) = self._batch(keys, old_weights, values=values)
        before = values - self.outputs(keys)
        places = self._find(keys, values, old)
        weights = self._rows.weights.clone()
        weights[places] = new_weights.to(weights)
        change = self._again_from(min(places), range(min(places), len(weights)), weights)
        return Step(values - self.outputs(keys), before, self._objective, change)

    @torch.no_grad()
    def refresh(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> None:
        """Computes the state again from the prior and the given edits, which replace the applied edits.

        Args:
            keys: rows of keys `[n, key_width]` of all edits, in any order; n may be 0.
            values: `V [n, d_v]` of all edits.
            weights: `w [n]` of all edits; 1 by default.

        Raises:
            InputError: an argument is invalid.
            UpdateError: the edits could not be factored, or the result is not finite.
        """
        keys, weights, (values,) = self._batch(keys, weights, least=0, values=values)
        start = values - self._weights.times(self._layout, keys, original=True)
        empty = AppliedRows(self._layout, self.value_width, self._dtype, self.device)
        self._write(self._refactored(empty, keys, weights, start), len(keys))

    @torch.no_grad()
    def snapshot(self) -> BlockSnapshot:
        """Takes a snapshot for `restore`. Later steps copy each block once before they write it."""
        taken = BlockSnapshot(self._rows, len(self._rows), {}, self._objective, self._version, next(_orders))
        self._snapshots.add(taken)
        return taken

    @torch.no_grad()
    def restore(self, snapshot: BlockSnapshot) -> None:
        """Restores a snapshot bit for bit. Snapshots taken after it can no longer be restored.

        Raises:
            InputError: the snapshot is from another state, or an earlier snapshot was restored after it was taken.
        """
        self._check_snapshot(snapshot in self._snapshots)
        for later in [other for other in self._snapshots if other.order > snapshot.order]:
            self._snapshots.discard(later)
        self._rows = snapshot.rows
        self._rows.truncate(snapshot.count)
        self._objective, self._version = snapshot.objective, snapshot.version
        self._weights.restore(snapshot.blocks)

    @full_float32()
    def _panel(self, keys: Tensor, weights: Tensor, rows: AppliedRows | None = None) -> BlockPanel:
        rows = self._rows if rows is None else rows
        projected, _ = self._covariances.project(keys)
        gram = self._covariances.gram(keys, keys, projected)
        coupling = torch.zeros(0, len(keys), dtype=torch.float64, device=self.device)
        if len(rows):
            coupling = torch.linalg.solve_triangular(
                rows.lower, self._covariances.gram(rows.keys, keys, projected), upper=False
            )
            gram -= coupling.T @ coupling
        return BlockPanel(keys, weights, 0.5 * (gram + gram.T), self._version, projected, coupling, self.cross)

    def _append(self, panel: BlockPanel, innovation: Tensor) -> Step:
        rows = self._rows
        # The recursion's innovation at W, and the one at W0 that the dual form needs.
        start = innovation.double() + panel.coupling.T @ rows.whitened
        count = len(rows)
        rows.append(panel.keys, panel.projected, panel.weights, start, self._factored(panel, rows), panel.coupling)
        try:
            change = self._write(rows, count + len(panel.keys))
        except BaseException:
            rows.truncate(count)
            raise
        residual = (panel.noise.double()[:, None] * rows.dual()[count:]).to(self._dtype)
        return Step(residual, innovation, self._objective, change, rows.whitened[count:].clone())

    def _factored(self, panel: BlockPanel, rows: AppliedRows) -> Tensor:
        """Returns the Cholesky factor of `diag(1/w) + K C K^T [n, n]`.

        Raises:
            UpdateError: it is not positive definite.
        """
        lower, info = torch.linalg.cholesky_ex(torch.diag(panel.noise.double()) + panel.gram)
        if int(info) or not bool(lower.isfinite().all()):
            raise self._not_factored(len(panel.keys), int(info))
        return lower

    def _refactored(self, rows: AppliedRows, keys: Tensor, weights: Tensor, start: Tensor) -> AppliedRows:
        """Appends rows with given `E0` to rows that are not those of this state."""
        if len(keys):
            panel = self._panel(keys, weights, rows)
            rows.append(keys, panel.projected, weights, start.double(), self._factored(panel, rows), panel.coupling)
        return rows

    def _find(self, keys: Tensor, values: Tensor, weights: Tensor) -> list[int]:
        start = values - self._weights.times(self._layout, keys, original=True)
        places, missing = self._rows.find(keys, weights, start)
        if missing:
            raise InputError(
                f"{missing} of {len(keys)} rows are not applied to {self._name}; pass keys and weights of applied "
                "edits. No state was modified."
            )
        return places

    def _reduce(self, places: Sequence[int]) -> float:
        """Takes rows out; the rows after the first one are factored again."""
        first, out = min(places), set(places)
        after = [at for at in range(first, len(self._rows)) if at not in out]
        return self._again_from(first, after, self._rows.weights)

    def _again_from(self, first: int, after: Sequence[int], weights: Tensor) -> float:
        """Keeps the rows before `first`, factors the rows `after` again with their `weights`, and writes the result."""
        rows, after = self._rows, list(after)
        left = self._refactored(rows.head(first), rows.keys[after], weights[after], rows.start[after])
        return self._write(left, len(left))

    @full_float32()
    def _write(self, rows: AppliedRows, count: int) -> float:
        """Writes `W = W0 + X^T K C0` for the rows and makes them those of this state.

        Blocks that lost all of their rows get their original weight.

        Returns:
            `||W_new - W_old||_F`.

        Raises:
            UpdateError: a result is not finite; blocks, rows and objective are as before.
        """
        layout, dual = self._layout, rows.dual().to(self._dtype)
        objective = float(rows.whitened.square().sum())
        groups = {group.block: group for group in layout.groups(rows.keys)} if count else {}
        undo: SavedBlocks = {}
        energy = 0.0
        try:
            if not math.isfinite(objective):
                raise self._overflow(count)
            for block in sorted({*groups, *self._weights.written}):
                group = groups.get(block)
                delta = None
                if group is not None:
                    delta = dual[group.rows].T @ layout.part(rows.projected, group)
                    if not checks.all_finite(delta):
                        raise self._overflow(count)
                lacking = [undo, *(one.blocks for one in self._snapshots if block not in one.blocks)]
                energy += self._weights.write(block, delta, lacking)
        except BaseException:
            self._weights.restore(undo)
            raise
        self._rows, self._objective, self._version = rows, objective, next(_versions)
        return math.sqrt(energy)

    def _pulled(self, keys: Tensor, projected: Tensor, vector: Tensor) -> dict[int, Tensor]:
        """Returns the blocks of `(K C0)^T vector`, each `[block width, m]`."""
        layout = self._layout
        return {g.block: layout.part(projected, g).T @ vector[g.rows] for g in layout.groups(keys)}

    def _product(self, keys: Tensor, blocks: dict[int, Tensor]) -> Tensor:
        """Returns `K x [n, m]` for the blocks of x."""
        layout, features = self._layout, self._layout.features(keys)
        first = next(iter(blocks.values()))
        result = first.new_zeros(len(keys), first.shape[1])
        for group in layout.groups(keys):
            result.index_add_(0, group.rows, layout.part(features, group) @ blocks[group.block])
        return result
