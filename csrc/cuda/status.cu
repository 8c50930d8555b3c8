// The last failure's text, one per thread.
#include <cstdarg>
#include <cstdio>

#include "status.cuh"

namespace {
thread_local char last_error[512] = "";
}

int rlsedit::fail(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof(last_error), format, arguments);
    va_end(arguments);
    return status;
}

int rlsedit::check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return RLSEDIT_OK;
    return fail(RLSEDIT_CUDA_FAILURE, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

extern "C" const char* rlsedit_cuda_last_error(void) { return last_error; }
