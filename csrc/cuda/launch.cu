// The exported functions of the library.
#include <cuda_runtime.h>

#include "launcher.hpp"

namespace {

constexpr int64_t default_shared_memory = 48 << 10;  // larger sizes must be requested

int check(cudaError_t error, const char* name, const char* what) {
    if (error == cudaSuccess) return RLSEDIT_OK;
    return rlsedit::fail(RLSEDIT_CUDA_FAILURE, "%s: %s: %s (%s)", name, what, cudaGetErrorString(error),
                         cudaGetErrorName(error));
}

// Makes `device` current and restores the previous device at the end of the scope.
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

}  // namespace

extern "C" const char* rlsedit_cuda_last_error(void) { return rlsedit::last_error; }

extern "C" int rlsedit_cuda_check(int device) {
    int driver = 0;
    if (int status = check(cudaDriverGetVersion(&driver), "the driver", "reading its version")) return status;
    if (driver / 1000 < CUDART_VERSION / 1000) {
        return rlsedit::fail(RLSEDIT_CUDA_FAILURE,
                             "the driver supports CUDA %d.%d, but the library was built with CUDA %d.%d: update the "
                             "driver, or rebuild the library with an older CUDA toolkit",
                             driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
    if (device < 0) return RLSEDIT_OK;
    OnDevice scope(device);
    if (int status = check(scope.error(), "the kernels", "choosing the device")) return status;
    cudaFuncAttributes attributes;
    return check(cudaFuncGetAttributes(&attributes, rlsedit::find("panel_sum")->function), "the kernels",
                 "loading them on the device");
}

extern "C" int rlsedit_cuda_launch(const char* name, const char* types, void** arguments, int64_t grid_x,
                                   int64_t grid_y, int64_t grid_z, int64_t threads, int64_t shared, int device,
                                   void* stream) {
    const rlsedit::Kernel* kernel;
    if (int status =
            rlsedit::check_launch(kernel, name, types, arguments, grid_x, grid_y, grid_z, threads, shared)) {
        return status;
    }
    OnDevice scope(device);
    if (int status = check(scope.error(), name, "choosing the device")) return status;
    if (shared > default_shared_memory) {
        const cudaError_t asked = cudaFuncSetAttribute(kernel->function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared));
        if (int status = check(asked, name, "asking for shared memory")) return status;
    }
    const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), static_cast<unsigned>(grid_z));
    const cudaError_t launched =
        cudaLaunchKernel(kernel->function, grid, dim3(static_cast<unsigned>(threads)), arguments,
                         static_cast<size_t>(shared), static_cast<cudaStream_t>(stream));
    return check(launched, name, "launching");
}
