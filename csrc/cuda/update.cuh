// Subtracts a factored panel of edits from the rows below it, for more than 128 edits. Not yet run on a GPU.
#pragma once

#include "factor.cuh"
#include "product.cuh"

namespace rlsedit {

constexpr int update_tile = tile_width<2>;

}  // namespace rlsedit

// With R_p the panel of 128 edits from `first`, for the rows after it: Sig -= R_p^T R_p (upper triangle),
// U = projected - R_p^T U_p and A = innovation - R_p^T A_p; `projected` may be `u`, and `innovation` may be `a`.
// Blocks: (column tiles of the remaining Sig, of U and of A, remaining row tiles, layers).
extern "C" __global__ void __launch_bounds__(rlsedit::product_threads, 2)
    rlsedit_update(float* sigma, const float* projected, const float* innovation, float* u, float* a, rlsedit::i64 n,
                   rlsedit::i64 first, rlsedit::i64 d_k, rlsedit::i64 d_v) {
    using namespace rlsedit;
    RLSEDIT_SHARED(shared);
    constexpr int floats = slab_floats<2>;
    const i64 begin = first + panel_edits, layer = blockIdx.z;
    const i64 tiles = (n - begin + update_tile - 1) / update_tile, key_tiles = (d_k + update_tile - 1) / update_tile;
    const i64 row = begin + blockIdx.y * update_tile;
    i64 tile = blockIdx.x;
    sigma += layer * n * n;

    const bool square = tile < tiles;
    if (square && tile < blockIdx.y) return;  // below the diagonal, never read
    const bool keys = !square && tile < tiles + key_tiles;
    const i64 width = square ? n : keys ? d_k : d_v;
    const i64 start = square ? begin + tile * update_tile : (tile - tiles - (keys ? 0 : key_tiles)) * update_tile;
    float* const to = square ? sigma : (keys ? u : a) + layer * n * width;
    const float* const from = square ? sigma : (keys ? projected : innovation) + layer * n * width;

    const float* const left_rows = sigma + first * n;
    const float* const right_rows = to + first * width;
    const int thread = threadIdx.x, x = thread % side, y = thread / side;

    Rows<2> lefts(left_rows, n, panel_edits, row, n, thread), rights(right_rows, width, panel_edits, start, width, thread);
    float4 left, right;
    auto load = [&] {
        left = lefts.next();
        right = rights.next();
    };
    auto store = [&](float* buffer) {
        store_rows<2>(buffer, left, thread);
        store_rows<2>(buffer + floats, right, thread);
    };
    float sums[8][8] = {};
    sum_slabs<2>(sums, shared, panel_edits, x, y, load, store);

#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const i64 at_row = row + i / 4 * group + 4 * y + i % 4, at_column = start + j / 4 * group + 4 * x + j % 4;
            if (at_row < n && at_column < width && !(square && at_column < at_row))
                to[at_row * width + at_column] = from[at_row * width + at_column] - sums[i][j];
        }
}
