// CPU operations on raw pointers with 64-bit sizes, float32, row-major. The Python caller checks the arguments.
#pragma once

#include <cstdint>

namespace rlsedit {

// F = K C. Only the lower triangle of the symmetric C is read.
struct Panel {
    const float* base;    // C [d, d], rows `stride` apart
    int64_t stride;
    const float* keys;    // K [n, d], contiguous
    float* out;           // F [n, d], contiguous
    float* workspace;     // panel_workspace(d, n, threads) floats, aligned to 64 bytes
    int64_t d, n;
    int threads;
};

enum class Isa { automatic, portable, avx2, avx512 };

bool runs(Isa isa);  // whether it is compiled in and supported by this processor

int64_t panel_workspace(int64_t d, int64_t n, int threads);
void panel(const Panel& arguments, Isa isa);

// W += sign A^T U for a float32 weight stored as its rounded upper 16 bits and the remainder.
struct CorrectSplit {
    uint16_t* high;         // bfloat16 [d_v, d_k], rows `stride` apart
    int16_t* low;           // [d_v, d_k], rows `stride` apart
    int64_t stride;
    const float* whitened;  // A [n, d_v], contiguous
    const float* rows;      // U [n, d_k], contiguous
    float* workspace;       // correct_split_workspace_per_thread floats for each thread, aligned to 64 bytes
    int64_t d_v, d_k, n;
    int sign, threads;
};

constexpr int64_t correct_split_workspace_per_thread = 192 * 128;

void correct_split(const CorrectSplit& arguments, Isa isa);

// Copies the lower triangle of base [d, d] to the upper triangle.
void mirror(float* base, int64_t stride, int64_t d, int threads);

}  // namespace rlsedit
