"""Launch plans of the `cuda` backend: kernels, grids, shared memory and arguments, in order.

The prebuilt library and the kernels compiled at run time (`cuda_launch`) use the same plans, which are in Python so
that they can be tested without a GPU. Nothing here allocates: the caller allocates workspaces of the given shapes. Tile
and block sizes match csrc/cuda.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

FLOAT = 4  # bytes
MAX_EDITS = 16384  # the tiles of Sig use one grid dimension of at most 65535 blocks
MAX_LAYERS = 65535

# product.cuh: tiles of 64 H x 64 H entries, slabs of 16 / H summands with rows of 64 H + 4 floats.
PRODUCT_THREADS = 256
GRAM_TILE = 64
GRAM_DEPTH = 16
GRAM_SHARED = 4 * GRAM_DEPTH * (GRAM_TILE + 4)  # floats: four slabs
TILE = 128
TILE_SHARED = 4 * 8 * (TILE + 4)  # floats: two buffers of two slabs
MIRROR_SHARED = 64 * 65  # floats: a quadrant of a tile

# gram.cuh
WARP = 32  # also the entries of Sig that one block sums
MAX_WARPS = 32
TARGET_BLOCKS = 264  # two per multiprocessor of a Hopper GPU; fixed, so that every device sums in the same order
MIN_COLUMNS = 64  # columns of F and K per block

# factor.cuh
FACTOR_EDITS = 128
FACTOR_THREADS = 128
CHUNK = 32

# panel.cuh
MAX_PANEL_EDITS = 8
PANEL_THREADS = 256
STRIP = 128  # rows of a tile of C
PANEL_COLUMNS = 8 * 64  # columns per block, in tiles of 64


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: name in csrc/cuda without the prefix `rlsedit_`.
        grid: number of blocks in x, y and z.
        threads: threads per block, in x.
        shared: dynamic shared memory in bytes.
        arguments: tensors (passed as pointers), ints (as int64) and floats (as float32).
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[Tensor | int | float, ...]


def blocks(size: int, width: int) -> int:
    """Returns the number of blocks of `width` that cover `size`."""
    return -(-size // width)


def triangle(tiles: int) -> int:
    """Returns the number of tiles on and above the diagonal of a `tiles` x `tiles` grid."""
    return tiles * (tiles + 1) // 2


def gram_splits(layers: int, n: int, d: int) -> tuple[int, int]:
    """Returns `(splits, columns)`: the number of parts of the sum over `d` columns, and the columns per part."""
    wanted = max(1, TARGET_BLOCKS // (layers * triangle(blocks(n, GRAM_TILE))))
    columns = max(blocks(d, wanted), MIN_COLUMNS)
    columns = blocks(columns, GRAM_DEPTH) * GRAM_DEPTH
    return blocks(d, columns), columns


def factor_workspace(layers: int, n: int, d_k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of the float32 workspaces of `factor`: the partial sums of Sig, and Sig."""
    return (layers, gram_splits(layers, n, d_k)[0], n, n), (layers, n, n)


def factor_shared(size: int) -> int:
    """Returns the shared memory in bytes for a panel of `size` edits: a flag, the inverse diagonal, the factor."""
    padded = blocks(size, CHUNK) * CHUNK
    return FLOAT * (4 + padded + padded * (padded + 4))


def factor(
    projected: Tensor,
    keys: Tensor,
    innovation: Tensor,
    noise: Tensor,
    sign: int,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    workspace: tuple[Tensor, Tensor],
) -> list[Launch]:
    """Plans `reference.factor` for a batch of layers: three launches, plus two per further `FACTOR_EDITS` edits.

    Args:
        projected: `F [layers, n, d_k]`; all operands are contiguous and float32.
        keys: `K [layers, n, d_k]`.
        innovation: `E [layers, n, d_v]`.
        noise: `[layers, n]`.
        sign: +1 or -1.
        outputs: `U` and `A` in the shapes of `projected` and `innovation`, `L [layers, n, n]`, and `info [layers]`,
            int32.
        workspace: tensors with the shapes that `factor_workspace` returns.

    Returns:
        The launches, in order.
    """
    layers, n, d_k = projected.shape
    d_v = innovation.shape[2]
    u, a, lower, info = outputs
    partial, sigma = workspace
    splits, columns = gram_splits(layers, n, d_k)
    warps = min(splits, MAX_WARPS)
    launches = [
        Launch(
            "gram",
            (splits, triangle(blocks(n, GRAM_TILE)), layers),
            PRODUCT_THREADS,
            FLOAT * GRAM_SHARED,
            (projected, keys, partial, n, d_k, columns),
        ),
        Launch(
            "sigma",
            (blocks(n * n, WARP), layers, 1),
            WARP * warps,
            FLOAT * warps * (WARP + 1),
            (partial, noise, sigma, n, splits, float(sign)),
        ),
    ]
    for first in range(0, n, FACTOR_EDITS):
        size = min(FACTOR_EDITS, n - first)
        rest = n - first - size
        rights = (projected, innovation) if first == 0 else (u, a)
        wide = sum(blocks(width, FACTOR_THREADS) for width in (rest, d_k, d_v))
        launches.append(
            Launch(
                "factor",
                (wide, layers, 1),
                FACTOR_THREADS,
                factor_shared(size),
                (sigma, *rights, u, a, lower, info, n, first, d_k, d_v),
            )
        )
        if rest:
            wide = sum(blocks(width, TILE) for width in (rest, d_k, d_v))
            launches.append(
                Launch(
                    "update",
                    (wide, blocks(rest, TILE), layers),
                    PRODUCT_THREADS,
                    FLOAT * TILE_SHARED,
                    (sigma, *rights, u, a, n, first, d_k, d_v),
                )
            )
    return launches


def panel_workspace(layers: int, n: int, d: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of the float32 workspaces of `panel`: partial sums by strip and by chunk of columns."""
    rows = 4 if n <= 4 else MAX_PANEL_EDITS
    return (layers, blocks(d, STRIP), rows, d), (layers, blocks(d, PANEL_COLUMNS), rows, d)


def panel(base: Tensor, keys: Tensor, projected: Tensor, workspace: tuple[Tensor, Tensor]) -> list[Launch]:
    """Plans `K C_base` for up to `MAX_PANEL_EDITS` edits and a batch of layers: two launches.

    Args:
        base: `[layers, d, d]` with contiguous rows; all operands are float32. The lower triangle is not read.
        keys: `K [layers, n, d]`, contiguous.
        projected: output `[layers, n, d]`, contiguous.
        workspace: tensors with the shapes that `panel_workspace` returns.

    Returns:
        The launches, in order.
    """
    layers, n, d = keys.shape
    rows = workspace[0].shape[2]
    strips, chunks = blocks(d, STRIP), blocks(d, PANEL_COLUMNS)
    return [
        Launch(
            f"panel{rows}",
            (chunks, strips, layers),
            PANEL_THREADS,
            FLOAT * (STRIP * (64 + 4) + rows * (64 + STRIP)),
            (base, base.stride(0), base.stride(1), keys, *workspace, n, d),
        ),
        Launch(
            "panel_sum",
            (blocks(d, WARP), n, layers),
            PANEL_THREADS,
            FLOAT * (PANEL_THREADS // WARP) * (WARP + 1),
            (*workspace, projected, d, rows, strips, chunks),
        ),
    ]


def downdate(base: Tensor, pending: Tensor, signs: Tensor) -> list[Launch]:
    """Plans `reference.downdate_` for a batch of layers: one launch.

    Args:
        base: `[layers, d, d]` with contiguous rows; all operands are float32.
        pending: `[layers, r, d]`, contiguous; r is at least 1.
        signs: `[layers, r]`, contiguous.

    Returns:
        The launches, in order.
    """
    layers, r, d = pending.shape
    return [
        Launch(
            "downdate",
            (triangle(blocks(d, TILE)), layers, 1),
            PRODUCT_THREADS,
            FLOAT * max(TILE_SHARED, MIRROR_SHARED),
            (base, base.stride(0), base.stride(1), pending, signs, d, r),
        )
    ]
