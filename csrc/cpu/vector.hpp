// Vectors of RLSEDIT_LANES floats as compiler vector extensions; each including file defines RLSEDIT_LANES.
#pragma once

namespace {

constexpr int lanes = RLSEDIT_LANES;
typedef float Vector __attribute__((vector_size(lanes * sizeof(float)), may_alias));
typedef float Unaligned __attribute__((vector_size(lanes * sizeof(float)), may_alias, aligned(4)));

inline Vector load(const float* from) { return *(const Unaligned*)from; }
inline void store(float* to, Vector value) { *(Unaligned*)to = value; }

// The sum of the lanes, by pairwise halving.
inline float total(Vector value) {
#pragma GCC unroll 4
    for (int half = lanes / 2; half > 0; half /= 2) {
        Vector other;
        for (int i = 0; i < lanes; ++i) other[i] = value[i ^ half];
        value += other;
    }
    return value[0];
}

}  // namespace
