// The panel for many edits: C is read in tiles, with the vector lanes along the edits.
//
// A tile T of rows I and columns J of the lower triangle is read from memory once, packed, and used twice:
// F[:, I] += K[:, J] T^T and, off the diagonal, F[:, J] += K[:, I] T. Both are computed transposed, with the same
// register-blocked loop over broadcast elements of T.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.hpp"
#include "vector.hpp"
#include "rlsedit/cpu.hpp"

namespace {

using rlsedit::tile;

// 32 registers fit 8 x 3 or 4 x 4 accumulators, 16 registers 8 x 1 or 4 x 2.
constexpr int max_vectors = lanes == 16 ? 4 : 2;
constexpr int rows_at_once(int vectors) { return vectors == 1 || (lanes == 16 && vectors < 4) ? 8 : 4; }

// Prefetches the next tile line by line while the current tile is multiplied.
struct Next {
    static constexpr int lines_a_row = tile * sizeof(float) / 64;
    const float* tile_at = nullptr;  // null if there is none
    int64_t stride = 0;
    void prefetch(int line) const {
        __builtin_prefetch(tile_at + line / lines_a_row * stride + line % lines_a_row * 16, 0, 2);
    }
};

// f[a, :] += sum_k T(a, k) x[k, :] for a tile of T or of its transpose; x and f have rows of `width` floats.
template <int vectors, bool transposed>
void multiply(const float* packed, const float* x, float* f, int64_t width, Next next) {
    constexpr int rows = rows_at_once(vectors);
    constexpr int steps_a_line = tile / rows / Next::lines_a_row;
    constexpr int row_step = transposed ? 1 : tile, k_step = transposed ? tile : 1;
    for (int a = 0; a < tile; a += rows) {
        Vector sum[rows][vectors];
        for (int i = 0; i < rows; ++i)
            for (int v = 0; v < vectors; ++v) sum[i][v] = *(const Vector*)(f + (a + i) * width + v * lanes);
        const float* t = packed + a * row_step;
        for (int k = 0; k < tile; ++k, t += k_step) {
            Vector key[vectors];
            for (int v = 0; v < vectors; ++v) key[v] = *(const Vector*)(x + k * width + v * lanes);
            for (int i = 0; i < rows; ++i)
                for (int v = 0; v < vectors; ++v) sum[i][v] += t[i * row_step] * key[v];
            if (!transposed && next.tile_at && k % steps_a_line == 0) next.prefetch((a / rows * tile + k) / steps_a_line);
        }
        for (int i = 0; i < rows; ++i)
            for (int v = 0; v < vectors; ++v) *(Vector*)(f + (a + i) * width + v * lanes) = sum[i][v];
    }
}

template <bool transposed>
void multiply_all(const float* packed, const float* x, float* f, int64_t width, Next next) {
    const int64_t vectors = width / lanes;
    const int64_t passes = (vectors + max_vectors - 1) / max_vectors;
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t begin = vectors * pass / passes, count = vectors * (pass + 1) / passes - begin;
        const float* x_part = x + begin * lanes;
        float* f_part = f + begin * lanes;
        switch (count) {
            case 1: multiply<1, transposed>(packed, x_part, f_part, width, pass ? Next{} : next); break;
            case 2: multiply<2, transposed>(packed, x_part, f_part, width, pass ? Next{} : next); break;
#if RLSEDIT_LANES == 16
            case 3: multiply<3, transposed>(packed, x_part, f_part, width, pass ? Next{} : next); break;
            case 4: multiply<4, transposed>(packed, x_part, f_part, width, pass ? Next{} : next); break;
#endif
        }
    }
}

// Packs the tile at (row, column) of the lower triangle, zero beyond d; a diagonal tile is made symmetric.
void pack(const rlsedit::Panel& p, int64_t row, int64_t column, float* packed) {
    const int64_t rows = std::min<int64_t>(tile, p.d - row), columns = std::min<int64_t>(tile, p.d - column);
    if (rows < tile || columns < tile) std::memset(packed, 0, tile * tile * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) {
        const float* from = p.base + (row + i) * p.stride + column;
        if (row != column) {
            std::memcpy(packed + i * tile, from, columns * sizeof(float));
        } else {
            for (int64_t j = 0; j <= i; ++j) packed[i * tile + j] = packed[j * tile + i] = from[j];
        }
    }
}

// Tiles are distributed in square blocks, whose keys and sums stay in the cache; blocks are smaller if there are few
// per thread.
int64_t block_side(int64_t tiles, int threads) {
    for (int64_t side = 4; side > 1; side /= 2) {
        const int64_t blocks = (tiles + side - 1) / side;
        if (blocks * (blocks + 1) / 2 >= 8 * threads) return side;
    }
    return 1;
}

// The part of one thread: its share of the blocks, in an order that depends only on the arguments.
void accumulate(const rlsedit::Panel& p, const float* x, float* sums, int64_t width, int thread, int threads) {
    alignas(64) float packed[tile * tile];
    const int64_t tiles = (p.d + tile - 1) / tile, side = block_side(tiles, threads);
    const int64_t blocks = (tiles + side - 1) / side, total = blocks * (blocks + 1) / 2;
    int64_t block_row = 0, block_column = 0;
    for (int64_t block = 0; block < total * (thread + 1) / threads; ++block) {
        if (block >= total * thread / threads) {
            for (int64_t ti = block_row * side; ti < std::min(tiles, (block_row + 1) * side); ++ti) {
                for (int64_t tj = block_column * side; tj < std::min(ti + 1, (block_column + 1) * side); ++tj) {
                    const int64_t row = ti * tile, column = tj * tile;
                    pack(p, row, column, packed);
                    // The next tile of the block, or the tile one row down; wrong at the end of a block, which is
                    // harmless.
                    const bool along = tj < std::min(ti, (block_column + 1) * side - 1);
                    const int64_t down = row + (along ? 0 : tile), right = along ? column + tile : block_column * side * tile;
                    const Next next{down + tile <= p.d ? p.base + down * p.stride + right : nullptr, p.stride};
                    multiply_all<false>(packed, x + column * width, sums + row * width, width, next);
                    if (ti != tj) multiply_all<true>(packed, x + row * width, sums + column * width, width, {});
                }
            }
        }
        if (++block_column > block_row) ++block_row, block_column = 0;
    }
}

void run_wide(const rlsedit::Panel& p) {
    const int64_t padded = (p.d + tile - 1) / tile * tile, width = (p.n + lanes - 1) / lanes * lanes;
    const int64_t matrix = padded * width;
    float* x = p.workspace;  // K transposed, [padded, width]
    float* sums = x + matrix;  // F transposed, one [padded, width] per thread
#ifdef _OPENMP
#pragma omp parallel num_threads(p.threads)
#endif
    {
        const rlsedit::Team team;
        const int thread = team.thread, threads = team.threads;
        const int64_t from = padded * thread / threads, to = padded * (thread + 1) / threads;
        std::memset(x + from * width, 0, (to - from) * width * sizeof(float));
        for (int64_t m = 0; m < p.n; ++m)
            for (int64_t j = from; j < std::min(to, p.d); ++j) x[j * width + m] = p.keys[m * p.d + j];
        std::memset(sums + thread * matrix, 0, matrix * sizeof(float));
#ifdef _OPENMP
#pragma omp barrier
#endif
        accumulate(p, x, sums + thread * matrix, width, thread, threads);
#ifdef _OPENMP
#pragma omp barrier
#endif
        for (int64_t m = 0; m < p.n; ++m) {
            for (int64_t j = from; j < std::min(to, p.d); ++j) {
                float sum = 0;
                for (int t = 0; t < threads; ++t) sum += sums[t * matrix + j * width + m];
                p.out[m * p.d + j] = sum;
            }
        }
    }
}

}  // namespace
