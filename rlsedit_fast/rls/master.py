"""Exact (master) weights in float32 or float64, for a model of any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rlsedit_fast import ops
from rlsedit_fast.ops.precision import full_float32
from rlsedit_fast.ops.split import SPLIT_CHUNK


class Master(Protocol):
    """Interface of an exact weight `W [d_v, d_k]` in float32 or float64."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors that store the weight; copies of all of them are a copy of the weight."""

    def read(self) -> Tensor:
        """Returns `W [d_v, d_k]`, read-only; it may be the live tensor."""

    def write(self, weight: Tensor) -> None:
        """Sets the weight to `weight [d_v, d_k]`."""

    def times(self, keys: Tensor) -> Tensor:
        """Returns `K W^T [n, d_v]`."""

    def correct(self, whitened: Tensor, rows: Tensor, sign: int, backend: str | None) -> None:
        """Computes `W <- W + sign * A^T U`."""

    def settle(self) -> None:
        """Updates the rounded copy of the weight after `tensors` were written directly."""


class Dense:
    """A weight in one tensor.

    Args:
        weight: `[d_v, d_k]`, float32 or float64, updated in place.
        rounded: tensor of another dtype that receives the rounded weight after every change, or None.
    """

    def __init__(self, weight: Tensor, rounded: Tensor | None = None) -> None:
        self._weight, self._rounded = weight, rounded

    @property
    def tensors(self) -> Sequence[Tensor]:
        """See `Master`."""
        return (self._weight,)

    def read(self) -> Tensor:
        """See `Master`."""
        return self._weight

    def write(self, weight: Tensor) -> None:
        """See `Master`."""
        self._weight.copy_(weight)
        self.settle()

    @full_float32()
    def times(self, keys: Tensor) -> Tensor:
        """See `Master`."""
        return keys @ self._weight.T

    def correct(self, whitened: Tensor, rows: Tensor, sign: int, backend: str | None) -> None:
        """See `Master`."""
        ops.correct_(self._weight, whitened, rows, sign, backend=backend)
        self.settle()

    def settle(self) -> None:
        """See `Master`."""
        if self._rounded is not None:
            self._rounded.copy_(self._weight)


class Split:
    """A float32 weight whose upper half is the bfloat16 weight of the model: two extra bytes per entry.

    Args:
        high: `[d_v, d_k]`, bfloat16, finite; updated in place.
    """

    def __init__(self, high: Tensor) -> None:
        self._high = high
        self._low = torch.zeros_like(high, dtype=torch.int16)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """See `Master`."""
        return self._high, self._low

    def read(self) -> Tensor:
        """See `Master`."""
        return ops.join(self._high, self._low)

    def write(self, weight: Tensor) -> None:
        """See `Master`."""
        for half, new in zip(self.tensors, ops.split(weight.float()), strict=True):
            half.copy_(new)

    @full_float32()
    def times(self, keys: Tensor) -> Tensor:
        """See `Master`."""
        step = max(1, SPLIT_CHUNK // self._high.shape[1])
        halves = zip(self._high.split(step), self._low.split(step), strict=True)
        parts = [keys @ ops.join(*part).T for part in halves]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def correct(self, whitened: Tensor, rows: Tensor, sign: int, backend: str | None) -> None:
        """See `Master`."""
        ops.correct_split_(self._high, self._low, whitened, rows, sign, backend=backend)

    def settle(self) -> None:
        """See `Master`."""


def master_of(weight: Tensor, dtype: torch.dtype, *, in_place: bool) -> Master:
    """Creates the master of a weight.

    In place, a weight of the requested dtype is its own master, a bfloat16 weight is the upper half of a float32
    master, and any other weight gets a separate master and is rounded from it.

    Args:
        weight: `[d_v, d_k]`, any floating dtype.
        dtype: dtype of the master, float32 or float64.
        in_place: whether `weight` itself is kept up to date; otherwise it is copied.

    Returns:
        The master.
    """
    if not in_place:
        return Dense(weight.to(dtype, copy=True, memory_format=torch.contiguous_format))
    if weight.dtype == dtype:
        return Dense(weight)
    if weight.dtype == torch.bfloat16 and dtype == torch.float32:
        return Split(weight)
    return Dense(weight.to(dtype, memory_format=torch.contiguous_format), weight)
