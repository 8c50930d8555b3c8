// Sig = diag(noise) + sign/2 (F K^T + K F^T), in two launches with a deterministic result: partial sums over d_k by
// many blocks, then their sum in a fixed order. Upper triangles only.
#pragma once

#include "product.cuh"

namespace rlsedit {

constexpr int gram_tile = tile_width<1>;
constexpr int gram_depth = slab_depth<1>;
constexpr int sigma_threads = 1024;  // maximum: one warp per part, at most 32

}  // namespace rlsedit

// partial[layer][split] [n, n] = projected keys^T + keys projected^T over `chunk` columns, on the tiles that touch the
// upper triangle. Blocks: (splits, upper tiles, layers). `projected` and `keys` are [layers, n, d], contiguous.
extern "C" __global__ void __launch_bounds__(rlsedit::product_threads)
    rlsedit_gram(const float* projected, const float* keys, float* partial, rlsedit::i64 n, rlsedit::i64 d,
                 rlsedit::i64 chunk) {
    using namespace rlsedit;
    RLSEDIT_SHARED(shared);
    constexpr int floats = slab_floats<1>;
    int ti, tj;
    triangle(blockIdx.y, ti, tj);
    const int row = ti * gram_tile, column = tj * gram_tile;
    projected += blockIdx.z * n * d;
    keys += blockIdx.z * n * d;
    const i64 begin = blockIdx.x * chunk, end = begin + chunk < d ? begin + chunk : d;
    const bool vector_f = aligned(projected, d), vector_k = aligned(keys, d);
    const int thread = threadIdx.x, x = thread % side, y = thread / side;

    float sums[4][4] = {};
    for (i64 k = begin; k < end; k += gram_depth) {
        const float4 f_row = load_columns<1>(projected, d, row, n, k, end, vector_f, thread);
        const float4 k_row = load_columns<1>(keys, d, row, n, k, end, vector_k, thread);
        const float4 f_column = load_columns<1>(projected, d, column, n, k, end, vector_f, thread);
        const float4 k_column = load_columns<1>(keys, d, column, n, k, end, vector_k, thread);
        __syncthreads();  // wait until the previous slab has been read
        store_columns<1>(shared, f_row, thread);
        store_columns<1>(shared + floats, k_row, thread);
        store_columns<1>(shared + 2 * floats, f_column, thread);
        store_columns<1>(shared + 3 * floats, k_column, thread);
        __syncthreads();
        multiply<1>(sums, shared, shared + 3 * floats, x, y);
        multiply<1>(sums, shared + floats, shared + 2 * floats, x, y);
    }

    partial += (static_cast<i64>(blockIdx.z) * gridDim.x + blockIdx.x) * n * n;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const i64 at_row = row + 4 * y + i, at_column = column + 4 * x + j;
            if (at_row < n && at_column < n) partial[at_row * n + at_column] = sums[i][j];
        }
}

// Sums the parts into the upper triangle of sigma[layer] [n, n]. A block sums 32 entries; each of its W warps takes
// every W-th part. Shared memory: W rows of 33 floats. Blocks: (entries / 32, layers).
extern "C" __global__ void __launch_bounds__(rlsedit::sigma_threads)
    rlsedit_sigma(const float* partial, const float* noise, float* sigma, rlsedit::i64 n, rlsedit::i64 splits,
                  float sign) {
    using namespace rlsedit;
    RLSEDIT_SHARED(shared);
    const i64 layer = blockIdx.y;
    const int lane = threadIdx.x % warp, own = threadIdx.x / warp, warps = blockDim.x / warp;
    const i64 entry = static_cast<i64>(blockIdx.x) * warp + lane;
    const i64 row = entry / n, column = entry % n;
    const bool wanted = row <= column && row < n;
    float sum = 0.0f;
    if (wanted) {
        const float* from = partial + layer * splits * n * n + entry;
        for (i64 split = own; split < splits; split += warps) sum += from[split * n * n];
    }
    shared[own * (warp + 1) + lane] = sum;
    __syncthreads();
    if (own != 0 || !wanted) return;
    for (int other = 1; other < warps; ++other) sum += shared[other * (warp + 1) + lane];
    sigma[layer * n * n + entry] = (row == column ? noise[layer * n + row] : 0.0f) + 0.5f * sign * sum;
}
