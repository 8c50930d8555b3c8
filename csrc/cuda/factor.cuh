// L = chol(Sig), U = L^-1 F, A = L^-1 E, in panels of up to 128 edits. Not yet run on a GPU.
//
// Every block factors the diagonal block of the panel itself in shared memory, which saves a launch, and then solves
// for its own columns, one per thread. The factor is stored as R = L^T, upper, row-major, for contiguous reads. Forward
// substitution is used instead of a product with L^-1: the same number of operations, no inverse, and a backward error
// that does not grow with the condition of Sig.
#pragma once

#include "common.cuh"

namespace rlsedit {

constexpr int panel_edits = 128;
constexpr int factor_threads = 128;
constexpr int chunk = 32;  // rows that a thread keeps in registers

// The upper factor of up to `panel_edits` edits in shared memory, padded with the identity to whole chunks.
struct Factor {
    float* entries;  // [padded, pitch]
    float* inverses;  // [padded]: inverse diagonal
    int size, padded, pitch;

    __device__ float* row(int i) const { return entries + i * pitch; }
};

// x <- R_cc^-T x for the chunk of rows at `start`: x[k] = (x[k] - sum over l < k of R[l][k] x[l]) / R[k][k].
__device__ inline void solve_chunk(float (&x)[chunk], const Factor& factor, int start) {
#pragma unroll
    for (int l = 0; l < chunk; ++l) {
        if (start + l >= factor.size) return;  // identity padding
        x[l] *= factor.inverses[start + l];
        const float* row = factor.row(start + l) + start;
#pragma unroll
        for (int k = 4 * ((l + 1) / 4); k < chunk; k += 4) {
            const float4 four = *reinterpret_cast<const float4*>(row + k);
            if (k > l) x[k] = fmaf(-four.x, x[l], x[k]);
            if (k + 1 > l) x[k + 1] = fmaf(-four.y, x[l], x[k + 1]);
            if (k + 2 > l) x[k + 2] = fmaf(-four.z, x[l], x[k + 2]);
            if (k + 3 > l) x[k + 3] = fmaf(-four.w, x[l], x[k + 3]);
        }
    }
}

// One warp factors the chunk x chunk block at `start`; lane j has column j. Returns, on every lane, 0 or the one-based
// index of the first pivot that is not positive or is NaN.
__device__ inline int factor_chunk(const Factor& factor, int start, int lane) {
    float column[chunk];
#pragma unroll
    for (int i = 0; i < chunk; ++i) column[i] = i <= lane ? factor.row(start + i)[start + lane] : 0.0f;
    int failed = 0;
#pragma unroll
    for (int k = 0; k < chunk; ++k) {
        if (failed || start + k >= factor.size) continue;
        const float pivot = __shfl_sync(all_lanes, column[k], k);
        if (!(pivot > 0.0f)) {
            failed = start + k + 1;
            continue;
        }
        const float root = sqrtf(pivot), inverse = 1.0f / root;
        column[k] = lane == k ? root : column[k] * inverse;
        if (lane == k) factor.inverses[start + k] = inverse;
#pragma unroll
        for (int i = k + 1; i < chunk; ++i) {
            const float left = __shfl_sync(all_lanes, column[k], i);
            if (i <= lane) column[i] = fmaf(-left, column[k], column[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < chunk; ++i)
        if (i <= lane) factor.row(start + i)[start + lane] = column[i];
    return failed;
}

// Factors in place with all threads of the block; `flag` is a word of shared memory. See `factor_chunk` for the result.
__device__ inline int factor_in_place(const Factor& factor, int* flag) {
    const int thread = threadIdx.x;
    for (int start = 0; start < factor.padded; start += chunk) {
        if (thread < warp) {
            const int failed = factor_chunk(factor, start, thread);
            if (thread == 0) *flag = failed;
        }
        __syncthreads();
        if (*flag) return *flag;
        const int next = start + chunk, rest = factor.padded - next;
        if (thread < rest) {  // the rows of R to the right of the block, one column per thread: rest <= 96
            float x[chunk];
#pragma unroll
            for (int i = 0; i < chunk; ++i) x[i] = factor.row(start + i)[next + thread];
            solve_chunk(x, factor, start);
#pragma unroll
            for (int i = 0; i < chunk; ++i) factor.row(start + i)[next + thread] = x[i];
        }
        __syncthreads();
        const int tiles = rest / 4;  // the remaining upper triangle in 4 x 4 tiles
        for (int number = thread; number < tiles * (tiles + 1) / 2; number += factor_threads) {
            int ti, tj;
            triangle(number, ti, tj);
            const int row = next + 4 * ti, column = next + 4 * tj;
            float4 sums[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i] = *reinterpret_cast<float4*>(factor.row(row + i) + column);
            for (int k = start; k < next; ++k) {
                const float4 left = *reinterpret_cast<const float4*>(factor.row(k) + row);
                const float4 right = *reinterpret_cast<const float4*>(factor.row(k) + column);
                const float lefts[4] = {left.x, left.y, left.z, left.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[i].x = fmaf(-lefts[i], right.x, sums[i].x);
                    sums[i].y = fmaf(-lefts[i], right.y, sums[i].y);
                    sums[i].z = fmaf(-lefts[i], right.z, sums[i].z);
                    sums[i].w = fmaf(-lefts[i], right.w, sums[i].w);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) *reinterpret_cast<float4*>(factor.row(row + i) + column) = sums[i];
        }
        __syncthreads();
    }
    return 0;
}

// Solves R^T solved = right for one column; both have rows of `width` floats and may be the same array.
__device__ inline void solve_column(const Factor& factor, const float* right, float* solved, i64 width) {
    for (int start = 0; start < factor.padded; start += chunk) {
        float x[chunk];
#pragma unroll
        for (int i = 0; i < chunk; ++i) x[i] = start + i < factor.size ? right[(start + i) * width] : 0.0f;
#pragma unroll 8
        for (int k = 0; k < start; ++k) {
            const float known = solved[k * width];
            const float* row = factor.row(k) + start;
#pragma unroll
            for (int i = 0; i < chunk; i += 4) {
                const float4 four = *reinterpret_cast<const float4*>(row + i);
                x[i] = fmaf(-four.x, known, x[i]);
                x[i + 1] = fmaf(-four.y, known, x[i + 1]);
                x[i + 2] = fmaf(-four.z, known, x[i + 2]);
                x[i + 3] = fmaf(-four.w, known, x[i + 3]);
            }
        }
        solve_chunk(x, factor, start);
#pragma unroll
        for (int i = 0; i < chunk; ++i)
            if (start + i < factor.size) solved[(start + i) * width] = x[i];
    }
}

}  // namespace rlsedit

// Factors the block of Sig for the panel of edits from `first` (at most 128 of n), and solves for its rows of R to the
// right of the block, of U and of A. `sigma` [layers, n, n] contains the remaining upper triangle of Sig and is
// overwritten to the right of the diagonal block; `projected` and `innovation` are the right-hand sides and may be `u`
// and `a`. `lower` [layers, n, n] receives the panel's columns of L, with zeros above the diagonal, and `info` [layers]
// the first pivot that is not positive. Blocks: (columns to the right + d_k + d_v, each rounded up to whole blocks,
// layers).
//
// Shared memory for 128 edits allows three blocks per multiprocessor, and so must the registers.
extern "C" __global__ void __launch_bounds__(rlsedit::factor_threads, 3)
    rlsedit_factor(float* sigma, const float* projected, const float* innovation, float* u, float* a, float* lower,
                   int* info, rlsedit::i64 n, rlsedit::i64 first, rlsedit::i64 d_k, rlsedit::i64 d_v) {
    using namespace rlsedit;
    RLSEDIT_SHARED(shared);
    const i64 layer = blockIdx.y;
    const int thread = threadIdx.x;
    const int size = n - first < panel_edits ? static_cast<int>(n - first) : panel_edits;
    const int padded = (size + chunk - 1) / chunk * chunk, pitch = padded + 4;
    const Factor factor = {shared + padded + 4, shared + 4, size, padded, pitch};
    int* const flag = reinterpret_cast<int*>(shared);
    sigma += layer * n * n;
    lower += layer * n * n;

    const float* diagonal = sigma + first * n + first;
    for (int e = thread; e < padded * padded; e += factor_threads) {
        const int i = e / padded, j = e % padded;
        if (i <= j) factor.row(i)[j] = j < size ? diagonal[i * n + j] : i == j ? 1.0f : 0.0f;
    }
    __syncthreads();
    const int failed = factor_in_place(factor, flag);
    if (blockIdx.x == 0 && thread == 0) {
        if (first == 0) info[layer] = failed;
        else if (failed && info[layer] == 0) info[layer] = static_cast<int>(first) + failed;
    }
    if (failed) return;

    if (blockIdx.x == 0) {  // lanes cover 8 rows and 4 columns to avoid bank conflicts
        for (int e = thread; e < padded * padded; e += factor_threads) {
            const int within = e % warp, tile = e / warp;
            const int i = tile / (padded / 4) * 8 + within / 4, k = tile % (padded / 4) * 4 + within % 4;
            if (i < size && k < size) lower[(first + i) * n + first + k] = k <= i ? factor.row(k)[i] : 0.0f;
        }
    }

    const i64 rest = n - first - size, beside = (rest + factor_threads - 1) / factor_threads;
    const i64 of_keys = (d_k + factor_threads - 1) / factor_threads;
    i64 block = blockIdx.x;
    const bool square = block < beside;
    if (!square) block -= beside;
    const bool keys = !square && block < of_keys;
    if (!square && !keys) block -= of_keys;
    const i64 width = square ? n : keys ? d_k : d_v;
    const i64 column = (square ? first + size : 0) + block * factor_threads + thread;
    if (column >= width) return;
    const i64 at = (square ? first : layer * n + first) * width + column;
    float* const solved = (square ? sigma : keys ? u : a) + at;
    solve_column(factor, square ? solved : (keys ? projected : innovation) + at, solved, width);
    if (!square) return;
    for (int k = 0; k < size; ++k) {
        lower[column * n + first + k] = solved[k * n];
        lower[(first + k) * n + column] = 0.0f;
    }
}
