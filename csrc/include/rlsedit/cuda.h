/* The C interface of the CUDA library: one build serves every torch version, or none.
 *
 * Sizes and row strides are int64, in elements; matrices are float32 and row-major; `device` is the CUDA device of
 * the pointers and `stream` a cudaStream_t of it. Nothing is allocated or waited for. Every function returns 0, or
 * leaves its text in rlsedit_cuda_last_error() and returns RLSEDIT_BAD_ARGUMENT (nothing was launched) or
 * RLSEDIT_CUDA_FAILURE (CUDA refused).
 */
#pragma once

#include <stdint.h>

#define RLSEDIT_API __attribute__((visibility("default")))

enum { RLSEDIT_OK = 0, RLSEDIT_BAD_ARGUMENT = 1, RLSEDIT_CUDA_FAILURE = 2 };

#ifdef __cplusplus
extern "C" {
#endif

/* The text of this thread's last failure; valid until its next one. */
RLSEDIT_API const char* rlsedit_cuda_last_error(void);

/* base [d, d] <- base - pending^T diag(signs) pending, with pending [r, d]. The lower triangle is computed, the upper
 * one becomes its mirror. */
RLSEDIT_API int rlsedit_cuda_downdate(float* base, int64_t base_stride, const float* pending, int64_t pending_stride,
                                      const float* signs, int64_t d, int64_t r, int device, void* stream);

/* lower [n, n] = the Cholesky factor of diag(noise) + sign/2 (gram + gram^T), zero above the diagonal;
 * u [n, d_k] = lower^-1 projected, a [n, d_v] = lower^-1 innovation, all contiguous; n is 1 to 128.
 * info is 0, or the one-based index of the first pivot that is not positive: the outputs are then undefined. */
RLSEDIT_API int rlsedit_cuda_factor(const float* gram, const float* noise, const float* projected,
                                    const float* innovation, float* u, float* a, float* lower, int32_t* info,
                                    int64_t n, int64_t d_k, int64_t d_v, int sign, int device, void* stream);

#ifdef __cplusplus
}
#endif
