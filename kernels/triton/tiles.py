"""Tile numbering and launch sizes shared by the kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lower_tile(b):
    """Returns tile `(ti, tj)`, `tj <= ti`, of number `b = ti (ti + 1) / 2 + tj`; corrects a root that is off by one."""
    ti = ((tl.sqrt(8.0 * b.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    ti = tl.where(ti * (ti + 1) // 2 > b, ti - 1, ti)
    ti = tl.where((ti + 1) * (ti + 2) // 2 <= b, ti + 1, ti)
    return ti, b - ti * (ti + 1) // 2


def triangle(tiles: int) -> int:
    """Returns the number of tiles on and below the diagonal."""
    return tiles * (tiles + 1) // 2


def blocks(size: int, block: int) -> int:
    """Returns the number of blocks that cover `size`."""
    return -(-size // block)
