"""`C_base <- C_base - U_p^T D U_p` in Triton, float32, for a batch of layers. Not yet run on a GPU.

Each program owns one square tile of the lower triangle and its mirror image, so every element has one writer and the
result is exactly symmetric.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_fast.kernels.precision import chosen
from rlsedit_fast.kernels.tables import configuration, device
from rlsedit_fast.kernels.tiles import blocks, lower_tile, triangle


@triton.jit(do_not_specialize=["r"])
def downdate_kernel(
    base,  # float32 [L, d, d]
    pending,  # float32 [L, r, d]
    signs,  # float32 [L, r]
    base_layer,
    base_row,
    pending_layer,
    pending_row,
    signs_layer,
    d,
    r,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes `C_base <- C_base - U_p^T D U_p` for one tile of the lower triangle and its mirror image."""
    ti, tj = lower_tile(tl.program_id(0))
    layer = tl.program_id(1).to(tl.int64)
    base += layer * base_layer
    pending += layer * pending_layer
    signs += layer * signs_layer

    rows = (ti * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (tj * TILE + tl.arange(0, TILE)).to(tl.int64)
    steps = tl.arange(0, DEPTH).to(tl.int64)
    product = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k0 in range(0, r, DEPTH):
        k = k0 + steps
        # Loaded as [TILE, DEPTH]; a transposed tile would be copied 4 bytes at a time instead of 16.
        left_mask = (rows[:, None] < d) & (k[None, :] < r)
        right_mask = (k[:, None] < r) & (columns[None, :] < d)
        sign = tl.load(signs + k, mask=k < r, other=0.0)
        left = tl.load(pending + rows[:, None] + k[None, :] * pending_row, mask=left_mask, other=0.0)
        right = tl.load(pending + k[:, None] * pending_row + columns[None, :], mask=right_mask, other=0.0)
        product = tl.dot(left * sign[None, :], right, product, input_precision=PRECISION)

    here = base + rows[:, None] * base_row + columns[None, :]
    mask = (rows[:, None] < d) & (columns[None, :] < d)
    changed = tl.load(here, mask=mask, other=0.0) - product
    # A diagonal tile copies its lower half to its upper half; other tiles are below the diagonal.
    changed = tl.where(rows[:, None] >= columns[None, :], changed, tl.trans(changed))
    tl.store(here, changed, mask=mask)
    mirror = base + columns[:, None] * base_row + rows[None, :]
    tl.store(mirror, tl.trans(changed), mask=(columns[:, None] < d) & (rows[None, :] < d))


def downdate_(
    base: torch.Tensor, pending: torch.Tensor, signs: torch.Tensor, *, input_precision: str | None = None
) -> None:
    """Computes `C_base <- C_base - U_p^T D U_p` in place on torch's current stream of the device.

    Args:
        base: float32 `[L, d, d]`, symmetric, with contiguous rows; only the lower triangle is read.
        pending: float32 `[L, r, d]`, with contiguous rows.
        signs: float32 `[L, r]`, contiguous.
        input_precision: see `precision.chosen`.
    """
    capability, _ = device(base.device.index)
    precision = chosen(input_precision, "downdate", capability)
    layers, r, d = pending.shape
    if r == 0:
        return
    settings = configuration("downdate", capability, r, precision)
    with torch.cuda.device_of(base):
        downdate_kernel[(triangle(blocks(d, settings["TILE"])), layers)](
            *(base, pending, signs, *base.stride()[:2], *pending.stride()[:2], signs.stride(0), d, r),
            PRECISION=precision,
            **settings,
        )
