"""One step of the recursion, computed and checked before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsedit_fast.errors import RemovalError, UpdateError
from rlsedit_fast.rls.monitor import Sketch
from rlsedit_fast.rls.results import Panel, Step

REMOVAL_PIVOT_POWER = 0.25
"""The pivots of a removal, relative to the noise, must exceed `eps` to this power. An applied edit reduces the variance
c of C in its direction to a fraction p (the pivot), with an error of about `eps c` from the subtraction. The removal
multiplies the variance by `1/p` and the error by `1/p^2`, so the relative error is `eps / p^2`; it may be at most
`sqrt(eps)`, half the digits."""


@dataclass(frozen=True, eq=False)
class PreparedStep:
    """Everything that a step writes: `W += sign * whitened^T rows`.

    Attributes:
        rows: `U [n, d_k]`.
        whitened: `A [n, d_v]`.
        sketch: sketch of C after the step.
        step: result of the step.
    """

    rows: Tensor
    whitened: Tensor
    sketch: Sketch
    step: Step


def prepare_step(
    panel: Panel,
    innovation: Tensor,
    sign: int,
    given: Mapping[str, Tensor],
    *,
    sketch: Sketch,
    objective: float,
    name: str,
    backend: str | None,
) -> PreparedStep:
    """Computes and checks a step; synchronizes with the host once.

    Args:
        panel: the batch.
        innovation: `E [n, d_v]`.
        sign: +1 for an update, -1 for a removal.
        given: arguments of the caller that are not checked yet, see `checks.batch`.
        sketch: sketch of C before the step.
        objective: `J` before the step.
        name: name of the layer, for error messages.
        backend: backend of the operations.

    Raises:
        InputError: a given argument is not finite, or a weight is not positive.
        RemovalError: the rows cannot be removed accurately.
        UpdateError: the factorization failed or the result overflows.
    """
    columns = panel.columns
    rows, whitened, lower, info = columns.factor(panel, innovation, sign, backend)
    moved = sketch.moved(panel.keys, panel.noise, sign, columns)
    image = torch.linalg.vector_norm(moved.image, torch.inf)
    pivot = (lower.diagonal().square() / panel.noise).min() if sign < 0 else info
    squared_change, gain, energy = _norms(whitened, rows)
    found = columns.numbers(given, same=(info, pivot, gain), summed=(squared_change, energy), largest=(image,))
    columns.check(found[6:], given)
    failed, smallest, gained, squared, *finite = found[:6]
    size = math.sqrt(max(squared, 0.0))  # NaN stays NaN
    dtype = panel.keys.dtype
    least = torch.finfo(dtype).eps ** REMOVAL_PIVOT_POWER
    if sign < 0 and (failed or not smallest > least):  # true for NaN
        raise RemovalError(
            f"{panel.keys.shape[0]} rows cannot be removed accurately from {name} in {dtype}: C has "
            f"lost too many digits in their directions (smallest pivot "
            f"{'not positive' if failed else format(smallest, '.1e')}, at least {least:.1e} is required). No state "
            "was modified. Call refresh(keys, values, weights) with the remaining edits."
        )
    if failed:
        raise UpdateError(
            f"the batch of {panel.keys.shape[0]} rows for {name} could not be factored: pivot {int(failed)} "
            "is not positive. No state was modified. C may have drifted; see monitor() and refresh()."
        )
    largest = torch.finfo(dtype).max
    if not all(value < largest for value in (gained, size, *finite)):  # true for NaN
        raise UpdateError(_overflow_message(panel, name))
    residual = panel.noise[:, None] * torch.linalg.solve_triangular(lower.T, whitened, upper=True)
    after = max(objective + sign * gained, 0.0)
    return PreparedStep(rows, whitened, moved, Step(residual, innovation, after, size, whitened))


def prepare_replacement(
    panel: Panel, shift: Tensor, innovation: Tensor, weights: Tensor | None, *, objective: float, name: str
) -> tuple[Tensor, Step]:
    """Computes and checks a change of the values of applied rows; synchronizes with the host once.

    Args:
        panel: the rows.
        shift: change of the values `[n, d_v]`.
        innovation: old values minus the present outputs `[n, d_v]`.
        weights: weights of the rows `[n]`; None is 1.
        objective: `J` before the step.
        name: name of the layer, for error messages.

    Returns:
        The weighted change of the values `[n, d_v]`, so that `W += change^T F`, and the result of the step.

    Raises:
        UpdateError: the result overflows.
    """
    weighted = shift if weights is None else shift * weights[:, None]
    moved = panel.gram @ weighted
    residual = innovation + shift - moved
    energy = (weighted.double() * (shift - moved + 2 * innovation).double()).sum()
    squares = _norms(weighted, panel.projected)[0]
    gained, squared = panel.columns.numbers({}, same=(energy,), summed=(squares,))
    size = math.sqrt(max(squared, 0.0))
    if not (math.isfinite(gained) and size < torch.finfo(shift.dtype).max):
        raise UpdateError(_overflow_message(panel, name))
    return weighted, Step(residual, innovation + shift, max(objective + gained, 0.0), size)


def _overflow_message(panel: Panel, name: str) -> str:
    """Returns the message of an UpdateError for a result that overflows."""
    return (
        f"the result of the batch of {panel.keys.shape[0]} rows for {name} overflows {panel.keys.dtype}. No state "
        "was modified. Scale the keys and values down, or use float64."
    )


def _norms(whitened: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `||A^T U||_F^2`, `||A||_F^2` and `||U||_F^2` as float64 scalars, from n x n Gram matrices."""
    rows, whitened = rows.double(), whitened.double()
    gram, other = rows @ rows.T, whitened @ whitened.T
    return torch.dot(gram.view(-1), other.view(-1)), other.trace(), gram.trace()
