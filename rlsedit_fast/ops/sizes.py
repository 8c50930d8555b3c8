"""Size classes of operations, and problems of a given size to check and time a backend on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.ops.split import split

Problem = tuple[tuple[Tensor, ...], tuple[int, ...]]
"""Tensors and scalars of an operation."""

_WIDTHS = [round(2 ** (step / 2)) for step in range(41)]  # up to 2^20
_ROWS = [2**step for step in range(31)]
_NAMES = {
    "panel": ("d", "n"),
    "factor": ("d_k", "d_v", "n"),
    "downdate_": ("d", "r"),
    "correct_": ("d_v", "d_k", "n"),
    "correct_split_": ("d_v", "d_k", "n"),
    "moment_": ("d", "t"),
}
PENDING = 256  # pending rows of a timed panel, half of the default delay


@dataclass(frozen=True)
class SizeClass:
    """Sizes of an operation, rounded up: widths to a power of the square root of 2, rows to a power of 2.

    Attributes:
        op: name of the operation.
        widths: d_k or d; d_v and d_k; or d_k and d_v (in the order of the arguments).
        rows: edits, pending rows or tokens.
        dtype: dtype of the rows of `moment_`, else float32.
    """

    op: str
    widths: tuple[int, ...]
    rows: int
    dtype: torch.dtype = torch.float32

    @property
    def key(self) -> str:
        """The class as text, such as `panel d=4096 n=16`; unique."""
        sizes = " ".join(
            f"{name}={size}" for name, size in zip(_NAMES[self.op], (*self.widths, self.rows), strict=True)
        )
        return f"{self.op} {sizes}" + (f" {str(self.dtype)[6:]}" if self.op == "moment_" else "")

    def rounded(self) -> SizeClass:
        """Returns the class of these sizes."""
        return SizeClass(
            self.op, tuple(_up(_WIDTHS, width) for width in self.widths), _up(_ROWS, self.rows), self.dtype
        )

    @classmethod
    def parse(cls, key: str) -> SizeClass:
        """Returns the class of a key.

        Raises:
            ValueError: the text is not a key.
        """
        op, *parts = key.split()
        *widths, rows = (int(part.partition("=")[2]) for part in parts if "=" in part)
        size = cls(op, tuple(widths), rows, getattr(torch, parts[-1]) if op == "moment_" else torch.float32)
        if op not in _NAMES or size.key != key:
            raise ValueError(f"{key!r} is not a size class")
        return size

    @property
    def numbers(self) -> int:
        """Number of entries of the largest operand."""
        return self.widths[0] * max(self.rows, 0 if self.op == "factor" else self.widths[-1])

    @property
    def work(self) -> int:
        """Approximate number of multiply-adds."""
        if self.op == "factor":
            return self.rows**2 * sum(self.widths)
        return self.widths[0] * self.widths[-1] * self.rows

    def within(self, width: int, work: int) -> SizeClass:
        """Returns the class with widths of at most `width`, reduced further to at most `work` multiply-adds."""
        widths = [min(each, width) for each in self.widths]
        smaller = SizeClass(self.op, tuple(widths), self.rows, self.dtype)
        if smaller.work <= work:
            return smaller
        factor = work / smaller.work if self.op == "factor" else (work / smaller.work) ** 0.5
        widths = [max(64, int(each * factor) // 16 * 16) for each in widths]
        return SizeClass(self.op, tuple(widths), self.rows, self.dtype)


def size_class(op: str, tensors: Sequence[Tensor]) -> SizeClass:
    """Returns the class of an operation on tensors with or without layers."""
    shapes = [tensor.shape for tensor in tensors]
    widths: tuple[int, ...]
    if op in ("correct_", "correct_split_"):
        widths, rows = tuple(shapes[0][-2:]), shapes[-1][-2]
    elif op == "factor":
        widths, rows = (shapes[0][-1], shapes[2][-1]), shapes[0][-2]
    else:
        widths, rows = (shapes[0][-1],), shapes[1][-2]
    dtype = tensors[1].dtype if op == "moment_" else torch.float32
    return SizeClass(op, widths, rows, dtype).rounded()


def _up(ladder: Sequence[int], size: int) -> int:
    return ladder[min(bisect_left(ladder, size), len(ladder) - 1)]


def problem(size: SizeClass, device: torch.device, *, pending: int = PENDING, symmetric: bool = False) -> Problem:
    """Returns operands of exactly these sizes, the same in every run; in-place operations keep them bounded.

    Args:
        size: the operation and its sizes.
        device: where the tensors are.
        pending: pending rows of `panel`.
        symmetric: whether `C` is a full symmetric matrix, in place of a constant plus the identity, which is faster.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, dtype=torch.float32, device=device, generator=generator).mul_(scale)

    def square(d: int) -> Tensor:
        if not symmetric:
            return torch.full((d, d), 1e-3, dtype=torch.float32, device=device).fill_diagonal_(1)
        rows = random(d, d, scale=d**-0.5)
        return rows @ rows.T

    op, rows, (first, *others) = size.op, size.rows, size.widths
    if op == "panel":
        return (square(first), random(rows, first), random(pending, first, scale=1e-2), _signs(pending, device)), ()
    if op == "factor":
        keys = random(rows, first, scale=first**-0.5)
        return (keys, keys.clone(), random(rows, others[0]), _signs(rows, device).abs()), (1,)
    if op == "downdate_":
        return (square(first), random(rows, first, scale=1e-3), _signs(rows, device)), ()
    if op == "moment_":
        return (square(first), random(rows, first, scale=1e-2).to(size.dtype)), ()
    weight, whitened, rows_ = random(first, others[0]), random(rows, first, scale=1e-3), random(rows, others[0])
    return ((*split(weight), whitened, rows_) if op == "correct_split_" else (weight, whitened, rows_)), (1,)


def _signs(rows: int, device: torch.device) -> Tensor:
    """Returns signs of both kinds."""
    return 1 - 2 * (torch.arange(rows, device=device) % 3 == 1).float()


def copies(given: Problem) -> tuple[Any, ...]:
    """Returns the arguments of a problem with copied tensors."""
    tensors, scalars = given
    return (*(tensor.clone() for tensor in tensors), *scalars)
