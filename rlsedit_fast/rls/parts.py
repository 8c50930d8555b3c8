"""Builds the part of a state that a process holds."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsedit_fast.rls.build import Built, Edits, build, invert_
from rlsedit_fast.rls.columns import Columns
from rlsedit_fast.rls.monitor import Sketch, probe
from rlsedit_fast.rls.prior import Prior
from rlsedit_fast.rls.sharded import ShardedColumns


def build_part(
    original: Tensor, prior: Prior, edits: Edits | None, columns: Columns, *, dtype: torch.dtype, name: str
) -> Built:
    """Computes the held part of `build`: the first process builds the state and sends each process its part.

    Args:
        original: the held columns of `W0`, `[d_v, w]`.
        prior: prior of the layer, the same in every process.
        edits: edits to apply, with the held columns of their keys; or None.
        columns: the held columns.
        dtype: see `build`.
        name: see `build`.

    Returns:
        `C[I, :]` and `W[:, I]` of the held columns I, the objective, and the held part of the sketch.

    Raises:
        PriorError: see `build`; in every process.
    """
    if not isinstance(columns, ShardedColumns) or columns.ranks == 1:
        return build(original, prior, edits, dtype=dtype, name=name)
    (d_v, held), device = original.shape, original.device
    d_k = columns.width(held)
    solved = prior.custom or edits is not None  # otherwise only the shape of the weight matters
    whole = columns.collect(original, "start") if solved else original[:1, :1].expand(d_v, d_k)
    keys = None if edits is None else columns.collect(edits.keys, "start")

    def attempt() -> Built | None:
        if not columns.builds:
            return None
        assert whole is not None
        given = None if edits is None or keys is None else Edits(keys, edits.values, edits.weights)
        return build(whole, prior, given, dtype=dtype, name=name)

    built = columns.agree(attempt)
    inverse, weight, image, objective, floor = None, None, None, 0.0, 0.0
    if built is not None:
        inverse, weight, image = built.precision_inverse, built.weight, built.sketch.image
        objective, floor = built.objective, built.sketch.floor
    part = columns.distribute(inverse, original.new_empty(held, d_k, dtype=dtype), 0)
    moved = columns.distribute(weight, original.new_empty(d_v, held, dtype=dtype), 1) if solved else original
    sketched = columns.distribute(image, original.new_empty(held, dtype=torch.float64), 0)
    objective, floor = columns.share(objective, floor)
    return Built(part, moved, objective, Sketch(columns.cut(probe(d_k, device)), sketched, floor))


def prior_inverse(like: Tensor, prior: Prior, columns: Columns, *, name: str) -> Tensor:
    """Returns the held columns of `C0`, the inverse of the prior's precision, `[d_k, w]` in the dtype of `like`.

    Args:
        like: a tensor `[n, w]`.
        prior: the prior.
        columns: the held columns.
        name: name of the layer, for error messages.

    Raises:
        PriorError: the precision is not positive definite; in every process.
    """
    d_k = columns.width(like.shape[1])

    def attempt() -> Tensor | None:
        if not columns.builds:
            return None
        return invert_(prior.precision(d_k, like.device), prior.lam, prior.mu, dtype=like.dtype, name=name)

    whole = columns.agree(attempt)
    if isinstance(columns, ShardedColumns):
        return columns.distribute(whole, like.new_empty(like.shape[1], d_k), 0).T
    assert whole is not None
    return whole
