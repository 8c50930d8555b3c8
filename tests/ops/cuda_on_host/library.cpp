// The interface of the CUDA library (csrc/include/rlsedit/cuda.h) for host memory, with cuda_on_host.
#include "cuda_on_host.hpp"

#include "launcher.hpp"

namespace {

bool backwards = false;

template <typename... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<Arguments*>(arguments[I])...);
}

template <typename... Arguments>
std::function<void()> bind(void (*kernel)(Arguments...), void** arguments) {
    return [=] { call(kernel, arguments, std::index_sequence_for<Arguments...>{}); };
}

}  // namespace

extern "C" RLSEDIT_API void run_backwards(int on) { backwards = on; }

extern "C" const char* rlsedit_cuda_last_error(void) { return rlsedit::last_error; }

extern "C" int rlsedit_cuda_check(int) { return RLSEDIT_OK; }

extern "C" int rlsedit_cuda_launch(const char* name, const char* types, void** arguments, int64_t grid_x,
                                   int64_t grid_y, int64_t grid_z, int64_t threads, int64_t shared, int, void*) {
    const rlsedit::Kernel* kernel;
    if (int status =
            rlsedit::check_launch(kernel, name, types, arguments, grid_x, grid_y, grid_z, threads, shared)) {
        return status;
    }
    const uint3 grid = {static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), static_cast<unsigned>(grid_z)};
#define RLSEDIT_CALL(of, least, most)                                                             \
    if (!strcmp(name, #of))                                                                       \
        cuda_on_host::launch(bind(rlsedit_##of, arguments), grid, static_cast<unsigned>(threads), \
                             static_cast<size_t>(shared), backwards);
    RLSEDIT_KERNELS(RLSEDIT_CALL)
#undef RLSEDIT_CALL
    return RLSEDIT_OK;
}
