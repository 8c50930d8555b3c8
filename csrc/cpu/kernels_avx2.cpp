// The kernels for AVX2 with FMA; CMakeLists.txt sets the flags.
#ifdef __AVX2__
#define RLSEDIT_LANES 8
#include "correct_split.hpp"
#include "panel.hpp"

void rlsedit::panel_avx2(const Panel& arguments) { run_panel(arguments); }

void rlsedit::correct_split_avx2(const CorrectSplit& arguments) { run_correct_split(arguments); }
#endif
