"""The exact weight that a state keeps, however few bits the model computes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rlsedit_fast import ops
from rlsedit_fast.ops.precision import full_float32
from rlsedit_fast.ops.split import SPLIT_CHUNK


class Master(Protocol):
    """A weight `W [d_v, d_k]` in float32 or float64, and who else holds it."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Where it is kept; a copy of all of them is a copy of the weight."""

    @property
    def extra(self) -> int:
        """Bytes it takes beside the weight that was given."""

    def read(self) -> Tensor:
        """`W`: not to be written to; it may be the live one."""

    def write(self, weight: Tensor) -> None:
        """Makes `weight [d_v, d_k]` the weight."""

    def times(self, keys: Tensor) -> Tensor:
        """`K W^T [n, d_v]`."""

    def correct(self, whitened: Tensor, rows: Tensor, sign: int, backend: str | None) -> None:
        """`W <- W + sign * A^T U`."""

    def settle(self) -> None:
        """Called when `tensors` were written from outside: brings whoever else holds the weight up to date."""


class Dense:
    """A weight in one tensor.

    Args:
        weight: `[d_v, d_k]`, float32 or float64, written in place.
        rounded: a tensor in another dtype that is to hold the rounded weight after every change.
    """

    def __init__(self, weight: Tensor, rounded: Tensor | None = None, *, owned: bool = True) -> None:
        self._weight, self._rounded, self._owned = weight, rounded, owned

    @property
    def tensors(self) -> Sequence[Tensor]:
        """See `Master`."""
        return (self._weight,)

    @property
    def extra(self) -> int:
        """See `Master`."""
        return self._weight.numel() * self._weight.element_size() if self._owned else 0

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
    """A float32 weight of which the model's own bfloat16 is the upper half: two extra bytes a weight.

    Args:
        high: `[d_v, d_k]`, bfloat16, finite; written in place.
    """

    def __init__(self, high: Tensor) -> None:
        self._high = high
        self._low = torch.zeros_like(high, dtype=torch.int16)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """See `Master`."""
        return self._high, self._low

    @property
    def extra(self) -> int:
        """See `Master`."""
        return self._low.numel() * self._low.element_size()

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
        result = keys.new_empty(keys.shape[0], self._high.shape[0])
        step = max(1, SPLIT_CHUNK // self._high.shape[1])
        for start in range(0, self._high.shape[0], step):
            part = slice(start, start + step)
            result[:, part] = keys @ ops.join(self._high[part], self._low[part]).T
        return result

    def correct(self, whitened: Tensor, rows: Tensor, sign: int, backend: str | None) -> None:
        """See `Master`."""
        ops.correct_split_(self._high, self._low, whitened, rows, sign, backend=backend)

    def settle(self) -> None:
        """See `Master`."""


def master_of(weight: Tensor, dtype: torch.dtype, *, in_place: bool) -> Master:
    """The master of a given weight: a copy of it, or one that keeps the given tensor current as well.

    In place, a weight of the state's own dtype is its own master, a bfloat16 one is the upper half of a float32
    master, and any other gets a master beside it and is rounded from it.
    """
    if not in_place:
        return Dense(weight.to(dtype, copy=True, memory_format=torch.contiguous_format))
    if weight.dtype == dtype:
        return Dense(weight, owned=False)
    if weight.dtype == torch.bfloat16 and dtype == torch.float32:
        return Split(weight)
    return Dense(weight.to(dtype, memory_format=torch.contiguous_format), weight)
