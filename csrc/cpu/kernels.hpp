// Declarations shared by the kernels and the dispatcher.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "rlsedit/cpu.hpp"

namespace rlsedit {

constexpr int tile = 64;        // rows and columns of a tile: 16 KiB, half of a small L1 cache
constexpr int widest_lanes = 16;

// Columns of the keys and sums of the narrow kernel: whole vectors plus the overhang of rows on the diagonal.
constexpr int64_t narrow_columns(int64_t d) { return (d + widest_lanes - 1) / widest_lanes * widest_lanes + 32; }

// The index of a thread in a parallel region, and the number of threads.
struct Team {
#ifdef _OPENMP
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
    const int thread = 0, threads = 1;
#endif
};

void panel_portable(const Panel& arguments);
void panel_avx2(const Panel& arguments);
void panel_avx512(const Panel& arguments);

void correct_split_portable(const CorrectSplit& arguments);
void correct_split_avx2(const CorrectSplit& arguments);
void correct_split_avx512(const CorrectSplit& arguments);

}  // namespace rlsedit
