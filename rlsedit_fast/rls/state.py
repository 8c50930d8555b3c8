"""Recursive least squares on one weight: applies, removes and replaces edits."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.ops.dispatch import unmeasured
from rlsedit_fast.ops.precision import full_float32
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.build import Built, Edits
from rlsedit_fast.rls.columns import WHOLE, Columns
from rlsedit_fast.rls.layer import checked_arguments
from rlsedit_fast.rls.master import master_of
from rlsedit_fast.rls.monitor import Monitor, Sketch, inspect, probe
from rlsedit_fast.rls.parts import build_part, prior_inverse
from rlsedit_fast.rls.pending import Pending
from rlsedit_fast.rls.prior import Prior
from rlsedit_fast.rls.results import Panel, Saved, Snapshot, Step
from rlsedit_fast.rls.step import prepare_replacement, prepare_step
from rlsedit_fast.rls.terms import AnchorChange, ObjectiveLayer

logger = logging.getLogger(__name__)
DEFAULT_DELAY = 512
"""Pending rows before C is written; 128 to 1024 perform alike (bench/results/step-delay-cpu.json)."""

_versions = itertools.count(1)  # shared by all states, so that a panel matches only the state it came from
_orders = itertools.count(1)


class RLSState(ObjectiveLayer):
    """Minimizes `sum_i w_i ||K_i W^T - V_i||^2 + prior` over one weight, updated batch by batch.

    Recursive least squares in square-root form: with `F = K C`, `Sig = diag(1/w) + F K^T = L L^T`, `U = L^-1 F` and
    `A = L^-1 (V - K W^T)`, an update is `C -= U^T U`, `W += A^T U`, `J += ||A||_F^2`. `C` is stored as
    `C_base - U_p^T D U_p`, so that a batch reads it once and it is written only every `delay` rows.

    A method that raises leaves the state unmodified. A step synchronizes with the host once, to check all numbers.

    Args:
        weight: `W0 [d_v, d_k]`, any floating dtype; copied and not modified unless `in_place`.
        prior: prior of the layer.
        delay: maximum number of pending rows before they are folded into C; 0 folds every batch at once. While a
            snapshot exists rows stay pending until `settle`.
        dtype: dtype of the computations, float32 or float64; default: float64 for a float64 weight, else float32.
        name: name of the layer, for error messages.
        backend: backend of the operations, see `rlsedit_fast.ops`.
        in_place: keep `weight` itself up to date, rounded to its dtype, after every step. This needs no extra memory
            for a float32 weight and two bytes per entry for a bfloat16 weight (the lower half of the float32 weight).
        saved: contents returned by `saved()` of a state with the same weight, prior, delay and dtype, to continue from.
        columns: a `ShardedColumns` if several processes hold parts of the weight; `weight` is then the held part.

    Raises:
        BackendError: the requested backend cannot run the operations of this layer.
        InputError: the weight, an option or the shape of an anchor is invalid.
        PriorError: the precision of the prior is not positive definite.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, RLSState
        >>> state = RLSState(torch.zeros(1, 3), Prior(lam=1.0))
        >>> keys, values = torch.ones(1, 3), torch.tensor([[4.0]])
        >>> step = state.update(keys, values)
        >>> state.weight
        tensor([[1., 1., 1.]])
        >>> step.residual, step.objective
        (tensor([[1.]]), 4.0)
    """

    _base: Tensor  # C without the pending rows
    _pending: Pending
    _sketch: Sketch
    _prior_covariance: Tensor | None = None

    @torch.no_grad()
    def __init__(
        self,
        weight: Tensor,
        prior: Prior,
        *,
        delay: int = DEFAULT_DELAY,
        dtype: torch.dtype | None = None,
        name: str = "layer",
        backend: str | None = None,
        in_place: bool = False,
        saved: Saved | None = None,
        columns: Columns = WHOLE,
    ) -> None:
        self._dtype = columns.agree(
            lambda: checked_arguments(weight, prior, delay, dtype, name, columns),
            lambda dtype: (delay, dtype.itemsize),
        )
        self._columns, self._prior, self._delay, self._name, self._backend = columns, prior, delay, name, backend
        narrow = weight.dtype if weight.element_size() < self._dtype.itemsize else self._dtype
        self._original = weight.detach().to(narrow, copy=True).contiguous()
        built = None if saved else build_part(self._original, prior, None, columns, dtype=self._dtype, name=name)
        self._master = master_of(weight.detach(), self._dtype, in_place=in_place)
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self._edits = 0
        start = None
        if built:
            self._start_from(built, write=False)
            start = built.weight if prior.custom else None
        elif saved:
            saved = columns.agree(partial(self._restore_saved, saved))
            start = saved.weight.to(self._original.device, self._dtype)
        self._version = next(_versions)
        with unmeasured():
            self._dry_run()
        if start is not None:
            self._master.write(start)

    @torch.no_grad()
    def precision_inverse(self) -> Tensor:
        """Returns `C [d_k, d_k]` with all pending rows folded in, as a new tensor; with `columns` the held rows."""
        result = self._base.clone()
        if self._pending:
            self._downdate(result)
        return torch.add(result, result.T).mul_(0.5) if self._columns.ranks == 1 else result

    @torch.no_grad()
    def monitor(self) -> Monitor:
        """Returns how far C has drifted. This needs no stored keys: the state keeps `S x` in float64."""
        return inspect(self._sketch, self._base, self._pending.rows, self._pending.signs, self._columns)

    @torch.no_grad()
    def project(self, keys: Tensor, weights: Tensor | None = None) -> Panel:
        """Projects a batch of keys with the current state; see `update_projected`.

        Args:
            keys: `K [n, d_k]`, any floating dtype.
            weights: `w [n]`, any floating dtype, positive; 1 by default.

        Returns:
            The panel of the batch.

        Raises:
            InputError: an argument is invalid.
        """
        given = self._batch(keys, weights)
        self._check(given)
        return self._panel(given)

    @torch.no_grad()
    def update(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Applies a batch of edits.

        Args:
            keys: `K [n, d_k]`, any floating dtype.
            values: `V [n, d_v]`, any floating dtype.
            weights: `w [n]`, any floating dtype, positive; 1 by default.

        Returns:
            Residuals, realized fractions, the objective and the norm of the weight change.

        Raises:
            InputError: an argument is invalid.
            UpdateError: the batch could not be factored, or the result is not finite.
        """
        given = self._batch(keys, weights, values=values)
        panel = self._panel(given)
        return self._apply(panel, self._innovation(panel, given["values"]), 1, given)

    @torch.no_grad()
    def update_projected(self, panel: Panel, innovation: Tensor) -> Step:
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
        innovation = self._innovation_of(panel, innovation)
        return self._apply(panel, innovation, 1, {"innovation": innovation})

    @torch.no_grad()
    def remove(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Removes applied edits, however old. The result is the state without these edits.

        Args:
            keys: `K [n, d_k]`, as applied. Only the number of rows can be checked.
            values: `V [n, d_v]`, as applied.
            weights: `w [n]`, as applied.

        Returns:
            See `update`.

        Raises:
            InputError: an argument is invalid, or there are more rows than applied edits.
            RemovalError: the batch cannot be removed accurately; use `refresh` with the remaining edits.
        """
        given = self._batch(keys, weights, values=values)
        self._check_count(keys.shape[0])
        panel = self._panel(given)
        return self._apply(panel, self._innovation(panel, given["values"]), -1, given)

    @torch.no_grad()
    @full_float32()
    def replace(self, keys: Tensor, old_values: Tensor, new_values: Tensor, weights: Tensor | None = None) -> Step:
        """Replaces the values of applied edits: `W += (w (V_new - V_old))^T K C`. C does not change.

        Args:
            keys: `K [n, d_k]`, as applied.
            old_values: `V_old [n, d_v]`, as applied.
            new_values: `V_new [n, d_v]`, any floating dtype.
            weights: `w [n]`, as applied; they do not change.

        Returns:
            See `update`.

        Raises:
            InputError: an argument is invalid, or there are more rows than applied edits.
            UpdateError: the result is not finite.
        """
        given = self._batch(keys, weights, old_values=old_values, new_values=new_values)
        self._check(given)
        self._check_count(keys.shape[0])
        panel, old = self._panel(given), given["old_values"]
        shift = self._columns.alike(given["new_values"] - old)
        change, step = prepare_replacement(
            panel,
            shift,
            self._innovation(panel, old),
            self._columns.alike(given["weights"]) if "weights" in given else None,
            objective=self._objective,
            name=self._name,
        )
        self._columns.agree(self._save_weight)
        self._master.correct(change, panel.projected, 1, self._backend)
        self._anchor_change = self._anchor_change.moved(panel.projected, change, 1)
        self._objective = step.objective
        self._version = next(_versions)
        return step

    @torch.no_grad()
    def reweigh(self, keys: Tensor, values: Tensor, old_weights: Tensor, new_weights: Tensor) -> Step:
        """Changes the weights of applied edits: a part of each row is removed, or added. The prior does not change.

        Args:
            keys: `K [n, d_k]`, as applied.
            values: `V [n, d_v]`, as applied.
            old_weights: `w [n]`, as applied.
            new_weights: `w_new [n]`, positive; all smaller than the old weights, or all larger.

        Returns:
            See `update`; the weight of a residual is the change of the weight of its row.

        Raises:
            InputError: an argument is invalid, or there are more rows than applied edits.
            RemovalError: the weights cannot be lowered accurately; use `refresh` with the new weights.
        """
        lowered = self._columns.agree(lambda: checks.lowered(old_weights, new_weights), lambda lowered: [lowered])
        change = (old_weights - new_weights).abs()
        given = self._batch(keys, change, values=values)
        self._check_count(keys.shape[0])
        panel = self._panel(given)
        innovation = self._innovation(panel, given["values"])
        return self._apply(panel, innovation, -1 if lowered else 1, given, counted=False)

    @torch.no_grad()
    @full_float32()
    def prior_variance(self, keys: Tensor) -> Tensor:
        """Returns `k C0 k^T [n]`, float64, for rows `K [n, d_k]`; see `prior_gram`."""
        rows = self._batch(keys, None)["keys"]
        return self._columns.total((self._prior_projected(rows).double() * rows.double()).sum(1), "terms")

    @torch.no_grad()
    @full_float32()
    def prior_gram(self, keys: Tensor, others: Tensor) -> Tensor:
        """Returns `K C0 K'^T [n, m]`, float64; `C0` is computed by the first call and kept in host memory."""
        rows, others = (self._batch(one, None)["keys"] for one in (keys, others))
        return self._columns.total(self._prior_projected(rows).double() @ others.double().T, "terms")

    def _prior_projected(self, rows: Tensor) -> Tensor:
        if self._prior_covariance is None:
            self._prior_covariance = prior_inverse(rows, self._prior, self._columns, name=self._name).cpu()
        return (self._columns.gather(rows, "keys").cpu() @ self._prior_covariance).to(rows.device)

    @torch.no_grad()
    def refresh(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> None:
        """Recomputes C, W and J in float64 from the prior and the given edits, which replace the applied edits.

        Args:
            keys: `K [n, d_k]` of all edits, in any order; n may be 0.
            values: `V [n, d_v]` of all edits.
            weights: `w [n]` of all edits; 1 by default.

        Raises:
            InputError: an argument is invalid.
            PriorError: the precision is not positive definite in float64.
        """
        given = self._batch(keys, weights, least=0, values=values)
        self._check(given)
        weights = given.get("weights", self._base.new_ones(keys.shape[0]))
        edits = Edits(given["keys"], given["values"], weights) if keys.shape[0] else None
        built = build_part(self._original, self._prior, edits, self._columns, dtype=self._dtype, name=self._name)
        self._start_from(built, write=True)
        self._edits = keys.shape[0]
        self._version = next(_versions)

    @torch.no_grad()
    def flush(self) -> None:
        """Folds the pending rows into C now (into a copy of C while a snapshot exists)."""
        if not self._pending:
            return
        # If the backend fails here, the rows stay pending and the state is unmodified.
        if self._snapshots:
            base = self._columns.agree(self._base.clone)
            pending = Pending(self._base, self._delay)
            self._downdate(base)
            self._base, self._pending = base, pending
        else:
            self._downdate(self._base)
            self._pending.clear(self._delay)

    def settle(self) -> None:
        """Flushes if more than `delay` rows are pending and no snapshot exists. Call it when a snapshot was dropped.

        Steps call it themselves. If the flush fails, it logs a warning and the rows stay pending.
        """
        if len(self._pending) > self._delay and self._columns.unanimous(not self._snapshots):
            try:
                self.flush()
            except Exception as error:  # the steps stay applied
                logger.warning("%s: the flush failed and the rows stay pending: %s", self._name, error)

    def saved(self) -> Saved:
        """Returns the contents of the state without its original weight and prior.

        The tensors are the live ones and change with the next step.
        """
        return Saved(
            weight=self.weight,
            base=self._base,
            pending=self._pending.rows,
            signs=self._pending.signs,
            image=self._sketch.image,
            floor=self._sketch.floor,
            objective=self._objective,
            edits=self._edits,
            first=self._columns.held(self.key_width).start,
        )

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """Takes a snapshot for `restore`. The next step copies W once; C is not copied.

        While the snapshot is referenced, rows stay pending and are not flushed.
        """
        taken = Snapshot(
            base=self._base,
            pending=self._pending,
            count=len(self._pending),
            weight=None,
            sketch=self._sketch,
            anchor_change=self._anchor_change,
            objective=self._objective,
            edits=self._edits,
            version=self._version,
            order=next(_orders),
        )
        self._snapshots.add(taken)
        return taken

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Restores a snapshot bit for bit. Snapshots taken after it can no longer be restored.

        Raises:
            InputError: the snapshot is from another state, or an earlier snapshot was restored after it was taken.
        """
        if snapshot not in self._snapshots:
            raise InputError(
                f"the snapshot cannot be restored on {self._name}: it is from another state, or an earlier snapshot "
                "was restored after it was taken. Take a new snapshot."
            )
        for later in [other for other in self._snapshots if other.order > snapshot.order]:
            self._snapshots.discard(later)
        self._base, self._pending = snapshot.base, snapshot.pending
        self._pending.truncate(snapshot.count)
        self._sketch, self._objective = snapshot.sketch, snapshot.objective
        self._anchor_change = snapshot.anchor_change
        self._edits, self._version = snapshot.edits, snapshot.version
        if snapshot.weight is not None:
            self._restore_weight(snapshot.weight)

    @full_float32()
    def _panel(self, given: Mapping[str, Tensor]) -> Panel:
        pending, keys, weights = self._pending, given["keys"], given.get("weights")
        noise = self._base.new_ones(keys.shape[0]) if weights is None else 1 / self._columns.alike(weights)
        projected = self._columns.panel(self._base, keys, pending.rows, pending.signs, self._backend)
        return Panel(keys, noise, projected, self._version, self._columns)

    def _innovation(self, panel: Panel, values: Tensor) -> Tensor:
        return self._columns.innovation(values, self._master.times(panel.keys))

    def _apply(
        self, panel: Panel, innovation: Tensor, sign: int, given: Mapping[str, Tensor], *, counted: bool = True
    ) -> Step:
        sketch, objective = self._sketch, self._objective
        prepared = prepare_step(
            panel, innovation, sign, given, sketch=sketch, objective=objective, name=self._name, backend=self._backend
        )
        self._reserve(prepared.rows.shape[0])
        self._master.correct(prepared.whitened, prepared.rows, sign, self._backend)
        self._pending.append(prepared.rows, sign)
        self._anchor_change = self._anchor_change.moved(prepared.rows, prepared.whitened, sign)
        self._sketch, self._objective = prepared.sketch, prepared.step.objective
        self._edits += sign * panel.keys.shape[0] * counted
        self._version = next(_versions)
        self.settle()  # the batch may exceed the delay
        return prepared.step

    def _start_from(self, built: Built, *, write: bool) -> None:
        pending = self._columns.agree(lambda: Pending(built.precision_inverse, self._delay))  # allocate first
        if write:
            self._columns.agree(self._save_weight)
            self._master.write(built.weight)
        self._base, self._sketch, self._objective = built.precision_inverse, built.sketch, built.objective
        self._pending, self._anchor_change = pending, AnchorChange(None if write else 0.0)

    def _restore_saved(self, saved: Saved) -> Saved:
        """Restores saved contents, of which the held part is returned, except for the weight.

        Raises:
            InputError: the shapes do not match.
        """
        (d_v, held), device, columns = self._original.shape, self._original.device, self._columns
        d_k = columns.width(held)
        saved = saved.part(columns.held(held)) if saved.weight.shape[1] == d_k else saved
        shapes = [list(t.shape) for t in (saved.weight, saved.base, saved.image)]
        if shapes != [[d_v, held], [held, d_k], [held]] or len(saved.pending) != len(saved.signs):
            raise InputError(f"the saved state of {self._name} has shapes {shapes}; its weight is [{d_v}, {held}].")
        if saved.first != columns.held(held).start:
            raise InputError(
                f"the saved state of {self._name} begins at column {saved.first}, but this process holds columns from "
                f"{columns.held(held).start}. Pass the contents of this process, or Saved.joined(parts)."
            )
        self._base = saved.base.to(device, self._dtype, copy=True)
        self._sketch = Sketch(columns.cut(probe(d_k, device)), saved.image.to(device, copy=True), saved.floor)
        self._objective, self._edits = saved.objective, saved.edits
        self._pending, self._anchor_change = Pending(self._base, self._delay), AnchorChange(None)
        self._pending.append(saved.pending, saved.signs)
        return saved

    def _save_weight(self) -> None:
        """Copies the weight, before it is written, into the snapshots that have no copy yet."""
        lacking = [snapshot for snapshot in self._snapshots if snapshot.weight is None]
        if lacking:
            kept = tuple(tensor.clone() for tensor in self._master.tensors)
            for snapshot in lacking:
                snapshot.weight = kept

    def _restore_weight(self, tensors: Sequence[Tensor]) -> None:
        for tensor, kept in zip(self._master.tensors, tensors, strict=True):
            tensor.copy_(kept)
        self._master.settle()

    def _dry_run(self) -> None:
        """Runs every operation on a row of zeros, so that an unsupported layer raises when the state is created."""
        (d_v, held), columns = self._original.shape, self._columns
        keys, values, one = self._base.new_zeros(1, held), self._base.new_zeros(1, d_v), self._base.new_ones(1)
        projected = columns.panel(self._base, keys, keys, one, self._backend)
        panel = Panel(keys, one, projected, 0, columns)
        rows, whitened, _, _ = columns.factor(panel, values, 1, self._backend)
        columns.downdate_(self._base, rows, one, self._backend)
        kept = [tensor.clone() for tensor in self._master.tensors]  # adding 0 turns -0.0 into 0.0
        columns.agree(lambda: self._master.correct(whitened, rows, 1, self._backend))
        self._restore_weight(kept)

    def _downdate(self, base: Tensor) -> None:
        self._columns.downdate_(base, self._pending.rows, self._pending.signs, self._backend)

    def _reserve(self, rows: int) -> None:
        """Makes space for `rows` pending rows, by a flush if needed and allowed, else by growing the buffer."""
        if len(self._pending) + rows > self._delay and self._columns.unanimous(not self._snapshots):
            self.flush()
        self._columns.agree(partial(self._allocate, rows))

    def _allocate(self, rows: int) -> None:
        self._pending.reserve(rows)
        self._save_weight()
