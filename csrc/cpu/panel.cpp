// Chooses the instruction set of the panel kernel at run time.
#include "panel_tile.hpp"

#if defined(__x86_64__)
#define RLSEDIT_X86 1
#endif

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
    return padded * width * (threads + 1);
}

void panel(const Panel& arguments, Isa isa) {
    if (isa == Isa::automatic) {
        // Up to eight edits fill one AVX2 vector; half of an AVX-512 one would be idle.
        isa = arguments.n > 8 && runs(Isa::avx512) ? Isa::avx512 : runs(Isa::avx2) ? Isa::avx2 : Isa::portable;
    }
#ifdef RLSEDIT_X86
    if (isa == Isa::avx512) return panel_avx512(arguments);
    if (isa == Isa::avx2) return panel_avx2(arguments);
#endif
    panel_portable(arguments);
}

}  // namespace rlsedit
