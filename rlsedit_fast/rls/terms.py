"""The terms of the objective at the current weight, and the bounds that follow from the objective alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsedit_fast.ops.precision import full_float32
from rlsedit_fast.rls.columns import Columns
from rlsedit_fast.rls.layer import Layer
from rlsedit_fast.rls.prior import Prior
from rlsedit_fast.rls.results import Bounds, Terms

_LOST = 1e-3
"""A tracked value below this fraction of the largest one since it was measured is measured again: a difference of that
size has lost three digits."""


@dataclass(frozen=True, eq=False)
class AnchorChange:
    """`||K0 (W - W0)^T||_F^2` of a layer, tracked through changes `W += sign A^T U` of low rank.

    With `P = U M` for the moment `M = K0^T K0`, the rows since the last evaluation, and the current `D = W - W0`,

        a(D) = a(D - A^T U) + 2 <P D^T, A> - <A A^T, P U^T>

    which takes `O(d_k^2 n + n d_k d_v)` operations instead of `O(d_k^2 d_v)`. Nothing is computed before it is read.
    Products are in the dtype of the layer and sums in float64.

    Attributes:
        value: the last value; None if it is to be measured directly.
        largest: the largest value since the last direct measurement.
        steps: `(U, A, sign)` of the changes since.
    """

    value: float | None = 0.0
    largest: float = 0.0
    steps: tuple[tuple[Tensor, Tensor, int], ...] = ()

    def moved(self, rows: Tensor, whitened: Tensor, sign: int) -> AnchorChange:
        """Returns the state after a change of the weight by `sign A^T U`, for `U [n, d_k]` and `A [n, d_v]`."""
        if self.value is None:
            return self
        steps = (*self.steps, (rows, whitened, sign))
        if sum(len(rows) for rows, _, _ in steps) >= whitened.shape[1]:  # measuring it directly takes less work
            return AnchorChange(None)
        return AnchorChange(self.value, self.largest, steps)

    @full_float32()
    def evaluated(self, prior: Prior, delta: Tensor, columns: Columns) -> AnchorChange:
        """Returns the state with its value at the held columns of `delta = W - W0 [d_v, d_k]`."""
        if self.value is None:
            return _measured(prior, delta, columns)
        if not self.steps:
            return self
        rows = torch.cat([rows for rows, _, _ in self.steps])
        whitened = torch.cat([sign * whitened for _, whitened, sign in self.steps])
        images = columns.times_moment(prior, rows)
        crossed = ((images @ delta.T).double() * whitened.double()).sum()
        squared = ((images @ rows.T).double() * (whitened @ whitened.T).double()).sum()
        linear, square = columns.numbers({}, summed=(crossed, squared))
        value = self.value + 2 * linear - square
        largest = max(self.largest, value)
        return AnchorChange(value, largest) if value > _LOST * largest else _measured(prior, delta, columns)


@full_float32()
def _measured(prior: Prior, delta: Tensor, columns: Columns) -> AnchorChange:
    value = columns.measure(prior.anchor_change, delta)
    return AnchorChange(value, value)


class ObjectiveLayer(Layer):
    """A layer with an objective `J` and its terms."""

    _objective: float
    _anchor_change: AnchorChange

    @property
    def objective(self) -> float:
        """The objective `J` at the current weight, accumulated in float64; at least 0."""
        return self._objective

    def bounds(self) -> Bounds:
        """Returns bounds on the weight, the anchors and the edits (each term of `J` is at most `J`); see `terms`."""
        root, prior = math.sqrt(self._objective), self._prior
        return Bounds(
            weight=root / prior.lam if prior.lam else math.inf,
            anchors=root / prior.mu if prior.mu else math.inf,
            edits=root,
        )

    @torch.no_grad()
    def terms(self) -> Terms:
        """Returns the terms of `J` at the current weight, which `bounds` bounds.

        The change of the weight is measured; that of the anchors is tracked through the steps, see `AnchorChange`, and
        measured if a step was a rebuild. The misfit of the edits is the rest of `J`.
        """
        prior, columns, delta = self._prior, self._columns, self.weight - self._original
        moved = columns.norm(delta)
        anchored = 0.0
        if prior.custom:
            anchored = columns.measure(lambda w, d: prior.anchor_misfit(w.double(), d.double()), self._original, delta)
        elif prior.mu:
            self._anchor_change = self._anchor_change.evaluated(prior, delta, columns)
            anchored = self._anchor_change.value or 0.0
        rest = max(self._objective - (prior.lam * moved) ** 2 - prior.mu**2 * anchored, 0.0)
        return Terms(weight=moved, anchors=math.sqrt(anchored) if prior.mu else None, edits=math.sqrt(rest))
