// W += sign A^T U on a split float32 weight, in one pass over the weight.
//
// Blocks of columns of U are packed. For each block, tiles of A^T U are summed in registers, and W is joined, updated
// and split again. See rlsedit_fast/ops/split.py for the split.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "vector.hpp"

namespace {

typedef uint32_t Bits __attribute__((vector_size(lanes * sizeof(uint32_t)), may_alias));
typedef int32_t Signed __attribute__((vector_size(lanes * sizeof(int32_t)), may_alias));
typedef uint16_t High __attribute__((vector_size(lanes * sizeof(uint16_t)), may_alias, aligned(2)));
typedef int16_t Low __attribute__((vector_size(lanes * sizeof(int16_t)), may_alias, aligned(2)));

constexpr int tile_vectors = 3;
constexpr int tile_rows = lanes == 16 ? 8 : 4;  // three vectors per row use most of the registers
constexpr int64_t tile_columns = tile_vectors * lanes;
constexpr int64_t packed_columns = 192;  // a multiple of tile_columns for every number of lanes
constexpr int64_t packed_edits = 128;    // a block of U is at most 96 KiB, a fraction of the L2 cache
static_assert(packed_columns % tile_columns == 0);
static_assert(packed_columns * packed_edits == rlsedit::correct_split_workspace_per_thread);

inline Vector join(const uint16_t* high, const int16_t* low) {
    const Bits upper = __builtin_convertvector(*(const High*)high, Bits) << 16;
    return (Vector)(upper + (Bits)__builtin_convertvector(*(const Low*)low, Signed));
}

inline void split(Vector value, uint16_t* high, int16_t* low) {
    const Bits number = (Bits)(value == value);  // all ones, or zero for NaN, which rounding could carry out of
    const Bits bits = ((Bits)value & number) | (0x7FC00000 & ~number), upper = (bits + 0x8000) >> 16;
    *(High*)high = __builtin_convertvector(upper, High);
    *(Low*)low = __builtin_convertvector((Signed)(bits - (upper << 16)), Low);
}

// Updates a tile of `rows` x tile_columns; `a` and `u` point to its rows of A^T and its columns of packed U.
template <int rows>
void correct_tile(uint16_t* high, int16_t* low, int64_t stride, const float* a, int64_t a_stride, const float* u,
                  int64_t edits) {
    Vector sum[rows][tile_vectors] = {};  // separate from W, whose magnitude would increase rounding errors
    for (int64_t m = 0; m < edits; ++m, a += a_stride, u += packed_columns) {
        Vector row[tile_vectors];
#pragma GCC unroll 8
        for (int v = 0; v < tile_vectors; ++v) row[v] = load(u + v * lanes);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
            for (int v = 0; v < tile_vectors; ++v) sum[i][v] += a[i] * row[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < tile_vectors; ++v) {
            const int64_t at = i * stride + v * lanes;
            split(join(high + at, low + at) + sum[i][v], high + at, low + at);
        }
    }
}

// The same for a tile with fewer columns, using a copy of full width.
template <int rows>
void correct_edge(uint16_t* high, int16_t* low, int64_t stride, int64_t columns, const float* a, int64_t a_stride,
                  const float* u, int64_t edits) {
    uint16_t whole_high[rows * tile_columns] = {};
    int16_t whole_low[rows * tile_columns] = {};
    for (int i = 0; i < rows; ++i) {
        std::copy_n(high + i * stride, columns, whole_high + i * tile_columns);
        std::copy_n(low + i * stride, columns, whole_low + i * tile_columns);
    }
    correct_tile<rows>(whole_high, whole_low, tile_columns, a, a_stride, u, edits);
    for (int i = 0; i < rows; ++i) {
        std::copy_n(whole_high + i * tile_columns, columns, high + i * stride);
        std::copy_n(whole_low + i * tile_columns, columns, low + i * stride);
    }
}

template <int rows>
void correct_rows(const rlsedit::CorrectSplit& p, int64_t row, int64_t column, int64_t columns, int64_t m,
                  int64_t edits, const float* packed) {
    const float* a = p.whitened + m * p.d_v + row;
    for (int64_t j = 0; j < columns; j += tile_columns) {
        uint16_t* high = p.high + row * p.stride + column + j;
        int16_t* low = p.low + row * p.stride + column + j;
        if (columns - j >= tile_columns) {
            correct_tile<rows>(high, low, p.stride, a, p.d_v, packed + j, edits);
        } else {
            correct_edge<rows>(high, low, p.stride, columns - j, a, p.d_v, packed + j, edits);
        }
    }
}

void run_correct_split(const rlsedit::CorrectSplit& p) {
#ifdef _OPENMP
#pragma omp parallel num_threads(p.threads)
#endif
    {
        const rlsedit::Team team;
        const int thread = team.thread, threads = team.threads;
        float* packed = p.workspace + thread * rlsedit::correct_split_workspace_per_thread;
        const int64_t groups = (p.d_v + tile_rows - 1) / tile_rows;
        const int64_t from = groups * thread / threads * tile_rows;
        const int64_t to = std::min(p.d_v, groups * (thread + 1) / threads * tile_rows);
        for (int64_t m = 0; m < p.n; m += packed_edits) {
            const int64_t edits = std::min(packed_edits, p.n - m);
            for (int64_t column = 0; column < p.d_k; column += packed_columns) {
                const int64_t columns = std::min(packed_columns, p.d_k - column);
                for (int64_t k = 0; k < edits; ++k) {
                    std::memset(packed + k * packed_columns, 0, packed_columns * sizeof(float));
                    const float* from_row = p.rows + (m + k) * p.d_k + column;
                    float* to_row = packed + k * packed_columns;
                    std::transform(from_row, from_row + columns, to_row, [&](float x) { return p.sign < 0 ? -x : x; });
                }
                int64_t row = from;
                for (; row + tile_rows <= to; row += tile_rows)
                    correct_rows<tile_rows>(p, row, column, columns, m, edits, packed);
                for (; row < to; ++row) correct_rows<1>(p, row, column, columns, m, edits, packed);
            }
        }
    }
}

}  // namespace
