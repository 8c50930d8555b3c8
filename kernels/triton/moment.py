"""`M <- M + X^T X` in Triton, float32 sums of rows of any 16- or 32-bit dtype. Not yet run on a GPU.

Each tile of the lower triangle and its mirror image have one owner, as in `downdate`. Products of bfloat16 and float16
rows are exact in float32, so they use the tensor cores directly with any requested precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlsedit_fast.kernels.precision import chosen
from rlsedit_fast.kernels.tables import configuration, device, interpreted
from rlsedit_fast.kernels.tiles import blocks, lower_tile, triangle


@triton.jit(do_not_specialize=["t"])
def moment_kernel(
    moment,  # float32 [L, d, d]
    x,  # [L, t, d]
    moment_layer,
    moment_row,
    x_layer,
    x_row,
    d,
    t,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,  # Triton's interpreter multiplies 16-bit operands incorrectly
    PRECISION: tl.constexpr,
):
    """Computes `M <- M + X^T X` for one tile of the lower triangle and its mirror image."""
    ti, tj = lower_tile(tl.program_id(0))
    layer = tl.program_id(1).to(tl.int64)
    moment += layer * moment_layer
    x += layer * x_layer

    rows = (ti * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (tj * TILE + tl.arange(0, TILE)).to(tl.int64)
    steps = tl.arange(0, DEPTH).to(tl.int64)
    product = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k0 in range(0, t, DEPTH):
        k = k0 + steps
        left_mask = (rows[:, None] < d) & (k[None, :] < t)
        right_mask = (k[:, None] < t) & (columns[None, :] < d)
        left = tl.load(x + rows[:, None] + k[None, :] * x_row, mask=left_mask, other=0.0)
        right = tl.load(x + k[:, None] * x_row + columns[None, :], mask=right_mask, other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, right, product, input_precision=PRECISION)

    here = moment + rows[:, None] * moment_row + columns[None, :]
    mask = (rows[:, None] < d) & (columns[None, :] < d)
    changed = tl.load(here, mask=mask, other=0.0) + product
    changed = tl.where(rows[:, None] >= columns[None, :], changed, tl.trans(changed))
    tl.store(here, changed, mask=mask)
    mirror = moment + columns[:, None] * moment_row + rows[None, :]
    tl.store(mirror, tl.trans(changed), mask=(columns[:, None] < d) & (rows[None, :] < d))


def moment_(moment: torch.Tensor, rows: torch.Tensor, *, input_precision: str | None = None) -> None:
    """Computes `M <- M + X^T X` in place on torch's current stream of the device.

    Args:
        moment: float32 `[L, d, d]`, symmetric, with contiguous rows; only the lower triangle is read.
        rows: `X [L, t, d]`, float32, bfloat16 or float16, with contiguous rows.
        input_precision: precision for float32 rows, see `precision.chosen`.
    """
    capability, _ = device(moment.device.index)
    precision = chosen(input_precision, "moment", capability)
    layers, t, d = rows.shape
    if t == 0:
        return
    narrow = rows.element_size() == 2
    settings = configuration("moment", capability, t, precision)
    with torch.cuda.device_of(moment):
        moment_kernel[(triangle(blocks(d, settings["TILE"])), layers)](
            *(moment, rows, *moment.stride()[:2], *rows.stride()[:2], d, t),
            WIDEN=narrow and interpreted(),
            PRECISION="ieee" if narrow else precision,
            **settings,
        )
