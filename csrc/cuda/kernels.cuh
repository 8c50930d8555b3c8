// All kernels, for nvcc and NVRTC.
#pragma once

#include "downdate.cuh"
#include "factor.cuh"
#include "gram.cuh"
#include "panel.cuh"
#include "update.cuh"

// name without prefix, minimum and maximum number of threads per block
#define RLSEDIT_KERNELS(X)                                           \
    X(gram, rlsedit::product_threads, rlsedit::product_threads)      \
    X(sigma, rlsedit::warp, rlsedit::sigma_threads)                  \
    X(factor, rlsedit::factor_threads, rlsedit::factor_threads)      \
    X(panel4, rlsedit::panel_threads, rlsedit::panel_threads)        \
    X(panel8, rlsedit::panel_threads, rlsedit::panel_threads)        \
    X(panel_sum, rlsedit::panel_threads, rlsedit::panel_threads)     \
    X(update, rlsedit::product_threads, rlsedit::product_threads)    \
    X(downdate, rlsedit::product_threads, rlsedit::product_threads)
