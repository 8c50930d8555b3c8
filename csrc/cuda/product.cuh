// Products of tiles in float32: 16 x 16 threads, each with 4 H x 4 H sums in registers, operands through shared memory.
//
// A slab of an operand is [slab_depth<H>][pitch<H>] in shared memory: row k has the 64 H entries of summand k. The
// entries of a thread are in groups of four, 64 apart, so that every read of shared memory is 16 bytes wide and free of
// bank conflicts.
#pragma once

#include "common.cuh"

namespace rlsedit {

constexpr int side = 16;  // threads along each side of a tile
constexpr int product_threads = side * side;
constexpr int group = 4 * side;  // distance between the groups of a thread

template <int H>
constexpr int tile_width = group * H;
template <int H>
constexpr int slab_depth = 16 / H;  // one float4 of each operand per thread
template <int H>
constexpr int pitch = tile_width<H> + 4;
template <int H>
constexpr int slab_floats = slab_depth<H> * pitch<H>;

// sums[i][j] += sum over k of left[k][i] right[k][j], for the entries of thread (x, y).
template <int H>
__device__ inline void multiply(float (&sums)[4 * H][4 * H], const float* left, const float* right, int x, int y) {
#pragma unroll
    for (int k = 0; k < slab_depth<H>; ++k) {
        float a[4 * H], b[4 * H];
#pragma unroll
        for (int h = 0; h < H; ++h) {
            const float4 l = *reinterpret_cast<const float4*>(left + k * pitch<H> + h * group + 4 * y);
            const float4 r = *reinterpret_cast<const float4*>(right + k * pitch<H> + h * group + 4 * x);
            a[4 * h] = l.x, a[4 * h + 1] = l.y, a[4 * h + 2] = l.z, a[4 * h + 3] = l.w;
            b[4 * h] = r.x, b[4 * h + 1] = r.y, b[4 * h + 2] = r.z, b[4 * h + 3] = r.w;
        }
#pragma unroll
        for (int i = 0; i < 4 * H; ++i)
#pragma unroll
            for (int j = 0; j < 4 * H; ++j) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
    }
}

// Loads a thread's part of consecutive slabs of a matrix whose rows are the summands, from entry `start` of each row.
template <int H>
class Rows {
  public:
    __device__ Rows(const float* matrix, i64 stride, int rows, i64 start, i64 end, int thread) {
        constexpr int across = tile_width<H> / 4;
        start += 4 * (thread % across);
        at_ = matrix + thread / across * stride + start;
        step_ = slab_depth<H> * stride;
        left_ = rows - thread / across;
        count_ = remaining(start, end);
        vector_ = aligned(matrix, stride);
    }
    __device__ float4 next() {
        const float4 part = load4(at_, left_ > 0 ? count_ : 0, vector_);
        at_ += step_;
        left_ -= slab_depth<H>;
        return part;
    }

  private:
    const float* at_;
    i64 step_;
    int left_, count_;
    bool vector_;
};

template <int H>
__device__ inline void store_rows(float* slab, float4 part, int thread) {
    constexpr int across = tile_width<H> / 4;
    *reinterpret_cast<float4*>(slab + thread / across * pitch<H> + 4 * (thread % across)) = part;
}

// Sums over `rows` summands. `load` loads this thread's part of the next slab of both operands, and `store` writes it
// into a buffer of two slabs. There are two buffers: one is multiplied while the next is loaded, with one barrier per
// slab.
template <int H, class Load, class Store>
__device__ inline void sum_slabs(float (&sums)[4 * H][4 * H], float* shared, int rows, int x, int y, Load load,
                                 Store store) {
    constexpr int depth = slab_depth<H>, floats = slab_floats<H>;
    float* now = shared;
    float* next = shared + 2 * floats;
    load();
    store(now);
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < rows; k += depth) {
        const bool more = k + depth < rows;
        if (more) load();
        multiply<H>(sums, now, now + floats, x, y);
        if (more) store(next);
        __syncthreads();
        float* const swap = now;
        now = next, next = swap;
    }
}

// Loads a thread's part of a slab whose summands are the columns from k of a matrix with contiguous rows.
template <int H>
__device__ inline float4 load_columns(const float* matrix, i64 stride, i64 start, i64 rows, i64 k, i64 end, bool vector,
                                      int thread) {
    constexpr int across = slab_depth<H> / 4;
    const i64 row = start + thread / across;
    if (row >= rows) return {0.0f, 0.0f, 0.0f, 0.0f};
    k += 4 * (thread % across);
    return load4(matrix + row * stride + k, remaining(k, end), vector);
}

template <int H>
__device__ inline void store_columns(float* slab, float4 part, int thread) {
    constexpr int across = slab_depth<H> / 4;
    float* to = slab + 4 * (thread % across) * pitch<H> + thread / across;
    to[0] = part.x, to[pitch<H>] = part.y, to[2 * pitch<H>] = part.z, to[3 * pitch<H>] = part.w;
}

}  // namespace rlsedit
