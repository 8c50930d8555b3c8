// What the kernels and their caller share.
#pragma once

#include "rlsedit/cpu.hpp"

namespace rlsedit {

constexpr int tile = 64;        // rows and columns of a tile: 16 KiB, half of a small L1 cache
constexpr int widest_lanes = 16;

void panel_portable(const Panel& arguments);
void panel_avx2(const Panel& arguments);
void panel_avx512(const Panel& arguments);

}  // namespace rlsedit
