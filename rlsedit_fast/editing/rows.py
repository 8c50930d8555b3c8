"""Rows of edits in the least-squares problem of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

from torch import Tensor

from rlsedit_fast.editing.config import KeyRows


@dataclass(frozen=True)
class EditRows:
    """Rows of an edit in the least-squares problem of every layer, in host memory; sufficient to remove the edit.

    Attributes:
        keys: per layer `[rows, d_k]`.
        values: per layer `[rows, d_v]`.
        weight: weight of the edit; see `row_weights`.
        goal: edited hidden state that the rows aim at, `[rows, d_v]`, including what was added for the adherence or by
            a refinement; with a mean key the one of the bare prompt. None for protected rows.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    weight: float
    goal: Tensor | None = None

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.keys[0])

    def singles(self, bare_weight: float) -> list[EditRows]:
        """Returns each row alone, with its weight and without a goal; see `row_weights`."""
        weights = [self.weight * share for share in row_weights(len(self), bare_weight)]
        parts = zip(*(side.split(1) for side in (*self.keys, *self.values)), strict=True)
        layers = len(self.keys)
        return [EditRows(one[:layers], one[layers:], w) for one, w in zip(parts, weights, strict=True)]


def rows_of_contexts(per_context: Tensor, key_rows: KeyRows) -> Tensor:
    """Returns keys `[n, contexts, d]` as rows: one per context, or the mean of each edit."""
    return per_context.flatten(0, 1) if key_rows == "contexts" else per_context.mean(1)


def goals_of_contexts(per_context: Tensor, key_rows: KeyRows) -> Tensor:
    """Returns states `[n, contexts, d]` for `rows_of_contexts`; for a mean key the one of the bare prompt."""
    return per_context.flatten(0, 1) if key_rows == "contexts" else per_context[:, 0]


def row_weights(rows: int, bare_weight: float) -> list[float]:
    """Returns the weights of an edit's rows, with sum 1: the bare prompt's, and equal ones for the other contexts."""
    return [1.0] if rows == 1 else [bare_weight, *[(1 - bare_weight) / (rows - 1)] * (rows - 1)]


def aged_weight(weight: float, age: int, halve_after: int | None) -> float:
    """Returns the weight of an edit with `age` later edits; see `EditConfig.halve_after`."""
    return weight if halve_after is None else weight * 0.5 ** (age // halve_after).bit_length()


def edit_rows(
    keys: Sequence[Tensor], values: Sequence[Tensor], each: int, weights: Sequence[float], goal: Tensor | None = None
) -> list[EditRows]:
    """Splits rows `[n each, d]` per layer into those of `n` edits with the given weights."""
    sides = [
        list(zip(*(layer.cpu().unflatten(0, (-1, each)) for layer in side), strict=True)) for side in (keys, values)
    ]
    goals = repeat(None, len(weights)) if goal is None else goal.cpu().unflatten(0, (-1, each))
    return [EditRows(k, v, float(weight), g) for k, v, weight, g in zip(*sides, weights, goals, strict=True)]
