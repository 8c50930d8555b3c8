// Looks up kernels by name and checks launches, without the CUDA runtime.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "kernels.cuh"
#include "rlsedit/cuda.h"

namespace rlsedit {

inline thread_local char last_error[512] = "";

// Stores the formatted message for rlsedit_cuda_last_error() and returns `status`.
__attribute__((format(printf, 2, 3))) inline int fail(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof(last_error), format, arguments);
    va_end(arguments);
    return status;
}

template <typename T>
constexpr char letter = '?';
template <typename T>
constexpr char letter<T*> = 'p';
template <>
constexpr char letter<i64> = 'q';
template <>
constexpr char letter<float> = 'f';

template <typename... Arguments>
std::string types_of(void (*)(Arguments...)) {
    return {letter<Arguments>...};
}

struct Kernel {
    const char* name;
    const void* function;
    int64_t least, most;
    std::string types;
};

inline const Kernel* find(const char* name) {
#define RLSEDIT_ROW(name, least, most) \
    {#name, reinterpret_cast<const void*>(rlsedit_##name), least, most, types_of(rlsedit_##name)},
    static const Kernel table[] = {RLSEDIT_KERNELS(RLSEDIT_ROW)};
#undef RLSEDIT_ROW
    for (const Kernel& kernel : table)
        if (name && !strcmp(kernel.name, name)) return &kernel;
    return nullptr;
}

constexpr int64_t most_shared_memory = 227 << 10;  // per block, on the devices with the largest limit

// Returns RLSEDIT_OK and the kernel, or an error.
inline int check_launch(const Kernel*& kernel, const char* name, const char* types, void** arguments, int64_t grid_x,
                        int64_t grid_y, int64_t grid_z, int64_t threads, int64_t shared) {
    kernel = find(name);
    if (!kernel) return fail(RLSEDIT_BAD_ARGUMENT, "there is no kernel %s", name ? name : "(null)");
    if (!types || kernel->types != types || !arguments) {
        return fail(RLSEDIT_BAD_ARGUMENT, "%s: arguments are of types %s: expected %s", name,
                    arguments && types ? types : "(null)", kernel->types.c_str());
    }
    if (grid_x < 1 || grid_x > INT32_MAX || grid_y < 1 || grid_y > 65535 || grid_z < 1 || grid_z > 65535) {
        return fail(RLSEDIT_BAD_ARGUMENT, "%s: a grid of %lld x %lld x %lld blocks: expected 1 to 2^31 - 1, 65535, 65535",
                    name, (long long)grid_x, (long long)grid_y, (long long)grid_z);
    }
    if (threads < kernel->least || threads > kernel->most || threads % warp != 0) {
        return fail(RLSEDIT_BAD_ARGUMENT, "%s: %lld threads: expected whole warps, %lld to %lld threads", name,
                    (long long)threads, (long long)kernel->least, (long long)kernel->most);
    }
    if (shared < 0 || shared > most_shared_memory) {
        return fail(RLSEDIT_BAD_ARGUMENT, "%s: %lld bytes of shared memory: expected 0 to %lld", name,
                    (long long)shared, (long long)most_shared_memory);
    }
    return RLSEDIT_OK;
}

}  // namespace rlsedit
