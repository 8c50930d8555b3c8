// The panel for few edits: C is read along its rows, with the vector lanes along its columns.
//
// The lower triangle is divided into strips of columns, and these into blocks of rows that stay in the cache while the
// edits are processed two or three at a time. A row c of a block is used twice while it is in registers:
// F[m, i] += c . K[m, :] and F[m, :] += K[m, i] c.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels.hpp"
#include "vector.hpp"

namespace {

// Whether this kernel is faster for n edits. One full vector of edits is the best case of the other kernel.
constexpr bool narrow_wins(int64_t n) { return lanes == 16 ? n <= 12 || (n > 16 && n <= 24) : n <= 4; }

constexpr int64_t strip = 1024;     // columns: keys and sums of three edits are 24 KiB, most of a small L1 cache
constexpr int64_t block_rows = 32;  // rows of a strip: 128 KiB, a part of a small L2 cache

// Edits and rows processed together, limited by registers: three by four with 32 registers, two by two with 16.
constexpr int most_edits = lanes == 16 ? 3 : 2;
constexpr int rows_of(int edits) { return edits == 1 ? 8 : most_edits == 3 ? 4 : 2; }

struct Narrow {
    const float* keys;  // K [n, padded], zero beyond d
    float* sums;        // F [n, padded] of this thread
    int64_t padded;
};

// Prefetches the next block line by line while the current block is processed: hardware prefetching stops at the end of
// a page, and a row of a strip fills a page.
struct Ahead {
    static constexpr int line = 64 / sizeof(float), lines_a_row = strip / line;
    const float* at;
    int64_t stride;
    int next = 0, stop, each;  // lines: prefetched so far, in the block, and per step of a sweep
    void ask() {
        for (int count = std::min(each, stop - next); count > 0; --count, ++next)
            __builtin_prefetch(at + next / lines_a_row * stride + next % lines_a_row * line, 0, 2);
    }
};

// Processes `rows` rows from `at`, `stride` apart, columns [column, column + count); count is a multiple of lanes.
template <int edits, int rows>
void sweep(const float* at, int64_t stride, const Narrow& p, Ahead& ahead, int64_t row, int64_t column, int64_t count) {
    Vector dot[rows][edits] = {};
    Vector key[rows][edits];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
        for (int m = 0; m < edits; ++m) key[i][m] = Vector{} + p.keys[m * p.padded + row + i];
    const float* x = p.keys + column;
    float* f = p.sums + column;
    for (int64_t j = 0; j < count; j += lanes) {
        ahead.ask();
        Vector c[rows];
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) c[i] = load(at + i * stride + j);
#pragma GCC unroll 8
        for (int m = 0; m < edits; ++m) {
            const Vector here = load(x + m * p.padded + j);
            Vector sum = load(f + m * p.padded + j);
#pragma GCC unroll 8
            for (int i = 0; i < rows; ++i) {
                dot[i][m] += c[i] * here;
                sum += c[i] * key[i][m];
            }
            store(f + m * p.padded + j, sum);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
        for (int m = 0; m < edits; ++m) p.sums[m * p.padded + row + i] += total(dot[i][m]);
}

// Processes rows [row, row + rows) of the strip that starts at `column`, up to the diagonal. Diagonal entries are
// halved because they are used twice.
template <int edits, int rows>
void narrow_group(const rlsedit::Panel& a, const Narrow& p, Ahead& ahead, int64_t row, int64_t column) {
    const float* at = a.base + row * a.stride + column;
    const int64_t below = std::min(strip, (row - column) / lanes * lanes);  // columns below the diagonal in all rows
    sweep<edits, rows>(at, a.stride, p, ahead, row, column, below);
    if (below == strip) return;
    constexpr int reach = (rows + 2 * lanes - 2) / lanes * lanes;
    alignas(64) float corner[rows][reach] = {};
    for (int i = 0; i < rows; ++i) {
        const int64_t whole = row + i - column - below;
        std::memcpy(corner[i], at + i * a.stride + below, whole * sizeof(float));
        corner[i][whole] = 0.5f * at[i * a.stride + below + whole];
    }
    sweep<edits, rows>(corner[0], reach, p, ahead, row, column + below, reach);
}

template <int edits>
void narrow_block(const rlsedit::Panel& a, const Narrow& p, Ahead& ahead, int64_t from, int64_t to, int64_t column) {
    constexpr int rows = rows_of(edits);
    int64_t row = from;
    for (; row + rows <= to; row += rows) narrow_group<edits, rows>(a, p, ahead, row, column);
    for (; row < to; ++row) narrow_group<edits, 1>(a, p, ahead, row, column);
}

// Returns what to prefetch during the block of rows at `row` of the strip at `column`: the block below it, if it is
// complete and off the diagonal.
Ahead ahead_of(const rlsedit::Panel& a, int64_t row, int64_t column) {
    const int64_t below = row + block_rows;
    const bool whole = below + block_rows <= a.d && below >= column + strip;
    const int64_t passes = (a.n + most_edits - 1) / most_edits;
    const int64_t steps = passes * (block_rows / rows_of(std::min<int64_t>(a.n, most_edits))) * (strip / lanes);
    const int lines = block_rows * Ahead::lines_a_row;
    return {a.base + (whole ? below * a.stride + column : 0), a.stride, 0, whole ? lines : 0,
            static_cast<int>((lines + steps - 1) / steps)};
}

// The part of one thread: an equal share of the blocks of all strips, in an order that depends only on the arguments.
void narrow_part(const rlsedit::Panel& a, const Narrow& p, int thread, int threads) {
    int64_t total = 0, count = 0;
    for (int64_t column = 0; column < a.d; column += strip) total += (a.d - column + block_rows - 1) / block_rows;
    for (int64_t column = 0; column < a.d; column += strip) {
        for (int64_t row = column; row < a.d; row += block_rows, ++count) {
            if (count < total * thread / threads || count >= total * (thread + 1) / threads) continue;
            const int64_t to = std::min(a.d, row + block_rows);
            Ahead ahead = ahead_of(a, row, column);
            for (int64_t m = 0; m < a.n;) {
                const Narrow part{p.keys + m * p.padded, p.sums + m * p.padded, p.padded};
                const int64_t left = a.n - m;
                const int64_t edits = left == most_edits + 1 ? 2 : std::min<int64_t>(left, most_edits);  // avoid a single edit
                if (edits == 1) narrow_block<1>(a, part, ahead, row, to, column);
                else if (edits == 2) narrow_block<2>(a, part, ahead, row, to, column);
                else narrow_block<most_edits>(a, part, ahead, row, to, column);
                m += edits;
            }
        }
    }
}

void run_narrow(const rlsedit::Panel& a) {
    const int64_t padded = rlsedit::narrow_columns(a.d), matrix = a.n * padded;
#ifdef _OPENMP
#pragma omp parallel num_threads(a.threads)
#endif
    {
        const rlsedit::Team team;
        const int thread = team.thread, threads = team.threads;
        float* sums = a.workspace + (thread + 1) * matrix;
        const auto mine = [&](int64_t count) { return std::pair(count * thread / threads, count * (thread + 1) / threads); };
        const auto [first, last] = mine(a.n);
        for (int64_t m = first; m < last; ++m) {
            std::memcpy(a.workspace + m * padded, a.keys + m * a.d, a.d * sizeof(float));
            std::memset(a.workspace + m * padded + a.d, 0, (padded - a.d) * sizeof(float));
        }
        std::memset(sums, 0, matrix * sizeof(float));
#ifdef _OPENMP
#pragma omp barrier
#endif
        narrow_part(a, {a.workspace, sums, padded}, thread, threads);
#ifdef _OPENMP
#pragma omp barrier
#endif
        const auto [from, to] = mine(a.d);
        for (int64_t m = 0; m < a.n; ++m) {
            for (int64_t j = from; j < to; ++j) {
                float sum = 0;
                for (int t = 1; t <= threads; ++t) sum += a.workspace[t * matrix + m * padded + j];
                a.out[m * a.d + j] = sum;
            }
        }
    }
}

}  // namespace
