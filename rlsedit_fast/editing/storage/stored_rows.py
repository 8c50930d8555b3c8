"""How rows of edits are stored: one tensor per layer and side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlsedit_fast.editing.rows import EditRows
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.rls.layer import dtype_of
from rlsedit_fast.rls.rounding import packed, unpacked


def encode_rows(edits: Sequence[EditRows], prefix: str, *, half: bool = False) -> dict[str, Tensor]:
    """Returns the rows of edits, concatenated, as one tensor per layer and side, and their goals.

    Args:
        edits: rows of the edits.
        prefix: prefix of the tensor names.
        half: pack the rows as float16, see `rls.rounding`.
    """
    goals = [rows.goal for rows in edits if rows.goal is not None]
    tensors: dict[str, Tensor] = {f"{prefix}goals": torch.cat(goals)} if goals else {}
    for side in ("keys", "values") if edits else ():
        for at in range(len(getattr(edits[0], side))):
            name, whole = f"{prefix}{side}.{at}", torch.cat([getattr(rows, side)[at] for rows in edits])
            if half:
                tensors[name], tensors[f"{name}.exponents"] = packed(whole)
            else:
                tensors[name] = whole
    return tensors


def decode_rows(
    tensors: Mapping[str, Tensor],
    prefix: str,
    weights: Sequence[float],
    counts: Sequence[int],
    projections: Sequence[Projection],
) -> list[EditRows]:
    """Returns the rows that `encode_rows` encoded.

    Args:
        tensors: the encoded tensors.
        prefix: prefix of their names.
        weights: weight of each edit.
        counts: number of rows of each edit.
        projections: the edited projections.
    """
    if not weights:
        return []
    sides = []
    for side in ("keys", "values"):
        each = [
            _decoded(tensors, f"{prefix}{side}.{at}", projection).split(list(counts))
            for at, projection in enumerate(projections)
        ]
        sides.append(list(zip(*each, strict=True)))
    goals = tensors[f"{prefix}goals"].split(list(counts)) if f"{prefix}goals" in tensors else [None] * len(weights)
    return [EditRows(k, v, weight, g) for k, v, weight, g in zip(*sides, weights, goals, strict=True)]


def decode_revision(
    tensors: Mapping[str, Tensor], rows: Sequence[EditRows], projections: Sequence[Projection]
) -> list[EditRows]:
    """Returns rows with the values in the last layer and the goals of a stored revision."""
    counts = [len(one) for one in rows]
    values = _decoded(tensors, "values.0", projections[-1])
    revised = zip(rows, values.split(counts), tensors["goals"].split(counts), strict=True)
    return [replace(one, values=(*one.values[:-1], value), goal=goal) for one, value, goal in revised]


def _decoded(tensors: Mapping[str, Tensor], name: str, projection: Projection) -> Tensor:
    rows = tensors[name]
    if f"{name}.exponents" in tensors:
        rows = unpacked(rows, tensors[f"{name}.exponents"], dtype_of(projection.blocks[0]))
    return rows
