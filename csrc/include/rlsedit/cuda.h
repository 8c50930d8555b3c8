/* The C interface of the CUDA library: one build serves every torch version, or none.
 *
 * It holds the compiled kernels and launches them by name. Which to launch, in what order and on what grid is decided
 * in one place for this library and for kernels compiled at run time: rlsedit_fast/ops/cuda_plan.py. Nothing is
 * allocated or waited for. Every function that returns a status returns 0, or leaves its text in
 * rlsedit_cuda_last_error() and returns RLSEDIT_BAD_ARGUMENT (nothing was launched) or RLSEDIT_CUDA_FAILURE (CUDA
 * refused).
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

/* Launches kernel `name` (without the prefix of csrc/cuda) on `stream`, a cudaStream_t of `device`.
 *
 * types: what the arguments are, a letter each: p a pointer, q an int64, f a float32; it must be the kernel's own.
 * arguments: pointers to them.
 * shared: bytes of dynamic shared memory. */
RLSEDIT_API int rlsedit_cuda_launch(const char* name, const char* types, void** arguments, int64_t grid_x,
                                    int64_t grid_y, int64_t grid_z, int64_t threads, int64_t shared, int device,
                                    void* stream);

#ifdef __cplusplus
}
#endif
