// Selects the instruction set at run time. CMakeLists.txt defines RLSEDIT_X86 for x86-64.
#include <algorithm>

#include "kernels.hpp"

namespace rlsedit {

bool runs(Isa isa) {
#ifdef RLSEDIT_X86
    if (isa == Isa::avx512) return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return isa == Isa::automatic || isa == Isa::portable;
}

int64_t panel_workspace(int64_t d, int64_t n, int threads) {
    const int64_t padded = (d + tile - 1) / tile * tile, width = (n + widest_lanes - 1) / widest_lanes * widest_lanes;
    return std::max(padded * width, narrow_columns(d) * n) * (threads + 1);
}

namespace {

Isa best() { return runs(Isa::avx512) ? Isa::avx512 : runs(Isa::avx2) ? Isa::avx2 : Isa::portable; }

}  // namespace

void panel(const Panel& arguments, Isa isa) {
    if (isa == Isa::automatic) isa = best();
#ifdef RLSEDIT_X86
    if (isa == Isa::avx512) return panel_avx512(arguments);
    if (isa == Isa::avx2) return panel_avx2(arguments);
#endif
    panel_portable(arguments);
}

void correct_split(const CorrectSplit& arguments, Isa isa) {
    if (isa == Isa::automatic) isa = best();
#ifdef RLSEDIT_X86
    if (isa == Isa::avx512) return correct_split_avx512(arguments);
    if (isa == Isa::avx2) return correct_split_avx2(arguments);
#endif
    correct_split_portable(arguments);
}

}  // namespace rlsedit
