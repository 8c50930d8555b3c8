// The kernels for AVX2 with FMA; CMakeLists.txt gives the flags.
#ifdef __AVX2__
#define RLSEDIT_LANES 8
#include "correct_split.hpp"
#include "panel_narrow.hpp"
#include "panel_wide.hpp"

void rlsedit::panel_avx2(const Panel& arguments) {
    narrow_wins(arguments.n) ? run_narrow(arguments) : run_wide(arguments);
}

void rlsedit::correct_split_avx2(const CorrectSplit& arguments) { run_correct_split(arguments); }
#endif
