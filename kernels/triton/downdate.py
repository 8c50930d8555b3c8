"""`C_base <- C_base - U_p^T D U_p` in Triton, float32. No GPU has run this yet.

Each program owns one square tile of the lower triangle and that tile's mirror image, so every element has one writer
and the result is exactly symmetric.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
import triton
import triton.language as tl

PRECISIONS = ("tf32x3", "ieee")  # plain tf32 loses positive definiteness


@triton.jit
def downdate_kernel(
    base,  # float32 [d, d]
    pending,  # float32 [r, d]
    signs,  # float32 [r]
    base_stride,
    pending_stride,
    d,
    r,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Program b is tile (ti, tj), tj <= ti, b = ti (ti + 1) / 2 + tj; the root may be off by one in floating point.
    b = tl.program_id(0)
    ti = ((tl.sqrt(8.0 * b.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    ti = tl.where(ti * (ti + 1) // 2 > b, ti - 1, ti)
    ti = tl.where((ti + 1) * (ti + 2) // 2 <= b, ti + 1, ti)
    tj = b - ti * (ti + 1) // 2

    rows = (ti * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (tj * TILE + tl.arange(0, TILE)).to(tl.int64)
    steps = tl.arange(0, DEPTH).to(tl.int64)
    product = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k0 in range(0, r, DEPTH):
        k = k0 + steps
        left_mask = (k[:, None] < r) & (rows[None, :] < d)
        right_mask = (k[:, None] < r) & (columns[None, :] < d)
        sign = tl.load(signs + k, mask=k < r, other=0.0)
        left = tl.load(pending + k[:, None] * pending_stride + rows[None, :], mask=left_mask, other=0.0)
        right = tl.load(pending + k[:, None] * pending_stride + columns[None, :], mask=right_mask, other=0.0)
        # [TILE, DEPTH] @ [DEPTH, TILE]
        product = tl.dot(tl.trans(left * sign[:, None]), right, product, input_precision=PRECISION)

    here = base + rows[:, None] * base_stride + columns[None, :]
    mask = (rows[:, None] < d) & (columns[None, :] < d)
    changed = tl.load(here, mask=mask, other=0.0) - product
    # A tile on the diagonal takes its upper half from its lower one; elsewhere rows lie below columns throughout.
    changed = tl.where(rows[:, None] >= columns[None, :], changed, tl.trans(changed))
    tl.store(here, changed, mask=mask)
    mirror = base + columns[:, None] * base_stride + rows[None, :]
    tl.store(mirror, tl.trans(changed), mask=(columns[:, None] < d) & (rows[None, :] < d))


@cache
def configurations() -> dict[str, dict[str, int]]:
    """The shipped table: `default`, and what a compute capability (`sm_80`) needs instead."""
    table = json.loads(Path(__file__).with_name("downdate.json").read_text())
    return {name: dict(entry) for name, entry in table.items()}


def downdate_(base: torch.Tensor, pending: torch.Tensor, signs: torch.Tensor, input_precision: str = "tf32x3") -> None:
    """Launches the kernel on torch's current stream of the tensors' device.

    Args:
        base: float32 `[d, d]`, symmetric, with contiguous rows.
        pending: float32 `[r, d]`, with contiguous rows.
        signs: float32 `[r]`, contiguous.
        input_precision: one of `PRECISIONS`.
    """
    key = "default"
    if base.is_cuda:
        key = "sm_{}{}".format(*torch.cuda.get_device_capability(base.device))
    table = configurations()
    config = table.get(key, table["default"])
    d, r = base.shape[0], pending.shape[0]
    tiles = triton.cdiv(d, config["TILE"])
    with torch.cuda.device_of(base):
        downdate_kernel[(tiles * (tiles + 1) // 2,)](
            *(base, pending, signs, base.stride(0), pending.stride(0), d, r), PRECISION=input_precision, **config
        )
