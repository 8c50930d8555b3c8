"""Computes a state from scratch in float64, from the prior and the applied edits. Used at the start and by refresh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, PriorError
from rlsedit_fast.ops import moment_
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.monitor import Sketch
from rlsedit_fast.rls.prior import CHUNK, Prior, parts

MIN_BLOCK = 256
"""Minimum block size of the factorization and the inverse; a block is at least a sixteenth of the columns. Working in
blocks needs no second float64 matrix, at 0.7 times the speed of the two library calls for d = 512 and 1.25 times for
d = 4096 (bench/results/state-build.json)."""


@dataclass(frozen=True)
class Edits:
    """A batch of edits in the solver's dtype.

    Attributes:
        keys: `K [n, d_k]`; n may be 0.
        values: `V [n, d_v]`.
        weights: `w [n]`.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields keys, values and weights in float64, one chunk of rows at a time."""
        for rows in parts(self.keys.shape[0], CHUNK):
            yield self.keys[rows].double(), self.values[rows].double(), self.weights[rows].double()


@dataclass(frozen=True)
class Built:
    """Result of `build`.

    Attributes:
        precision_inverse: `C [d_k, d_k]` in the solver's dtype.
        weight: `W [d_v, d_k]`.
        objective: `J` at that weight.
        sketch: sketch of `S` for the monitor.
    """

    precision_inverse: Tensor
    weight: Tensor
    objective: float
    sketch: Sketch


def build(original: Tensor, prior: Prior, edits: Edits | None, *, dtype: torch.dtype, name: str) -> Built:
    """Computes the minimizer and its precision inverse in float64 from the normal equations in delta form.

    `S = S0 + K^T w K` and `W - W0 = [mu^2 (V0 - K0 W0^T)^T K0 + (V - K W0^T)^T w K] S^{-1}`, with one Cholesky
    factorization. Memory: one float64 matrix `[d_k, d_k]`, C, and chunks of rows.

    Args:
        original: `W0 [d_v, d_k]`, any floating dtype.
        prior: prior of the layer.
        edits: edits to apply, or None.
        dtype: dtype of `C`, and of `W` unless `W` is the original.
        name: name of the layer, for error messages.

    Returns:
        The weight, the precision inverse, the objective and the sketch.

    Raises:
        PriorError: `S` is not positive definite in float64, or its inverse overflows `dtype`.
    """
    precision = prior.precision(original.shape[1], original.device)
    weight, objective, pull = original, 0.0, None
    if prior.custom or edits is not None:
        start = original.double()
        pull = prior.pull(start)
    if edits is not None:
        pull = torch.zeros_like(start) if pull is None else pull
        for keys, values, weights in edits.chunks():
            moment_(precision, keys * weights.sqrt()[:, None], backend="auto")
            pull.addmm_(((values - keys @ start.T) * weights[:, None]).T, keys)
    sketch = Sketch.of(precision)
    lower = _factor_(precision, prior.lam, prior.mu, name)
    if pull is not None:
        half = torch.linalg.solve_triangular(lower, pull.T, upper=False)
        delta = torch.linalg.solve_triangular(lower.T, half, upper=True).T
        total = start + delta
        objective, weight = prior.energy(start, delta) + _misfit(total, edits), total.to(dtype)
    inverse = _inverse_(lower, dtype)
    del precision, lower  # one storage, the largest one
    try:
        checks.finite(precision_inverse=inverse, weight=weight)
    except InputError as error:
        raise PriorError(
            f"the precision of {name} (lam={prior.lam:g}, mu={prior.mu:g}) has an inverse or a weight that overflows "
            f"{dtype}. Increase lam or mu, or use float64."
        ) from error
    return Built(inverse, weight, objective, sketch.settled(inverse))


def _misfit(weight: Tensor, edits: Edits | None) -> float:
    """Returns `sum_i w_i ||K_i W^T - V_i||^2` in float64."""
    if edits is None:
        return 0.0
    return sum(float(((v - k @ weight.T).square().sum(1) * w).sum()) for k, v, w in edits.chunks())


def _blocks(size: int) -> list[slice]:
    return parts(size, max(MIN_BLOCK, -(-size // 16)))


def invert_(precision: Tensor, lam: float, mu: float, *, dtype: torch.dtype, name: str) -> Tensor:
    """Returns the inverse of a precision in `dtype`, exactly symmetric; overwrites `precision [d_k, d_k]`, float64.

    Args:
        precision: the precision.
        lam: for error messages.
        mu: for error messages.
        dtype: dtype of the inverse.
        name: name of the layer, for error messages.

    Raises:
        PriorError: the precision is not positive definite.
    """
    return _inverse_(_factor_(precision, lam, mu, name), dtype)


def _factor_(precision: Tensor, lam: float, mu: float, name: str) -> Tensor:
    """Overwrites the lower triangle of `S` with its Cholesky factor, block column by block column.

    The blocks above the diagonal keep the entries of `S`. A pivot at the rounding level counts as not positive.

    Args:
        precision: `S [d_k, d_k]`, float64.
        lam: for error messages.
        mu: for error messages.
        name: name of the layer, for error messages.

    Returns:
        `precision`.

    Raises:
        PriorError: `S` is not positive definite.
    """
    diagonal = precision.diagonal().clone()
    index, pivot, floor = 0, math.inf, 0.0
    for j in _blocks(precision.shape[0]):
        precision[j.start :, j].sub_(precision[j.start :, : j.start] @ precision[j, : j.start].T)
        lower, info = torch.linalg.cholesky_ex(precision[j, j])
        if failed := int(info):
            index, pivot, floor = j.start + failed - 1, _failed_pivot(precision[j, j], failed - 1), math.inf
            break
        precision[j, j] = lower
        below = precision[j.stop :, j]
        precision[j.stop :, j] = torch.linalg.solve_triangular(lower.T, below, upper=True, left=False)
    else:
        # The rounding error of a pivot is relative to its diagonal entry, for any scale of the feature.
        pivots = precision.diagonal().square()
        index = int((pivots / diagonal).argmin())
        pivot = float(pivots[index])
        floor = precision.shape[0] * torch.finfo(torch.float64).eps * float(diagonal[index])
    if pivot > floor:
        return precision
    raise PriorError(
        f"the precision of {name} is not positive definite: lam={lam:g}, mu={mu:g}, smallest pivot "
        f"{pivot:g} at feature {index}. The anchors do not span every direction: increase lam"
        f"{' above 0' if lam == 0 else ''} or pass more anchors."
    )


def _inverse_(lower: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes `(L L^T)^-1` in float64 and returns it in `dtype`, exactly symmetric; overwrites `lower` with `L^-1`.

    Works on the blocks of the lower triangle: first `X = L^-1` in place, from the last columns to the first, then
    `X^T X`.
    """
    size, blocks = lower.shape[0], _blocks(lower.shape[0])
    for at, j in reversed(list(enumerate(blocks))):
        unit = torch.eye(j.stop - j.start, dtype=lower.dtype, device=lower.device)
        diagonal = torch.linalg.solve_triangular(lower[j, j], unit, upper=False)
        below = lower[j.stop :, j] @ diagonal
        for i in blocks[at + 1 :]:
            lower[i, j] = -(lower[i, j.stop : i.stop] @ below[: i.stop - j.stop])
        lower[j, j] = diagonal
    inverse = lower.new_empty(size, size, dtype=dtype)
    for at, j in enumerate(blocks):
        for i in blocks[at:]:
            part = lower[i.start :, i].T @ lower[i.start :, j]
            part = 0.5 * (part + part.T) if i is j else part  # not bitwise symmetric otherwise
            inverse[i, j] = part
            inverse[j, i] = part.T
    return inverse


def _failed_pivot(precision: Tensor, index: int) -> float:
    """Recomputes the pivot at which the factorization stopped (LAPACK leaves it undefined)."""
    if index == 0:
        return float(precision[0, 0])
    lower, info = torch.linalg.cholesky_ex(precision[:index, :index])
    if int(info):  # with other blocks it can stop earlier, at a pivot of the size of rounding errors
        return 0.0
    column = torch.linalg.solve_triangular(lower, precision[:index, index : index + 1], upper=False)
    return float(precision[index, index] - column.square().sum())
