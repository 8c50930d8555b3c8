"""What an operation of the `cuda` backend launches: kernels, grids, shared memory and arguments, in order.

One plan for the library and for kernels compiled at run time (`cuda_launch`), in Python so that it can be tested
without a GPU. Nothing here allocates; sizes of workspaces are asked for beforehand. Sizes of tiles and blocks are those
of csrc/cuda.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

FLOAT = 4  # bytes
MOST_EDITS = 16384  # the tiles of Sig go into one dimension of a grid, of up to 65535 blocks
MOST_LAYERS = 65535

# product.cuh: 64 H entries along each side of a tile, slabs of 16 / H summands with rows of 64 H + 4 floats.
PRODUCT_THREADS = 256
GRAM_TILE = 64
GRAM_DEPTH = 16
GRAM_SHARED = 4 * GRAM_DEPTH * (GRAM_TILE + 4)  # floats: four slabs
TILE = 128
TILE_SHARED = 4 * 8 * (TILE + 4)  # floats: two buffers of two slabs
MIRROR_SHARED = 64 * 65  # floats: a quadrant of a tile

# gram.cuh
WARP = 32  # also the entries of Sig that a block sums
MOST_WARPS = 32
WANTED_BLOCKS = 264  # two for each multiprocessor of a Hopper; fixed, so that every device sums in the same order
LEAST_COLUMNS = 64  # of F and K that are worth a block

# factor.cuh
FACTOR_EDITS = 128
FACTOR_THREADS = 128
CHUNK = 32

# panel.cuh
MOST_PANEL_EDITS = 8
PANEL_THREADS = 256
STRIP = 128  # rows of a tile of C
PANEL_COLUMNS = 8 * 64  # of a block, in tiles of 64


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: its name in csrc/cuda without the prefix.
        grid: blocks in x, y and z.
        threads: of a block, in x.
        shared: bytes of dynamic shared memory.
        arguments: tensors (passed as pointers), ints (as int64) and floats (as float32).
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[Tensor | int | float, ...]


def blocks(size: int, width: int) -> int:
    """How many blocks of `width` cover `size`."""
    return -(-size // width)


def triangle(tiles: int) -> int:
    """Tiles on and above the diagonal of a square of `tiles` by `tiles`."""
    return tiles * (tiles + 1) // 2


def gram_splits(layers: int, n: int, d: int) -> tuple[int, int]:
    """`(splits, columns)`: into how many parts the sum over `d` columns behind Sig goes, and how long each is."""
    wanted = max(1, WANTED_BLOCKS // (layers * triangle(blocks(n, GRAM_TILE))))
    columns = max(blocks(d, wanted), LEAST_COLUMNS)
    columns = blocks(columns, GRAM_DEPTH) * GRAM_DEPTH
    return blocks(d, columns), columns


def factor_workspace(layers: int, n: int, d_k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the float32 workspaces of `factor`: the parts of Sig, and Sig."""
    return (layers, gram_splits(layers, n, d_k)[0], n, n), (layers, n, n)


def factor_shared(size: int) -> int:
    """Bytes of shared memory for a panel of `size` edits: a word, the inverses of the diagonal, the factor."""
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
    """`reference.factor` for a batch of layers: three launches, and two more for each further `FACTOR_EDITS` edits.

    Args:
        projected: `F [layers, n, d_k]`; like all operands contiguous and float32.
        keys: `K [layers, n, d_k]`.
        innovation: `E [layers, n, d_v]`.
        noise: `[layers, n]`.
        sign: +1 or -1.
        outputs: `U`, `A` and `L` in the shapes of `projected`, `innovation` and `[layers, n, n]`, and `info [layers]`
            int32.
        workspace: tensors of the shapes that `factor_workspace` gives.
    """
    layers, n, d_k = projected.shape
    d_v = innovation.shape[2]
    u, a, lower, info = outputs
    partial, sigma = workspace
    splits, columns = gram_splits(layers, n, d_k)
    warps = min(splits, MOST_WARPS)
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
    """Shapes of the float32 workspaces of `panel`: what each strip gives at its columns, and each chunk at its rows."""
    rows = 4 if n <= 4 else MOST_PANEL_EDITS
    return (layers, blocks(d, STRIP), rows, d), (layers, blocks(d, PANEL_COLUMNS), rows, d)


def panel(base: Tensor, keys: Tensor, projected: Tensor, workspace: tuple[Tensor, Tensor]) -> list[Launch]:
    """`K C_base` of up to `MOST_PANEL_EDITS` edits for a batch of layers: two launches.

    Args:
        base: `[layers, d, d]` with contiguous rows, float32 like all operands; its lower triangle is not read.
        keys: `K [layers, n, d]`, contiguous.
        projected: the result, `[layers, n, d]`, contiguous.
        workspace: tensors of the shapes that `panel_workspace` gives.
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
    """`reference.downdate_` for a batch of layers: one launch.

    Args:
        base: `[layers, d, d]` with contiguous rows, float32 like all operands.
        pending: `[layers, r, d]`, contiguous, r of 1 or more.
        signs: `[layers, r]`, contiguous.
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
