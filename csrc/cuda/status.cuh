// How the C functions check, fail and choose their device.
#pragma once

#include <cuda_runtime.h>

#include "rlsedit/cuda.h"

namespace rlsedit {

// Keeps the formatted text for rlsedit_cuda_last_error() and returns `status`.
int fail(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// RLSEDIT_OK, or the failure that `error` of `what` is.
int check(cudaError_t error, const char* what);

// Makes `device` current, and the one before it again when the scope ends.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        error_ = cudaGetDevice(&before_);
        if (error_ == cudaSuccess) error_ = cudaSetDevice(device);
        entered_ = error_ == cudaSuccess;
    }
    ~OnDevice() {
        if (entered_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    cudaError_t error() const { return error_; }

  private:
    int before_ = 0;
    bool entered_ = false;
    cudaError_t error_;
};

}  // namespace rlsedit
