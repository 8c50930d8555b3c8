// Copies the lower triangle of a symmetric matrix to the upper triangle.
#include <algorithm>

#include "rlsedit/cpu.hpp"

namespace rlsedit {
namespace {

constexpr int64_t side = 64;
constexpr int64_t block = 4 * side;  // rows per block, so that the pages of a block are visited once

// Copies the tile at (row, column) to its mirror image through a buffer, because all rows can map to one cache set.
void mirror_tile(float* base, int64_t stride, int64_t d, int64_t row, int64_t column) {
    const int64_t rows = std::min(side, d - row), columns = std::min(side, d - column);
    float transposed[side * side];
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) transposed[j * side + i] = base[(row + i) * stride + column + j];
    for (int64_t j = 0; j < columns; ++j) {
        const int64_t from = row == column ? j + 1 : 0;
        if (from < rows) std::copy_n(transposed + j * side + from, rows - from, base + (column + j) * stride + row + from);
    }
}

}  // namespace

void mirror(float* base, int64_t stride, int64_t d, int threads) {
    const int64_t blocks = (d + block - 1) / block;
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic)
#endif
    for (int64_t number = 0; number < blocks * (blocks + 1) / 2; ++number) {
        int64_t block_row = 0, block_column = number;
        while (block_column > block_row) block_column -= ++block_row;
        for (int64_t row = block_row * block; row < std::min(d, (block_row + 1) * block); row += side)
            for (int64_t column = block_column * block; column <= std::min(row, (block_column + 1) * block - side);
                 column += side)
                mirror_tile(base, stride, d, row, column);
    }
}

}  // namespace rlsedit
