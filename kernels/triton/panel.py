"""`F = K C_base - (K U_p^T) D U_p` in Triton, float32, for a batch of layers. Not yet run on a GPU.

There are two launches. The first reads C and computes `F^T = C K^T` (C is symmetric), with C as the large operand of
the tensor cores. The pending rows are additional rows of that operand: `(K U_p^T)^T = U_p K^T`. The second launch sums
the parts of the first in a fixed order, without atomics, so that the result is deterministic, and subtracts the pending
correction.

The first launch has two variants:
    full       Each program has a block of rows of C and a part of the columns. It reads 4 d^2 bytes.
    triangle   Each program has a run of the lower triangle and uses each tile for its rows and, mirrored, for its
               columns. It reads 2 d^2 bytes, and writes and reads n d / 2 floats for every block of rows.

Up to `FEW` rows of keys no tensor core is used, and products and sums are plain float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rlsedit_fast.errors import InputError
from rlsedit_fast.kernels.precision import chosen
from rlsedit_fast.kernels.tables import configuration, device
from rlsedit_fast.kernels.tiles import blocks

FEW = 4
FEW_EDITS = tl.constexpr(FEW)  # for the kernels
MAX_ROWS = 128  # rows of keys per program of the first launch
FINISH_MAX_ROWS = 32  # rows of keys per program of the second launch
TRIANGLE_MAX_ROWS = 32  # with twice as many rows, the parts need as many bytes as the half of C that is saved
VARIANTS = ("full", "triangle")
WAVES = 4  # minimum number of programs per multiprocessor, for the split
MIN_STEPS = 8  # minimum number of steps per split
ALIGNMENT = 32  # floats; also the largest DEPTH of `finish_kernel`, which reads padded coefficients


@triton.jit
def key_tile(keys, keys_row, i, k, n, end):
    """Loads `K^T [k, i]`, zero from row n and column `end` on."""
    return tl.load(keys + i[None, :] * keys_row + k[:, None], mask=(i[None, :] < n) & (k[:, None] < end), other=0.0)


@triton.jit
def key_row(keys, keys_row, i, k, n, end):
    """Loads `K [i, k]` for one row i, zero if it does not exist."""
    return tl.load(keys + i * keys_row + k, mask=k < tl.where(n > i, end, 0), other=0.0)


@triton.jit(do_not_specialize=["n", "r", "base_blocks", "steps"])
def rows_kernel(
    base,  # float32 [L, d, d]
    keys,  # float32 [L, n, d]
    pending,  # float32 [L, r, d]
    parts,  # float32 [L, S, n, columns]: C K^T from column 0, U_p K^T from column `pending_column`
    base_layer,
    base_row,
    keys_layer,
    keys_row,
    pending_layer,
    pending_row,
    parts_layer,
    parts_split,
    parts_row,
    pending_column,
    d,
    n,
    r,
    base_blocks,
    steps,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    EDITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes `C K^T` and `U_p K^T` for one block of rows of C or U_p and one part of the columns."""
    block = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    edit_blocks = tl.cdiv(n, EDITS)
    layer = (tl.program_id(2) // edit_blocks).to(tl.int64)
    edits = (tl.program_id(2) % edit_blocks) * EDITS

    in_base = block < base_blocks
    rows_of = tl.where(in_base, base + layer * base_layer, pending + layer * pending_layer)
    stride = tl.where(in_base, base_row, pending_row)
    height = tl.where(in_base, d, r)
    column = tl.where(in_base, 0, pending_column)
    j = (tl.where(in_base, block, block - base_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    keys += layer * keys_layer

    lane = tl.arange(0, DEPTH).to(tl.int64)
    first = split * steps * DEPTH
    end = tl.minimum(first + steps * DEPTH, d)
    at = parts + layer * parts_layer + split * parts_split + column + j
    if EDITS > FEW_EDITS:
        i = (edits + tl.arange(0, EDITS)).to(tl.int64)
        total = tl.zeros((ROWS, EDITS), dtype=tl.float32)
        for k0 in range(first, end, DEPTH):
            k = k0 + lane
            mask = (j[:, None] < height) & (k[None, :] < end)
            tile = tl.load(rows_of + j[:, None] * stride + k[None, :], mask=mask, other=0.0)
            total = tl.dot(tile, key_tile(keys, keys_row, i, k, n, end), total, input_precision=PRECISION)
        # Rows of the parts are padded. Stores of 16 bytes need a limit divisible by 16, which `height` may not be.
        mask = (column + j[:, None] < parts_row) & (i[None, :] < n)
        tl.store(at[:, None] + i[None, :] * parts_row, total, mask=mask)
    else:
        row = tl.cast(parts_row, tl.int64)
        zero = tl.zeros((ROWS, DEPTH), dtype=tl.float32)
        total0, total1, total2, total3 = zero, zero, zero, zero
        for k0 in tl.range(first, end, DEPTH, num_stages=3):
            k = k0 + lane
            mask = (j[:, None] < height) & (k[None, :] < end)
            tile = tl.load(rows_of + j[:, None] * stride + k[None, :], mask=mask, other=0.0)
            total0 += tile * key_row(keys, keys_row, 0, k, n, end)[None, :]
            if EDITS > 1:
                total1 += tile * key_row(keys, keys_row, 1, k, n, end)[None, :]
                total2 += tile * key_row(keys, keys_row, 2, k, n, end)[None, :]
                total3 += tile * key_row(keys, keys_row, 3, k, n, end)[None, :]
        j += column
        tl.store(at, tl.sum(total0, 1), mask=j < parts_row)
        if EDITS > 1:
            tl.store(at + row, tl.sum(total1, 1), mask=j < tl.where(n > 1, parts_row, 0))
            tl.store(at + 2 * row, tl.sum(total2, 1), mask=j < tl.where(n > 2, parts_row, 0))
            tl.store(at + 3 * row, tl.sum(total3, 1), mask=j < tl.where(n > 3, parts_row, 0))


@triton.jit(do_not_specialize=["n", "runs", "steps"])
def triangle_kernel(
    base,  # float32 [L, d, d], lower triangle
    keys,  # float32 [L, n, d]
    parts,  # float32 [L, runs + blocks, n, columns]: sums for rows by run, then sums for columns by block
    base_layer,
    base_row,
    keys_layer,
    keys_row,
    parts_layer,
    parts_split,
    parts_row,
    d,
    n,
    runs,
    steps,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    EDITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes the sums of `C K^T` over one run of columns of the lower triangle of C, and their mirrored sums."""
    block = (tl.cdiv(d, ROWS) - 1 - tl.program_id(0)).to(tl.int64)  # longest first
    run = tl.program_id(1).to(tl.int64)
    edit_blocks = tl.cdiv(n, EDITS)
    layer = (tl.program_id(2) // edit_blocks).to(tl.int64)
    edits = (tl.program_id(2) % edit_blocks) * EDITS

    base += layer * base_layer
    keys += layer * keys_layer
    j = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
    lane = tl.arange(0, DEPTH).to(tl.int64)
    first = run * steps * DEPTH
    end = tl.minimum(tl.minimum(first + steps * DEPTH, (block + 1) * ROWS), d)
    own = parts + layer * parts_layer + run * parts_split + j
    others = parts + layer * parts_layer + (runs + block) * parts_split
    height = tl.where(first < end, d, 0)  # a run beyond the diagonal is empty
    if EDITS > FEW_EDITS:
        i = (edits + tl.arange(0, EDITS)).to(tl.int64)
        here = key_tile(keys, keys_row, i, j, n, d)
        total = tl.zeros((ROWS, EDITS), dtype=tl.float32)
        for k0 in range(first, end, DEPTH):
            k = k0 + lane
            tile = tl.load(
                base + j[:, None] * base_row + k[None, :], mask=(j[:, None] < d) & (k[None, :] < d), other=0.0
            )
            tile = tl.where(j[:, None] >= k[None, :], tile, 0.0)
            total = tl.dot(tile, key_tile(keys, keys_row, i, k, n, d), total, input_precision=PRECISION)
            tile = tl.trans(tl.where(j[:, None] > k[None, :], tile, 0.0))  # exclude the diagonal
            across = tl.dot(tile, here, input_precision=PRECISION)
            tl.store(others + i[None, :] * parts_row + k[:, None], across, mask=(i[None, :] < n) & (k[:, None] < end))
        tl.store(own[:, None] + i[None, :] * parts_row, total, mask=(j[:, None] < height) & (i[None, :] < n))
    else:
        here0 = key_row(keys, keys_row, 0, j, n, d)
        here1 = key_row(keys, keys_row, 1, j, n, d)
        here2 = key_row(keys, keys_row, 2, j, n, d)
        here3 = key_row(keys, keys_row, 3, j, n, d)
        row = tl.cast(parts_row, tl.int64)
        zero = tl.zeros((ROWS, DEPTH), dtype=tl.float32)
        total0, total1, total2, total3 = zero, zero, zero, zero
        for k0 in tl.range(first, end, DEPTH, num_stages=3):
            k = k0 + lane
            tile = tl.load(
                base + j[:, None] * base_row + k[None, :], mask=(j[:, None] < d) & (k[None, :] < d), other=0.0
            )
            tile = tl.where(j[:, None] >= k[None, :], tile, 0.0)
            strict = tl.where(j[:, None] > k[None, :], tile, 0.0)
            total0 += tile * key_row(keys, keys_row, 0, k, n, d)[None, :]
            tl.store(others + k, tl.sum(strict * here0[:, None], 0), mask=k < end)
            if EDITS > 1:
                total1 += tile * key_row(keys, keys_row, 1, k, n, d)[None, :]
                total2 += tile * key_row(keys, keys_row, 2, k, n, d)[None, :]
                total3 += tile * key_row(keys, keys_row, 3, k, n, d)[None, :]
                tl.store(others + row + k, tl.sum(strict * here1[:, None], 0), mask=k < tl.where(n > 1, end, 0))
                tl.store(others + 2 * row + k, tl.sum(strict * here2[:, None], 0), mask=k < tl.where(n > 2, end, 0))
                tl.store(others + 3 * row + k, tl.sum(strict * here3[:, None], 0), mask=k < tl.where(n > 3, end, 0))
        tl.store(own, tl.sum(total0, 1), mask=j < height)
        if EDITS > 1:
            tl.store(own + row, tl.sum(total1, 1), mask=j < tl.where(n > 1, height, 0))
            tl.store(own + 2 * row, tl.sum(total2, 1), mask=j < tl.where(n > 2, height, 0))
            tl.store(own + 3 * row, tl.sum(total3, 1), mask=j < tl.where(n > 3, height, 0))


@triton.jit(do_not_specialize=["n", "r", "splits", "runs", "run_columns", "triangle_blocks"])
def finish_kernel(
    parts,  # float32 [L, splits or runs + triangle_blocks, n, columns]
    coefficients,  # float32 [L, splits, n, columns]: parts of U_p K^T, padded with zeros to a multiple of DEPTH
    pending,  # float32 [L, r, d]
    signs,  # float32 [L, r]
    projected,  # float32 [L, n, d], output
    parts_layer,
    parts_split,
    parts_row,
    coefficients_layer,
    coefficients_split,
    coefficients_row,
    pending_layer,
    pending_row,
    signs_layer,
    projected_layer,
    projected_row,
    d,
    n,
    r,
    splits,
    runs,
    run_columns,
    triangle_blocks,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EDITS: tl.constexpr,
    BLOCK: tl.constexpr,  # rows per block of the triangle variant, 0 for the full variant
    PRECISION: tl.constexpr,
):
    """Adds the parts of `C K^T` and subtracts `U_p^T D U_p K^T`, for one block of columns of F."""
    edit_blocks = tl.cdiv(n, EDITS)
    layer = (tl.program_id(1) // edit_blocks).to(tl.int64)
    i = ((tl.program_id(1) % edit_blocks) * EDITS + tl.arange(0, EDITS)).to(tl.int64)
    column = tl.program_id(0) * COLUMNS
    j = (column + tl.arange(0, COLUMNS)).to(tl.int64)
    mask = (j[:, None] < d) & (i[None, :] < n)
    at = parts + layer * parts_layer + j[:, None] + i[None, :] * parts_row
    total = tl.zeros((COLUMNS, EDITS), dtype=tl.float32)
    if BLOCK == 0:
        for s in tl.range(0, splits, num_stages=3):
            total += tl.load(at + tl.cast(s, tl.int64) * parts_split, mask=mask, other=0.0)
    else:  # the runs of the rows of this block, and the column sums of this and later blocks
        block = column // BLOCK
        for s in tl.range(0, tl.cdiv(tl.minimum((block + 1) * BLOCK, d), run_columns), num_stages=3):
            total += tl.load(at + tl.cast(s, tl.int64) * parts_split, mask=mask, other=0.0)
        for s in tl.range(runs + block, runs + triangle_blocks, num_stages=3):
            total += tl.load(at + tl.cast(s, tl.int64) * parts_split, mask=mask, other=0.0)

    steps = tl.arange(0, DEPTH).to(tl.int64)
    correction = tl.zeros((COLUMNS, EDITS), dtype=tl.float32)
    for q0 in range(0, r, DEPTH):
        q = q0 + steps
        valid = (i[None, :] < n) & (q[:, None] >= 0)  # the columns are padded with zeros
        source = coefficients + layer * coefficients_layer + q[:, None] + i[None, :] * coefficients_row
        coefficient = tl.zeros((DEPTH, EDITS), dtype=tl.float32)
        for s in range(0, splits):
            coefficient += tl.load(source + tl.cast(s, tl.int64) * coefficients_split, mask=valid, other=0.0)
        coefficient *= tl.load(signs + layer * signs_layer + q, mask=q < r, other=0.0)[:, None]
        rows = pending + layer * pending_layer + j[:, None] + q[None, :] * pending_row
        u = tl.load(rows, mask=(j[:, None] < d) & (q[None, :] < r), other=0.0)
        correction = tl.dot(u, coefficient, correction, input_precision=PRECISION)
    tl.store(
        projected + layer * projected_layer + i[None, :] * projected_row + j[:, None], total - correction, mask=mask
    )


def _edits(n: int) -> int:
    """Returns the rows of keys per program: 1, `FEW`, or a power of two from 16 on, as tensor cores require."""
    if n <= FEW:
        return 1 if n == 1 else FEW
    return min(max(1 << (n - 1).bit_length(), 16), MAX_ROWS)


def _splits(d: int, settings: dict[str, Any], others: int, processors: int) -> tuple[int, int]:
    """Returns the number of parts of the columns, and the steps of `DEPTH` columns per part.

    Args:
        d: number of columns.
        settings: settings of the first launch.
        others: number of programs per part.
        processors: number of multiprocessors.
    """
    total = blocks(d, settings["DEPTH"])
    wanted = min(blocks(WAVES * processors, others), max(1, total // MIN_STEPS))
    steps = blocks(total, wanted)
    return blocks(total, steps), steps


def _aligned(columns: int) -> int:
    return blocks(columns, ALIGNMENT) * ALIGNMENT


def panel(
    base: torch.Tensor,
    keys: torch.Tensor,
    pending: torch.Tensor,
    signs: torch.Tensor,
    *,
    variant: str = "full",
    input_precision: str | None = None,
) -> torch.Tensor:
    """Computes `F = K C` for `C = C_base - U_p^T D U_p` on torch's current stream of the device.

    The only allocations are the result and a workspace of `splits` (for `triangle`: runs and blocks) times its size.
    There is no synchronization.

    Args:
        base: float32 `[L, d, d]`, symmetric, with contiguous rows.
        keys: float32 `[L, n, d]`, with contiguous rows.
        pending: float32 `[L, r, d]`, with contiguous rows; r may be 0.
        signs: float32 `[L, r]`, contiguous.
        variant: `full`, or `triangle` for up to `TRIANGLE_MAX_ROWS` rows of keys, which uses the lower triangle only.
            Their speed has not been measured.
        input_precision: see `precision.chosen`.

    Returns:
        `F [L, n, d]`, contiguous, bitwise deterministic.

    Raises:
        InputError: the variant or precision is unknown, or the variant does not support the number of rows.
    """
    if variant not in VARIANTS:
        raise InputError(f"variant={variant!r}: expected one of {', '.join(VARIANTS)}")
    precision = chosen(input_precision)
    layers, n, d = keys.shape
    r = pending.shape[1]
    if variant == "triangle" and n > TRIANGLE_MAX_ROWS:
        raise InputError(f"variant='triangle' supports at most {TRIANGLE_MAX_ROWS} rows of keys, got {n}; use 'full'")
    projected = keys.new_empty(layers, n, d)
    if n == 0:
        return projected
    capability, processors = device(base.device.index)
    edits = _edits(n)
    groups = layers * blocks(n, edits)
    settings = configuration("panel", capability, edits, precision)
    pending_blocks = blocks(_aligned(r), settings["ROWS"])
    base_blocks = blocks(d, settings["ROWS"]) if variant == "full" else 0
    splits, steps = _splits(d, settings, groups * (base_blocks or pending_blocks or 1), processors)
    pending_column = base_blocks * settings["ROWS"]
    shared = {"EDITS": edits, "PRECISION": precision}
    with torch.cuda.device_of(base):
        if r == 0 and splits == 1 and base_blocks:
            rows = projected[:, None]
        else:
            rows = keys.new_empty(layers, splits, n, pending_column + pending_blocks * settings["ROWS"])
        if base_blocks + pending_blocks:
            rows_kernel[(base_blocks + pending_blocks, splits, groups)](
                *(base, keys, pending, rows, *base.stride()[:2], *keys.stride()[:2], *pending.stride()[:2]),
                *(*rows.stride()[:3], pending_column, d, n, r, base_blocks, steps),
                **shared,
                **settings,
            )
        if rows.data_ptr() == projected.data_ptr():
            return projected
        parts, runs, run_columns, triangle_blocks, block = rows, 0, 0, 0, 0
        if variant == "triangle":
            settings = configuration("panel_triangle", capability, edits, precision)
            block = settings["ROWS"]
            triangle_blocks = blocks(d, block)
            runs, steps = _splits(d, settings, blocks(groups * triangle_blocks, 2), processors)
            run_columns = steps * settings["DEPTH"]
            parts = keys.new_empty(layers, runs + triangle_blocks, n, _aligned(d))
            triangle_kernel[(triangle_blocks, runs, groups)](
                *(base, keys, parts, *base.stride()[:2], *keys.stride()[:2], *parts.stride()[:3], d, n, runs, steps),
                **shared,
                **settings,
            )
        shared["EDITS"] = min(max(edits, 16), FINISH_MAX_ROWS)
        settings = configuration("panel_finish", capability, shared["EDITS"], precision)
        finish_kernel[(blocks(d, settings["COLUMNS"]), layers * blocks(n, shared["EDITS"]))](
            *(parts, rows[..., pending_column:], pending, signs, projected, *parts.stride()[:3], *rows.stride()[:3]),
            *(*pending.stride()[:2], signs.stride(0), *projected.stride()[:2]),
            *(d, n, r, splits, runs, run_columns, triangle_blocks),
            BLOCK=block,
            **shared,
            **settings,
        )
    return projected
