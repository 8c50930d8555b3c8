// C_base -= U^T D U. Not yet run on a GPU.
//
// One block owns one 128 x 128 tile on or above the diagonal, computes it and writes it and its mirror image, so every
// element has one writer and the result is exactly symmetric.
#pragma once

#include "product.cuh"

namespace rlsedit {

constexpr int downdate_tile = tile_width<2>;
constexpr int mirror_pitch = group + 1;  // odd, to reduce bank conflicts of column reads

}  // namespace rlsedit

// Two blocks per multiprocessor need at most 128 registers per thread. For sm_100 nvcc 13.0 stays below that without a
// bound, but spills with one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define RLSEDIT_DOWNDATE_BOUNDS __launch_bounds__(rlsedit::product_threads)
#else
#define RLSEDIT_DOWNDATE_BOUNDS __launch_bounds__(rlsedit::product_threads, 2)
#endif

// base [layers, d, d] with the given strides, pending [layers, r, d] and signs [layers, r] contiguous.
// Blocks: (upper tiles, layers).
extern "C" __global__ void RLSEDIT_DOWNDATE_BOUNDS
    rlsedit_downdate(float* base, rlsedit::i64 layer_stride, rlsedit::i64 stride, const float* pending,
                     const float* signs, rlsedit::i64 d, rlsedit::i64 r) {
    using namespace rlsedit;
    RLSEDIT_SHARED(shared);
    constexpr int depth = slab_depth<2>, floats = slab_floats<2>;
    int ti, tj;
    triangle(blockIdx.x, ti, tj);
    const int row = ti * downdate_tile, column = tj * downdate_tile;
    pending += blockIdx.y * r * d;
    signs += blockIdx.y * r;
    const int thread = threadIdx.x, x = thread % side, y = thread / side, rows = static_cast<int>(r);

    constexpr int across = downdate_tile / 4;
    const int own_column = 4 * (thread % across);
    const int left_count = remaining(row + own_column, d), right_count = remaining(column + own_column, d);
    const bool vector_rows = aligned(pending, d);
    int own = thread / across;  // the row that this thread loads
    const float* at = pending + own * d + own_column;
    float4 left, right;
    float sign;
    auto load = [&] {
        const bool inside = own < rows;
        sign = inside ? signs[own] : 0.0f;
        left = load4(at + row, inside ? left_count : 0, vector_rows);
        right = load4(at + column, inside ? right_count : 0, vector_rows);
        own += depth;
        at += depth * d;
    };
    auto store = [&](float* buffer) {
        store_rows<2>(buffer, {sign * left.x, sign * left.y, sign * left.z, sign * left.w}, thread);
        store_rows<2>(buffer + floats, right, thread);
    };
    float sums[8][8] = {};
    sum_slabs<2>(sums, shared, rows, x, y, load, store);

    // For each 64 x 64 quadrant: subtract, write, and write the mirror image through shared memory.
    base += blockIdx.y * layer_stride;
    const bool vector = aligned(base, stride);
    const int size = static_cast<int>(d);
#pragma unroll
    for (int hi = 0; hi < 2; ++hi)
#pragma unroll
        for (int hj = 0; hj < 2; ++hj) {
            if (ti == tj && hi > hj) continue;  // entirely below the diagonal
            const int first_row = row + hi * group, first_column = column + hj * group;
            const int at_column = first_column + 4 * x;
            int at_row = first_row + 4 * y;
            float* entries = base + at_row * stride + at_column;
            float* kept = shared + 4 * y * mirror_pitch + 4 * x;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* const taken = sums[4 * hi + i] + 4 * hj;
                if (at_row < size && at_column >= at_row && at_column + 4 <= size && vector) {
                    float4 four = *reinterpret_cast<const float4*>(entries);
                    four.x -= taken[0], four.y -= taken[1], four.z -= taken[2], four.w -= taken[3];
                    *reinterpret_cast<float4*>(entries) = four;
                    kept[0] = four.x, kept[1] = four.y, kept[2] = four.z, kept[3] = four.w;
                } else {
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        if (at_row < size && at_column + j >= at_row && at_column + j < size)
                            kept[j] = entries[j] -= taken[j];
                }
                ++at_row;
                entries += stride;
                kept += mirror_pitch;
            }
            __syncthreads();
            // A row below the diagonal is a column of the quadrant.
            const int along = 4 * x, below_column = first_row + along;
            int below_row = first_column + y;
            entries = base + below_row * stride + below_column;
            kept = shared + along * mirror_pitch + y;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (below_row < size && below_column + 4 <= below_row && vector) {
                    *reinterpret_cast<float4*>(entries) = {kept[0], kept[mirror_pitch], kept[2 * mirror_pitch],
                                                           kept[3 * mirror_pitch]};
                } else {
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        if (below_row < size && below_column + j < below_row) entries[j] = kept[j * mirror_pitch];
                }
                below_row += side;
                entries += side * stride;
                kept += side;
            }
            __syncthreads();
        }
}
