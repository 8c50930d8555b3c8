"""`W <- W + sign * A^T U` in Triton, for float32 weights and split weights. Not yet run on a GPU.

Each program owns one tile of the weight and reads and writes it once, for any number of edits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rlsedit_fast.kernels.precision import chosen
from rlsedit_fast.kernels.tables import configuration, device
from rlsedit_fast.kernels.tiles import blocks


@triton.jit
def tile_product(
    whitened,
    rows,
    whitened_row,
    rows_row,
    i,
    j,
    height,
    width,
    n,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes `(A^T U)[i, j]` for a block of row indices i and column indices j."""
    product = tl.zeros((i.shape[0], j.shape[0]), dtype=tl.float32)
    steps = tl.arange(0, DEPTH).to(tl.int64)
    for k0 in range(0, n, DEPTH):
        k = k0 + steps
        a_mask = (i[:, None] < height) & (k[None, :] < n)
        u_mask = (k[:, None] < n) & (j[None, :] < width)
        a = tl.load(whitened + i[:, None] + k[None, :] * whitened_row, mask=a_mask, other=0.0)
        u = tl.load(rows + k[:, None] * rows_row + j[None, :], mask=u_mask, other=0.0)
        product = tl.dot(a, u, product, input_precision=PRECISION)
    return product


@triton.jit(do_not_specialize=["n", "sign"])
def correct_kernel(
    weight,  # float32 [L, height, width]
    whitened,  # float32 [L, n, height]
    rows,  # float32 [L, n, width]
    weight_layer,
    weight_row,
    weight_column,
    whitened_layer,
    whitened_row,
    rows_layer,
    rows_row,
    height,
    width,
    n,
    sign,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes `W <- W + sign * A^T U` for one tile `[ROWS, COLUMNS]` of one layer."""
    layer = tl.program_id(2).to(tl.int64)
    i = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    here = weight + layer * weight_layer + i[:, None] * weight_row + j[None, :] * weight_column
    mask = (i[:, None] < height) & (j[None, :] < width)
    product = tile_product(
        whitened + layer * whitened_layer,
        rows + layer * rows_layer,
        whitened_row,
        rows_row,
        i,
        j,
        height,
        width,
        n,
        DEPTH,
        PRECISION,
    )
    old = tl.load(here, mask=mask, other=0.0)
    tl.store(here, old + product * sign.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["n", "sign"])
def correct_split_kernel(
    high,  # int16 [L, height, width]: bits of the bfloat16 half
    low,  # int16 [L, height, width]
    whitened,  # float32 [L, n, height]
    rows,  # float32 [L, n, width]
    high_layer,
    high_row,
    high_column,
    low_layer,
    low_row,
    low_column,
    whitened_layer,
    whitened_row,
    rows_layer,
    rows_row,
    height,
    width,
    n,
    sign,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes `W <- W + sign * A^T U` for one tile of a split weight: joins the halves, adds, and splits again."""
    layer = tl.program_id(2).to(tl.int64)
    i = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    high += layer * high_layer + i[:, None] * high_row + j[None, :] * high_column
    low += layer * low_layer + i[:, None] * low_row + j[None, :] * low_column
    mask = (i[:, None] < height) & (j[None, :] < width)
    product = tile_product(
        whitened + layer * whitened_layer,
        rows + layer * rows_layer,
        whitened_row,
        rows_row,
        i,
        j,
        height,
        width,
        n,
        DEPTH,
        PRECISION,
    )
    upper = tl.load(high, mask=mask, other=0).to(tl.int32) << 16
    joined = (upper + tl.load(low, mask=mask, other=0).to(tl.int32)).to(tl.float32, bitcast=True)
    new = joined + product * sign.to(tl.float32)
    bits = tl.where(new == new, new.to(tl.int32, bitcast=True), 0x7FC00000)  # rounding could carry out of a NaN
    upper = (bits + 0x8000) >> 16  # ties away from zero, see `ops.split`
    tl.store(high, upper.to(tl.int16), mask=mask)
    tl.store(low, (bits - (upper << 16)).to(tl.int16), mask=mask)


def _oriented(
    weights: tuple[torch.Tensor, ...], whitened: torch.Tensor, rows: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """Transposes the product if that makes the last dimension of the weight contiguous."""
    if weights[0].stride(2) != 1 and weights[0].stride(1) == 1:
        return tuple(weight.mT for weight in weights), rows, whitened
    return weights, whitened, rows


def _settings(weight: torch.Tensor, n: int, input_precision: str | None) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Returns the grid and the settings, with the precision, for an oriented weight."""
    capability, _ = device(weight.device.index)
    precision = chosen(input_precision, "correct", capability)
    settings = configuration("correct", capability, n, precision) | {"PRECISION": precision}
    layers, height, width = weight.shape
    return (blocks(width, settings["COLUMNS"]), blocks(height, settings["ROWS"]), layers), settings


def correct_(
    weight: torch.Tensor,
    whitened: torch.Tensor,
    rows: torch.Tensor,
    sign: int,
    *,
    input_precision: str | None = None,
) -> None:
    """Computes `W <- W + sign * A^T U` in place on torch's current stream of the device.

    Args:
        weight: float32 `[L, d_v, d_k]`, of any strides; one of the last two dimensions should be contiguous.
        whitened: float32 `[L, n, d_v]`, with contiguous rows.
        rows: float32 `[L, n, d_k]`, with contiguous rows.
        sign: +1 or -1.
        input_precision: see `precision.chosen`.
    """
    n = rows.shape[1]
    if n == 0:
        return
    (weight,), whitened, rows = _oriented((weight,), whitened, rows)
    grid, settings = _settings(weight, n, input_precision)
    with torch.cuda.device_of(weight):
        correct_kernel[grid](
            *(weight, whitened, rows, *weight.stride(), *whitened.stride()[:2], *rows.stride()[:2]),
            *(*weight.shape[1:], n, sign),
            **settings,
        )


def correct_split_(
    high: torch.Tensor,
    low: torch.Tensor,
    whitened: torch.Tensor,
    rows: torch.Tensor,
    sign: int,
    *,
    input_precision: str | None = None,
) -> None:
    """Computes `W <- W + sign * A^T U` in place on a split weight, on torch's current stream of the device.

    Args:
        high: bfloat16 `[L, d_v, d_k]`, of any strides; one of the last two dimensions should be contiguous.
        low: int16 `[L, d_v, d_k]`, of any strides, preferably those of `high`.
        whitened: float32 `[L, n, d_v]`, with contiguous rows.
        rows: float32 `[L, n, d_k]`, with contiguous rows.
        sign: +1 or -1.
        input_precision: see `precision.chosen`.
    """
    n = rows.shape[1]
    if n == 0:
        return
    (high, low), whitened, rows = _oriented((high, low), whitened, rows)
    grid, settings = _settings(high, n, input_precision)
    with torch.cuda.device_of(high):
        correct_split_kernel[grid](
            *(high.view(torch.int16), low, whitened, rows, *high.stride(), *low.stride()),
            *(*whitened.stride()[:2], *rows.stride()[:2], *high.shape[1:], n, sign),
            **settings,
        )
