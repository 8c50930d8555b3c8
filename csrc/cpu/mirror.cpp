// Completes a symmetric matrix of which only the lower triangle is up to date.
#include <algorithm>

#include "rlsedit/cpu.hpp"

namespace rlsedit {

void mirror(float* base, int64_t stride, int64_t d, int threads) {
    constexpr int64_t side = 64;
    const int64_t tiles = (d + side - 1) / side;
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic)
#endif
    for (int64_t row_tile = 0; row_tile < tiles; ++row_tile) {
        const int64_t row = row_tile * side, rows = std::min(side, d - row);
        float packed[side * side];  // a stride of 64 floats; the matrix's may map every row to one cache set
        for (int64_t column = 0; column <= row; column += side) {
            const int64_t columns = std::min(side, d - column);
            for (int64_t i = 0; i < rows; ++i)
                std::copy_n(base + (row + i) * stride + column, columns, packed + i * side);
            for (int64_t j = 0; j < columns; ++j) {
                float* to = base + (column + j) * stride + row;
                for (int64_t i = row == column ? j + 1 : 0; i < rows; ++i) to[i] = packed[i * side + j];
            }
        }
    }
}

}  // namespace rlsedit
