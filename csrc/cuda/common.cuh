// What every kernel uses. Raw pointers and built-in types only: nvcc, NVRTC and a host compiler (tests) all take it.
#pragma once

namespace rlsedit {

using i64 = long long;

constexpr int warp = 32;
constexpr unsigned all_lanes = 0xffffffffu;

}  // namespace rlsedit

// `name` points to the block's dynamic shared memory, aligned to 16 bytes.
#ifndef RLSEDIT_SHARED
#define RLSEDIT_SHARED(name)                   \
    extern __shared__ float4 rlsedit_shared[]; \
    float* const name = reinterpret_cast<float*>(rlsedit_shared)
#endif

namespace rlsedit {

// Whether rows that are `stride` floats apart all start on 16 bytes.
__device__ inline bool aligned(const float* pointer, i64 stride) {
    return reinterpret_cast<unsigned long long>(pointer) % sizeof(float4) == 0 && stride % 4 == 0;
}

// Of four neighbours from number `start` of `end` on, those that exist: 0 to 4.
__device__ inline int room(i64 start, i64 end) { return start + 4 <= end ? 4 : start < end ? static_cast<int>(end - start) : 0; }

// The first `room` of the four at `from`, zeros for the others; `vector` says that they start on 16 bytes.
__device__ inline float4 load4(const float* from, int room, bool vector) {
    if (vector && room == 4) return *reinterpret_cast<const float4*>(from);
    float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
    if (room > 0) four.x = from[0];
    if (room > 1) four.y = from[1];
    if (room > 2) four.z = from[2];
    if (room > 3) four.w = from[3];
    return four;
}

// Tile (row, column) with row <= column is number column (column + 1) / 2 + row; a grid has fewer than 2^31 of them.
__device__ inline void triangle(unsigned number, int& row, int& column) {
    i64 at = static_cast<i64>((sqrt(8.0 * static_cast<double>(number) + 1.0) - 1.0) / 2.0);
    while (at * (at + 1) / 2 > number) --at;  // the root may be off by one in floating point
    while ((at + 1) * (at + 2) / 2 <= number) ++at;
    column = static_cast<int>(at);
    row = static_cast<int>(number - at * (at + 1) / 2);
}

}  // namespace rlsedit
