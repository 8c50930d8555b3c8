/* C interface of the CUDA library. It does not depend on torch.
 *
 * The library contains the compiled kernels and launches them by name. rlsedit_fast/ops/cuda_plan.py decides which
 * kernels to launch, in what order and on what grid, for this library and for kernels compiled at run time. Nothing is
 * allocated or synchronized. A function with a status returns 0, RLSEDIT_BAD_ARGUMENT (nothing was launched) or
 * RLSEDIT_CUDA_FAILURE (CUDA reported an error); rlsedit_cuda_last_error() returns the message.
 */
#pragma once

#include <stdint.h>

#define RLSEDIT_API __attribute__((visibility("default")))

enum { RLSEDIT_OK = 0, RLSEDIT_BAD_ARGUMENT = 1, RLSEDIT_CUDA_FAILURE = 2 };

#ifdef __cplusplus
extern "C" {
#endif

/* The last error message of this thread; valid until its next error. */
RLSEDIT_API const char* rlsedit_cuda_last_error(void);

/* Whether the kernels can run: with the driver, and if `device` is not negative on that device, whose context is created.
 * Returns RLSEDIT_CUDA_FAILURE if they cannot. */
RLSEDIT_API int rlsedit_cuda_check(int device);

/* Launches kernel `name` (without the prefix rlsedit_) on `stream`, a cudaStream_t of `device`.
 *
 * types: one letter per argument: p for a pointer, q for an int64, f for a float32; must match the kernel.
 * arguments: pointers to the arguments.
 * shared: dynamic shared memory in bytes. */
RLSEDIT_API int rlsedit_cuda_launch(const char* name, const char* types, void** arguments, int64_t grid_x,
                                    int64_t grid_y, int64_t grid_z, int64_t threads, int64_t shared, int device,
                                    void* stream);

#ifdef __cplusplus
}
#endif
