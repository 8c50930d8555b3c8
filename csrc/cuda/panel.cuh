// F = K C for few edits, reading one triangle of C once. Not yet run on a GPU.
//
// A block owns adjacent tiles of 128 x 64 entries on and above the diagonal. Each tile is used twice from shared
// memory: for F at its columns and, mirrored, for F at its rows. `panel_sum` sums over blocks in a fixed order, so the
// result is deterministic.
#pragma once

#include "common.cuh"

namespace rlsedit {

constexpr int panel_threads = 256;
constexpr int strip = 128;       // rows of a tile
constexpr int across = 64;       // columns of a tile
constexpr int panel_tiles = 8;   // per block
constexpr int panel_pitch = across + 4;
constexpr int row_groups = panel_threads / (across / 4);  // thread groups that share the rows of a tile
constexpr int rows_each = strip / row_groups;

// The value of an entry `beyond` columns right of the diagonal: 0 below the diagonal, half on it (it is used twice).
__device__ inline float upper(float entry, i64 beyond) { return beyond > 0 ? entry : beyond == 0 ? 0.5f * entry : 0.0f; }

// column_parts [layers, strips, M, d]: sums of F over the rows of a strip. row_parts [layers, chunks, M, d]: sums of F
// at the rows of a strip over a chunk of `panel_tiles` tiles; chunks are counted from the diagonal.
template <int M>
__device__ inline void panel(const float* base, i64 layer_stride, i64 stride, const float* keys, float* column_parts,
                             float* row_parts, i64 n, i64 d) {
    RLSEDIT_SHARED(shared);
    float* const tile = shared;                            // [strip, panel_pitch], later [row_groups, M, across]
    float* const keys_across = tile + strip * panel_pitch;  // [M, across]
    float* const keys_down = keys_across + M * across;      // [strip, M]
    const int thread = threadIdx.x;
    const i64 first_row = static_cast<i64>(blockIdx.y) * strip, layer = blockIdx.z;
    i64 first_column = first_row + static_cast<i64>(blockIdx.x) * panel_tiles * across;
    if (first_column >= d) return;  // this strip is shorter than the longest
    base += layer * layer_stride;
    keys += layer * n * d;
    column_parts += (layer * gridDim.y + blockIdx.y) * M * d;
    row_parts += (layer * gridDim.x + blockIdx.x) * M * d;
    const bool vector = aligned(base, stride);

    for (int e = thread; e < strip * M; e += panel_threads) {
        const int i = e / M, m = e % M;
        keys_down[e] = m < n && first_row + i < d ? keys[m * d + first_row + i] : 0.0f;
    }
    const int own_row = thread % strip, half = thread / strip;  // for F at the rows
    const int own_columns = 4 * (thread % (across / 4)), own_group = thread / (across / 4);
    float down[M] = {};

    for (int number = 0; number < panel_tiles && first_column < d; ++number, first_column += across) {
        float4 parts[rows_each];
#pragma unroll
        for (int p = 0; p < rows_each; ++p) {
            const i64 row = first_row + own_group + p * row_groups, column = first_column + own_columns;
            parts[p] = load4(base + row * stride + column, row < d ? remaining(column, d) : 0, vector);
        }
        __syncthreads();  // wait until the previous tile has been used
        const bool straddles = first_column < first_row + strip;
#pragma unroll
        for (int p = 0; p < rows_each; ++p) {
            const int row = own_group + p * row_groups;
            if (straddles) {
                const i64 beyond = first_column + own_columns - first_row - row;
                parts[p] = {upper(parts[p].x, beyond), upper(parts[p].y, beyond + 1), upper(parts[p].z, beyond + 2),
                            upper(parts[p].w, beyond + 3)};
            }
            *reinterpret_cast<float4*>(tile + row * panel_pitch + own_columns) = parts[p];
        }
        for (int e = thread; e < M * across; e += panel_threads) {
            const int m = e / across, j = e % across;
            keys_across[e] = m < n && first_column + j < d ? keys[m * d + first_column + j] : 0.0f;
        }
        __syncthreads();

#pragma unroll 2
        for (int j = half * (across / 2); j < (half + 1) * (across / 2); j += 4) {
            const float4 c = *reinterpret_cast<const float4*>(tile + own_row * panel_pitch + j);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const float4 k = *reinterpret_cast<const float4*>(keys_across + m * across + j);
                down[m] = fmaf(c.x, k.x, fmaf(c.y, k.y, fmaf(c.z, k.z, fmaf(c.w, k.w, down[m]))));
            }
        }
        float sums[M][4] = {};
#pragma unroll 2
        for (int i = own_group * rows_each; i < (own_group + 1) * rows_each; ++i) {
            const float4 c = *reinterpret_cast<const float4*>(tile + i * panel_pitch + own_columns);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const float k = keys_down[i * M + m];
                sums[m][0] = fmaf(k, c.x, sums[m][0]), sums[m][1] = fmaf(k, c.y, sums[m][1]);
                sums[m][2] = fmaf(k, c.z, sums[m][2]), sums[m][3] = fmaf(k, c.w, sums[m][3]);
            }
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < M; ++m)
            *reinterpret_cast<float4*>(tile + (own_group * M + m) * across + own_columns) = {sums[m][0], sums[m][1],
                                                                                              sums[m][2], sums[m][3]};
        __syncthreads();
        for (int e = thread; e < M * across; e += panel_threads) {
            const int m = e / across, j = e % across;
            if (m >= n || first_column + j >= d) continue;
            float sum = 0.0f;
            for (int other = 0; other < row_groups; ++other) sum += tile[(other * M + m) * across + j];
            column_parts[m * d + first_column + j] = sum;
        }
    }

    __syncthreads();
#pragma unroll
    for (int m = 0; m < M; ++m)
        if (half) tile[m * strip + own_row] = down[m];
    __syncthreads();
#pragma unroll
    for (int m = 0; m < M; ++m)
        if (!half && m < n && first_row + own_row < d)
            row_parts[m * d + first_row + own_row] = down[m] + tile[m * strip + own_row];
}

}  // namespace rlsedit

// Blocks: (chunks of the longest strip, strips, layers). base [layers, d, d] with the given strides, keys [layers, n,
// d] contiguous, n of 1 to 4 or 8. Shared memory: 128 x 68 + 192 M floats.
extern "C" __global__ void __launch_bounds__(rlsedit::panel_threads, 3)
    rlsedit_panel4(const float* base, rlsedit::i64 layer_stride, rlsedit::i64 stride, const float* keys,
                   float* column_parts, float* row_parts, rlsedit::i64 n, rlsedit::i64 d) {
    rlsedit::panel<4>(base, layer_stride, stride, keys, column_parts, row_parts, n, d);
}

extern "C" __global__ void __launch_bounds__(rlsedit::panel_threads, 2)
    rlsedit_panel8(const float* base, rlsedit::i64 layer_stride, rlsedit::i64 stride, const float* keys,
                   float* column_parts, float* row_parts, rlsedit::i64 n, rlsedit::i64 d) {
    rlsedit::panel<8>(base, layer_stride, stride, keys, column_parts, row_parts, n, d);
}

// Sums the parts, which have `rows` (4 or 8) rows, into projected [layers, n, d]. A block sums 32 columns of one row;
// each of its warps takes every 8th part. Shared memory: 8 x 33 floats. Blocks: (d / 32, n, layers).
extern "C" __global__ void __launch_bounds__(rlsedit::panel_threads)
    rlsedit_panel_sum(const float* column_parts, const float* row_parts, float* projected, rlsedit::i64 d,
                      rlsedit::i64 rows, rlsedit::i64 strips, rlsedit::i64 chunks) {
    using namespace rlsedit;
    RLSEDIT_SHARED(shared);
    constexpr int warps = panel_threads / warp;
    const int lane = threadIdx.x % warp, own = threadIdx.x / warp;
    const i64 m = blockIdx.y, layer = blockIdx.z, column = static_cast<i64>(blockIdx.x) * warp + lane;
    const i64 own_strip = column / strip;
    float sum = 0.0f;
    if (column < d) {
        const float* from = column_parts + (layer * strips * rows + m) * d + column;
        for (i64 part = own; part <= own_strip; part += warps) sum += from[part * rows * d];
        const i64 width = d - own_strip * strip, wide = panel_tiles * across;
        from = row_parts + (layer * chunks * rows + m) * d + column;
        for (i64 part = own; part < (width + wide - 1) / wide; part += warps) sum += from[part * rows * d];
    }
    shared[own * (warp + 1) + lane] = sum;
    __syncthreads();
    if (own != 0 || column >= d) return;
    for (int other = 1; other < warps; ++other) sum += shared[other * (warp + 1) + lane];
    projected[(layer * gridDim.y + m) * d + column] = sum;
}
