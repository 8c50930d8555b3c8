// The panel kernel for AVX2 with FMA; CMakeLists.txt gives the flags.
#ifdef __AVX2__
#define RLSEDIT_LANES 8
#include "panel_kernel.hpp"

void rlsedit::panel_avx2(const Panel& arguments) { run(arguments); }
#endif
