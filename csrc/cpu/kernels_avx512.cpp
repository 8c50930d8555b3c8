// The kernels for AVX-512; CMakeLists.txt sets the flags.
#ifdef __AVX512F__
#define RLSEDIT_LANES 16
#include "correct_split.hpp"
#include "panel.hpp"

void rlsedit::panel_avx512(const Panel& arguments) { run_panel(arguments); }

void rlsedit::correct_split_avx512(const CorrectSplit& arguments) { run_correct_split(arguments); }
#endif
