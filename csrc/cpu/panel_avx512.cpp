// The panel kernel for AVX-512; CMakeLists.txt gives the flags.
#ifdef __AVX512F__
#define RLSEDIT_LANES 16
#include "panel_kernel.hpp"

void rlsedit::panel_avx512(const Panel& arguments) { run(arguments); }
#endif
