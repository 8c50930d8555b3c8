"""One layer's weight under recursive least squares: the edits it holds, and how it takes in and gives back others."""

from __future__ import annotations

import itertools
import logging
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsedit_fast import ops
from rlsedit_fast.errors import InputError, RemovalError, UpdateError
from rlsedit_fast.ops.precision import full_float32
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.build import Built, Edits, build
from rlsedit_fast.rls.layer import Layer
from rlsedit_fast.rls.master import master_of
from rlsedit_fast.rls.monitor import Monitor, Sketch, inspect, probe
from rlsedit_fast.rls.pending import Pending
from rlsedit_fast.rls.prior import Prior
from rlsedit_fast.rls.results import Bounds, Panel, Saved, Snapshot, Step, realized

logger = logging.getLogger(__name__)

DEFAULT_DELAY = 512
"""Pending rows before C is written: enough for the flush to be bound by arithmetic, few beside d_k when it is read.
Between 128 and 1024 it hardly matters (bench/results/step-delay-cpu.json)."""

REMOVAL_PIVOT_POWER = 0.25
"""A removal's pivots, relative to the noise, must exceed `eps` to this power. With an edit in, C has in its direction
only a fraction p (the pivot) of the variance c that it had, and an error of about `eps c` from the subtraction. Taking
the edit out multiplies the variance by `1/p` and the error by `1/p^2`. The relative error of what comes back is then
`eps / p^2`, and is allowed to be `sqrt(eps)`: half the digits."""

_versions = itertools.count(1)  # one for all states, so that no panel fits a state it was not taken from
_orders = itertools.count(1)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """All that a step will write, computed and found finite before any of it is written."""

    rows: Tensor  # U [n, d_k]
    whitened: Tensor  # A [n, d_v]
    sketch: Sketch
    step: Step


class RLSState(Layer):
    """The minimiser of `sum w ||K W^T - V||^2 + prior` over one weight, kept current edit by edit.

    Recursive least squares in square-root form: with `F = K C`, `Sig = diag(1/w) + F K^T = L L^T`, `U = L^-1 F` and
    `A = L^-1 (V - K W^T)`, an edit is `C -= U^T U`, `W += A^T U`, `J += ||A||_F^2`. `C` is kept as
    `C_base - U_p^T D U_p`, so that a batch reads it once and only every `delay` rows write it.

    Whatever raises has changed nothing. A step costs two host synchronisations (its inputs' check, its result's).

    Args:
        weight: `W0 [d_v, d_k]`, any floating dtype; copied and never written to, unless `in_place`.
        prior: what holds the weight.
        delay: how many rows of edits may wait before they are written into C; 0 writes each batch at once. Within a
            transaction they wait for `settle`.
        dtype: to keep and compute in, float32 or float64; by default float64 for a float64 weight, else float32.
        name: of the layer, for the errors.
        backend: of the operations, as in `rlsedit_fast.ops`; by default the environment's, else the best there is.
        in_place: keep `weight` itself current, rounded to its dtype, after every step. A float32 weight then takes no
            memory beside it and a bfloat16 one two bytes an entry: the lower half of its float32 self, bit for bit.
        saved: what `saved()` gave of a state of this weight, prior, delay and dtype, to go on from there.

    Raises:
        BackendError: the backend asked for cannot run this layer's operations.
        InputError: the weight, an option or the shape of an anchor is wrong.
        PriorError: the prior's precision is not positive definite.
    """

    _base: Tensor  # C but for what is pending
    _pending: Pending
    _sketch: Sketch
    _objective: float

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
    ) -> None:
        checks.matrix("weight", weight)
        if 0 in weight.shape:
            raise InputError(f"weight has shape {list(weight.shape)}; no size may be 0.")
        if dtype not in (None, torch.float32, torch.float64):
            raise InputError(f"dtype is {dtype}; the solver keeps its state in float32 or float64.")
        if not isinstance(delay, int) or delay < 0:
            raise InputError(f"delay is {delay!r}; a number of rows of at least 0 is expected.")
        self._dtype = dtype or dtype_of(weight)
        checks.finite(weight=weight.detach().to(self._dtype))
        prior.fit(weight.shape[0], weight.shape[1], name)
        self._prior, self._delay, self._name, self._backend = prior, delay, name, backend
        narrow = weight.dtype if weight.element_size() < self._dtype.itemsize else self._dtype
        self._original = weight.detach().to(narrow, copy=True).contiguous()
        built = None if saved else build(self._original, prior, None, dtype=self._dtype, name=name)
        self._master = master_of(weight.detach(), self._dtype, in_place=in_place)
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self._edits = 0
        start = None
        if built:
            self._begin_with(built, write=False)
            start = built.weight if prior.custom else None
        elif saved:
            self._take_up(saved)
            start = saved.weight.to(self._original.device, self._dtype)
        self._version = next(_versions)
        self._rehearse()
        if start is not None:
            self._master.write(start)

    @property
    def objective(self) -> float:
        """`J` at the current weight, at least 0; accumulated in float64."""
        return self._objective

    @torch.no_grad()
    def precision_inverse(self) -> Tensor:
        """`C [d_k, d_k]` with all pending rows applied, symmetric, as a new tensor."""
        result = self._base.clone()
        if self._pending:
            self._downdate(result)
        return torch.add(result, result.T).mul_(0.5)

    def bounds(self) -> Bounds:
        """What `J` promises of the weight, the anchors and the edits (each term of `J` is at most `J`)."""
        root, prior = math.sqrt(self._objective), self._prior
        return Bounds(
            weight=root / prior.lam if prior.lam else math.inf,
            anchors=root / prior.mu if prior.mu else math.inf,
            edits=root,
        )

    def memory_bytes(self) -> int:
        """Bytes of the tensors that the state keeps, without the anchors of its prior and a weight kept in place."""
        kept = [self._base, self._original, self._sketch.probe, self._sketch.image]
        return self._master.extra + self._pending.nbytes + sum(tensor.nbytes for tensor in kept)

    @torch.no_grad()
    def monitor(self) -> Monitor:
        """How far C has drifted, without the stored keys: `S x` is kept in float64 beside the state."""
        return inspect(self._sketch, self._base, self._pending.rows, self._pending.signs)

    @torch.no_grad()
    def project(self, keys: Tensor, weights: Tensor | None = None) -> Panel:
        """The panel of a batch at the present state, from which any innovation gives a step.

        Args:
            keys: `K [n, d_k]`, any floating dtype.
            weights: `w [n]`, positive; 1 by default.

        Raises:
            InputError: an argument is wrong.
        """
        keys, weights, _ = self._batch(keys, weights)
        return self._panel(keys, weights)

    @torch.no_grad()
    def update(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Takes in edits: from now on `W` is the minimiser with them.

        Args:
            keys: `K [n, d_k]`, any floating dtype.
            values: `V [n, d_v]`, any floating dtype.
            weights: `w [n]`, positive; 1 by default.

        Raises:
            InputError: an argument is wrong.
            UpdateError: the batch could not be factored, or its result is not finite.
        """
        keys, weights, (values,) = self._batch(keys, weights, values=values)
        panel = self._panel(keys, weights)
        return self._apply(panel, self._innovation(panel, values), 1)

    @torch.no_grad()
    def update_projected(self, panel: Panel, innovation: Tensor) -> Step:
        """Takes in the edits of a panel, given as innovations: their values are `V = K W^T + E` at the present weight.

        Args:
            panel: from `project`, at the present state.
            innovation: `E [n, d_v]`, any floating dtype.

        Raises:
            InputError: the panel is stale or of another state, or the innovation is wrong.
            UpdateError: the batch could not be factored, or its result is not finite.
        """
        return self._apply(panel, self._checked_innovation(panel, innovation), 1)

    @torch.no_grad()
    def preview(self, panel: Panel, innovation: Tensor) -> Step:
        """The step that `update_projected` would make, without making it. Same arguments, same errors."""
        return self._prepare(panel, self._checked_innovation(panel, innovation), 1).step

    @torch.no_grad()
    def remove(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> Step:
        """Gives back edits, however long past: what remains is the state that never saw them.

        Args:
            keys: as they went in. That they are the same cannot be checked beyond their number.
            values: as they went in.
            weights: as they went in.

        Raises:
            InputError: an argument is wrong, or there are more rows than the state holds.
            RemovalError: the batch carries so much of the state that it cannot be taken out of it accurately.
        """
        keys, weights, (values,) = self._batch(keys, weights, values=values)
        self._check_held(keys.shape[0])
        panel = self._panel(keys, weights)
        return self._apply(panel, self._innovation(panel, values), -1)

    @torch.no_grad()
    @full_float32()
    def replace(self, keys: Tensor, old_values: Tensor, new_values: Tensor, weights: Tensor | None = None) -> Step:
        """Gives edits that the state holds new values: `W += (w (V_new - V_old))^T K C`, and C stays as it is.

        Args:
            keys: as they went in.
            old_values: as they went in.
            new_values: `[n, d_v]`, any floating dtype.
            weights: as they went in, and as they stay.

        Raises:
            InputError: an argument is wrong, or there are more rows than the state holds.
            UpdateError: the result is not finite.
        """
        keys, weights, (old, new) = self._batch(keys, weights, old_values=old_values, new_values=new_values)
        self._check_held(keys.shape[0])
        panel = self._panel(keys, weights)
        shift = new - old
        weighted = shift * weights[:, None]
        before = self._innovation(panel, old)
        moved = panel.gram @ weighted
        residual = before + shift - moved
        energy = (weighted.double() * (shift - moved + 2 * before).double()).sum()
        change, _ = _norms(weighted, panel.projected)
        gained, size = torch.stack((energy, change)).tolist()
        if not (math.isfinite(gained) and size < torch.finfo(self._dtype).max):
            raise UpdateError(self._not_finite(panel))
        self._keep_weight()
        self._master.correct(weighted, panel.projected, 1, self._backend)
        self._objective = max(self._objective + gained, 0.0)
        self._version = next(_versions)
        return Step(residual, realized(before + shift, residual), self._objective, size)

    @torch.no_grad()
    def refresh(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> None:
        """Makes C, W and J afresh in float64 from the prior and all the edits that the state is to hold.

        Args:
            keys: all of them, in any order; `[0, d_k]` for none.
            values: theirs; `[0, d_v]` for none.
            weights: theirs, 1 by default.

        Raises:
            InputError: an argument is wrong.
            PriorError: the precision is not positive definite in float64.
        """
        keys, weights, (values,) = self._batch(keys, weights, least=0, values=values)
        held = Edits(keys, values, weights) if keys.shape[0] else None
        built = build(self._original, self._prior, held, dtype=self._dtype, name=self._name)
        self._begin_with(built, write=True)
        self._edits = keys.shape[0]
        self._version = next(_versions)

    @torch.no_grad()
    def flush(self) -> None:
        """Writes the pending rows into C now (into a copy of it while a snapshot is alive)."""
        if not self._pending:
            return
        # A backend that fails here has left the rows pending, and the state what it was.
        if self._snapshots:
            base, pending = self._base.clone(), Pending(self._base, self._delay)
            self._downdate(base)
            self._base, self._pending = base, pending
        else:
            self._downdate(self._base)
            self._pending.clear(self._delay)

    def settle(self) -> None:
        """Flushes if more than `delay` rows wait and no snapshot is alive: to be called behind a transaction.

        Steps outside of transactions do so themselves. Where the flush fails, a warning says so and the rows wait on.
        """
        if len(self._pending) > self._delay and not self._snapshots:
            try:
                self.flush()
            except Exception as error:  # the steps are made and stay
                logger.warning("%s: pending rows could not be folded in, and wait on: %s", self._name, error)

    def saved(self) -> Saved:
        """All that the state is beside its original weight and its prior, to be written down at once.

        The tensors are the live ones: the next step changes them.
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
        )

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """A point to come back to, at the cost of a copy of W with the first step behind it; C is not copied.

        As long as the snapshot is referred to, pending rows are kept and not flushed. Drop it to let go of it.
        """
        taken = Snapshot(
            base=self._base,
            pending=self._pending,
            count=len(self._pending),
            weight=None,
            sketch=self._sketch,
            objective=self._objective,
            edits=self._edits,
            version=self._version,
            order=next(_orders),
        )
        self._snapshots.add(taken)
        return taken

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Puts the state back to a snapshot, bit by bit. Later snapshots can then no longer be restored.

        Raises:
            InputError: the snapshot is not of this state, or an earlier one has been restored since it was taken.
        """
        if snapshot not in self._snapshots:
            raise InputError(
                f"the snapshot is not one that {self._name} can go back to: it is of another state, or an earlier "
                "snapshot has been restored since. Take a new one."
            )
        for later in [other for other in self._snapshots if other.order > snapshot.order]:
            self._snapshots.discard(later)
        self._base, self._pending = snapshot.base, snapshot.pending
        self._pending.cut(snapshot.count)
        self._sketch, self._objective = snapshot.sketch, snapshot.objective
        self._edits, self._version = snapshot.edits, snapshot.version
        if snapshot.weight is not None:
            self._put_back(snapshot.weight)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Restores the state if the block raises: `with a.transaction(), b.transaction(): ...` changes both or none.

        Within it no row is flushed; see `settle`.
        """
        taken = self.snapshot()
        try:
            yield
        except BaseException:
            self.restore(taken)
            raise

    def _batch(
        self, keys: Tensor, weights: Tensor | None, *, least: int = 1, **others: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The arguments of a batch, checked and in the state's dtype: keys, weights, and the `[n, d_v]` others."""
        d_v, d_k = self._original.shape
        checks.matrix("keys", keys, columns=d_k)
        count = keys.shape[0]
        if count < least:
            raise InputError("keys has no rows; pass at least one edit.")
        tensors = {"keys": keys, **others}
        for argument, value in others.items():
            checks.matrix(argument, value, rows=count, columns=d_v)
        if weights is not None:
            checks.vector("weights", weights, size=count)
            tensors["weights"] = weights
        for argument, value in tensors.items():
            checks.same_device(argument, value, self._original.device)
        cast = {argument: value.detach().to(self._dtype).contiguous() for argument, value in tensors.items()}
        if count:
            checks.finite(**cast)
        if weights is None:
            cast["weights"] = self._base.new_ones(count)
        else:
            checks.positive_weights(cast["weights"])
        return cast.pop("keys"), cast.pop("weights"), [cast[argument] for argument in others]

    def _check_held(self, count: int) -> None:
        if count > self._edits:
            raise InputError(f"keys has {count} rows, but {self._name} holds {self._edits}; pass edits that went in.")

    @full_float32()
    def _panel(self, keys: Tensor, weights: Tensor) -> Panel:
        pending = self._pending
        projected = ops.panel(self._base, keys, pending.rows, pending.signs, backend=self._backend)
        gram = projected @ keys.T
        return Panel(keys, 1 / weights, projected, 0.5 * (gram + gram.T), self._version)

    def _innovation(self, panel: Panel, values: Tensor) -> Tensor:
        return values - self._master.times(panel.keys)

    def _checked_innovation(self, panel: Panel, innovation: Tensor) -> Tensor:
        if panel.version != self._version:
            raise InputError(
                f"the panel was not taken at the present state of {self._name} (version {panel.version}, now "
                f"{self._version}); call project again."
            )
        checks.matrix("innovation", innovation, rows=panel.keys.shape[0], columns=self._original.shape[0])
        checks.same_device("innovation", innovation, self._original.device)
        innovation = innovation.detach().to(self._dtype).contiguous()
        checks.finite(innovation=innovation)
        return innovation

    def _prepare(self, panel: Panel, innovation: Tensor, sign: int) -> _Prepared:
        """Computes a step and makes sure of it; one host synchronisation, nothing written."""
        rows, whitened, lower, info = ops.factor(
            panel.projected, panel.keys, innovation, panel.noise, sign, backend=self._backend
        )
        sketch = self._sketch.moved(panel.keys, 1 / panel.noise, sign)
        change, rows_energy = _norms(whitened, rows)
        energy = whitened.double().square().sum()
        pivot = (lower.diagonal().square() / panel.noise).min()
        numbers = torch.stack(
            [x.double() for x in (info, pivot, energy, change, rows_energy, sketch.image.abs().max())]
        )
        failed, smallest, gained, size, *finite = numbers.tolist()
        least = torch.finfo(self._dtype).eps ** REMOVAL_PIVOT_POWER
        if sign < 0 and (failed or not smallest > least):  # a NaN is not
            raise RemovalError(
                f"{panel.keys.shape[0]} rows cannot be removed from {self._name} accurately in {self._dtype}: they are "
                f"held so firmly that C has too few digits left in their directions (smallest pivot "
                f"{'not positive' if failed else format(smallest, '.1e')}, needed {least:.1e}). Nothing was changed; "
                "rebuild the state from its prior and the remaining edits with refresh(keys, values, weights)."
            )
        if failed:
            raise UpdateError(
                f"the batch of {panel.keys.shape[0]} rows for {self._name} could not be factored: pivot {int(failed)} "
                "is not positive. Nothing was changed; C may have drifted: see monitor() and refresh()."
            )
        largest = torch.finfo(self._dtype).max
        if not all(value < largest for value in (gained, size, *finite)):  # a NaN is not
            raise UpdateError(self._not_finite(panel))
        residual = panel.noise[:, None] * torch.linalg.solve_triangular(lower.T, whitened, upper=True)
        objective = max(self._objective + sign * gained, 0.0)
        return _Prepared(rows, whitened, sketch, Step(residual, realized(innovation, residual), objective, size))

    def _apply(self, panel: Panel, innovation: Tensor, sign: int) -> Step:
        prepared = self._prepare(panel, innovation, sign)
        self._make_room(prepared.rows.shape[0])
        self._keep_weight()
        self._master.correct(prepared.whitened, prepared.rows, sign, self._backend)
        self._pending.append(prepared.rows, sign)
        self._sketch, self._objective = prepared.sketch, prepared.step.objective
        self._edits += sign * panel.keys.shape[0]
        self._version = next(_versions)
        self.settle()  # a batch may be too large to wait
        return prepared.step

    def _begin_with(self, built: Built, *, write: bool) -> None:
        pending = Pending(built.precision_inverse, self._delay)  # what may find no memory comes first
        if write:
            self._keep_weight()
            self._master.write(built.weight)
        self._base, self._sketch, self._objective = built.precision_inverse, built.sketch, built.objective
        self._pending = pending

    def _take_up(self, saved: Saved) -> None:
        """Goes on from what another state has left, but for the weight.

        Raises:
            InputError: it is of a state of other sizes.
        """
        (d_v, d_k), device = self._original.shape, self._original.device
        shapes = [list(t.shape) for t in (saved.weight, saved.base, saved.image)]
        if shapes != [[d_v, d_k], [d_k, d_k], [d_k]] or len(saved.pending) != len(saved.signs):
            raise InputError(f"what was saved of {self._name} has the shapes {shapes}; its weight is [{d_v}, {d_k}].")
        self._base = saved.base.to(device, self._dtype, copy=True)
        self._sketch = Sketch(probe(d_k, device), saved.image.to(device, copy=True), saved.floor)
        self._objective, self._edits = saved.objective, saved.edits
        self._pending = Pending(self._base, self._delay)
        self._pending.append(saved.pending, saved.signs)

    def _keep_weight(self) -> None:
        """Copies the weight, which is about to be written, for the snapshots that were taken since it last was."""
        lacking = [snapshot for snapshot in self._snapshots if snapshot.weight is None]
        if lacking:
            kept = tuple(tensor.clone() for tensor in self._master.tensors)
            for snapshot in lacking:
                snapshot.weight = kept

    def _put_back(self, tensors: Sequence[Tensor]) -> None:
        for tensor, kept in zip(self._master.tensors, tensors, strict=True):
            tensor.copy_(kept)
        self._master.settle()

    def _rehearse(self) -> None:
        """Runs every operation on a row of zeros, so that a backend that refuses this layer does so now."""
        d_v, d_k = self._original.shape
        keys, values, one = self._base.new_zeros(1, d_k), self._base.new_zeros(1, d_v), self._base.new_ones(1)
        projected = ops.panel(self._base, keys, keys, one, backend=self._backend)
        rows, whitened, _, _ = ops.factor(projected, keys, values, one, 1, backend=self._backend)
        kept = [tensor.clone() for tensor in self._master.tensors]  # adding 0 would turn -0.0 into 0.0
        self._master.correct(whitened, rows, 1, self._backend)
        self._put_back(kept)
        ops.downdate_(self._base, rows, one, backend=self._backend)

    def _downdate(self, base: Tensor) -> None:
        ops.downdate_(base, self._pending.rows, self._pending.signs, backend=self._backend)

    def _make_room(self, rows: int) -> None:
        """Makes the buffer hold `rows` more: by a flush where that is allowed and needed, else by growing."""
        if len(self._pending) + rows > self._delay and not self._snapshots:
            self.flush()
        self._pending.reserve(rows)

    def _not_finite(self, panel: Panel) -> str:
        return (
            f"the result of the batch of {panel.keys.shape[0]} rows for {self._name} is beyond the range of "
            f"{self._dtype}. Nothing was changed; scale the keys and values down, or use float64."
        )


def dtype_of(weight: Tensor) -> torch.dtype:
    """What a state of this weight is kept in, unless something else is asked for."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _norms(whitened: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`||A^T U||_F` and `||U||_F^2` in float64 scalars, by n x n Gram matrices and not by `A^T U` itself."""
    rows, whitened = rows.double(), whitened.double()
    gram = rows @ rows.T
    return (gram * (whitened @ whitened.T)).sum().clamp_min(0).sqrt(), gram.trace()
