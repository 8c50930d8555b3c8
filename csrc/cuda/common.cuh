// Shared by all kernels. Only raw pointers and built-in types, for nvcc and NVRTC.
#pragma once

namespace rlsedit {

using i64 = long long;

constexpr int warp = 32;
constexpr unsigned all_lanes = 0xffffffffu;

}  // namespace rlsedit

// Declares `name`, a pointer to the dynamic shared memory of the block, aligned to 16 bytes.
#define RLSEDIT_SHARED(name)                   \
    extern __shared__ float4 rlsedit_shared[]; \
    float* const name = reinterpret_cast<float*>(rlsedit_shared)

namespace rlsedit {

// Whether all rows, `stride` floats apart, are aligned to 16 bytes.
__device__ inline bool aligned(const float* pointer, i64 stride) {
    return reinterpret_cast<unsigned long long>(pointer) % sizeof(float4) == 0 && stride % 4 == 0;
}

// How many of the four entries from `start` are before `end`: 0 to 4.
__device__ inline int remaining(i64 start, i64 end) { return start + 4 <= end ? 4 : start < end ? static_cast<int>(end - start) : 0; }

// Loads the first `count` of four entries at `from`, zeros for the others; `vector` if they are aligned to 16 bytes.
__device__ inline float4 load4(const float* from, int count, bool vector) {
    if (vector && count == 4) return *reinterpret_cast<const float4*>(from);
    float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
    if (count > 0) four.x = from[0];
    if (count > 1) four.y = from[1];
    if (count > 2) four.z = from[2];
    if (count > 3) four.w = from[3];
    return four;
}

// Tile (row, column), row <= column, has number column (column + 1) / 2 + row; a grid has fewer than 2^31 tiles.
__device__ inline void triangle(unsigned number, int& row, int& column) {
    i64 at = static_cast<i64>((sqrt(8.0 * static_cast<double>(number) + 1.0) - 1.0) / 2.0);
    while (at * (at + 1) / 2 > number) --at;  // the floating-point root can be off by one
    while ((at + 1) * (at + 2) / 2 <= number) ++at;
    column = static_cast<int>(at);
    row = static_cast<int>(number - at * (at + 1) / 2);
}

}  // namespace rlsedit
