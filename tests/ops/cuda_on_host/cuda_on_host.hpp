// A minimal CUDA emulation that runs the kernels on the host, one block at a time, to test indices, tails, barriers and
// batch strides without a GPU.
//
// The threads of a block are fibers that switch only at barriers and shuffles. Between barriers they run sequentially, in
// forward or reverse order: a result that depends on the order reveals a race. With -fsanitize=thread, ThreadSanitizer is
// informed of fibers and barriers and detects races directly. Shared memory starts as NaN and is followed by a guard.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)
#define RLSEDIT_SHARED(name) float* const name = cuda_on_host::shared_memory()

struct alignas(16) float4 {
    float x, y, z, w;
};
struct uint3 {
    unsigned x, y, z;
};
inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr int warp = 32;
constexpr size_t stack_bytes = 256 << 10;
constexpr size_t guard = 64;  // floats after the shared memory of the block

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    enum { ready, at_block_barrier, at_warp_barrier, done } state = ready;
    int turn = 0;  // the buffer of the warp that the next shuffle uses
#if defined(__SANITIZE_THREAD__)
    void* tsan = nullptr;
#endif
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;
inline float* shared;
inline std::vector<float> exchanged[2];  // shuffle values by thread
inline char block_barrier, warp_barriers[64], end_of_kernel;

#if defined(__SANITIZE_THREAD__)
#define CUDA_ON_HOST_OWN __attribute__((no_sanitize("thread")))  // the emulation is not instrumented
inline void* scheduler_tsan;
inline void release(void* what) { __tsan_release(what); }
inline void acquire(void* what) { __tsan_acquire(what); }
#else
#define CUDA_ON_HOST_OWN
inline void release(void*) {}
inline void acquire(void*) {}
#endif

[[noreturn]] inline void stop(const char* text) {
    fprintf(stderr, "cuda_on_host: %s (block %u, %u, %u)\n", text, blockIdx.x, blockIdx.y, blockIdx.z);
    abort();
}

inline float* shared_memory() { return shared; }

CUDA_ON_HOST_OWN inline void switch_to_scheduler() {
    const unsigned self = current;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&fibers[self].context, &scheduler);
}

CUDA_ON_HOST_OWN inline void run_body() {
    char* const stack = fibers[current].stack.get();
    acquire(stack);  // the previous user of this stack has finished
    body();
    release(stack);
    release(&end_of_kernel);
    fibers[current].state = Fiber::done;
    switch_to_scheduler();
}

CUDA_ON_HOST_OWN inline void resume(unsigned thread) {
    current = thread;
    threadIdx = {thread, 0, 0};
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fibers[thread].tsan, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&scheduler, &fibers[thread].context);
}

CUDA_ON_HOST_OWN inline void wait(decltype(Fiber::state) state, char* barrier) {
    release(barrier);
    fibers[current].state = state;
    switch_to_scheduler();
    acquire(barrier);
}

// Resumes threads begin..end if all of them wait in `state`.
CUDA_ON_HOST_OWN inline bool open(decltype(Fiber::state) state, unsigned begin, unsigned end) {
    for (unsigned thread = begin; thread < end; ++thread)
        if (fibers[thread].state != state) return false;
    for (unsigned thread = begin; thread < end; ++thread) fibers[thread].state = Fiber::ready;
    return true;
}

CUDA_ON_HOST_OWN inline void prepare(Fiber& fiber) {
    fiber.state = Fiber::ready;
    fiber.turn = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_body, 0);
#if defined(__SANITIZE_THREAD__)
    fiber.tsan = __tsan_create_fiber(0);
#endif
}

CUDA_ON_HOST_OWN inline void run_block(unsigned threads, bool backwards) {
    for (unsigned thread = 0; thread < threads; ++thread) prepare(fibers[thread]);
    for (bool all_done = false; !all_done;) {
        bool moved = false;
        all_done = true;
        for (unsigned step = 0; step < threads; ++step) {
            const unsigned thread = backwards ? threads - 1 - step : step;
            if (fibers[thread].state == Fiber::ready) resume(thread), moved = true;
            all_done &= fibers[thread].state == Fiber::done;
        }
        for (unsigned start = 0; start < threads; start += warp) moved |= open(Fiber::at_warp_barrier, start, start + warp);
        moved |= open(Fiber::at_block_barrier, 0, threads);
        if (!moved && !all_done) stop("a barrier is not reached by all threads");
    }
#if defined(__SANITIZE_THREAD__)
    for (unsigned thread = 0; thread < threads; ++thread) __tsan_destroy_fiber(fibers[thread].tsan);
#endif
}

// Runs `kernel` on the whole grid; `backwards` reverses the order of blocks and threads.
CUDA_ON_HOST_OWN inline void launch(std::function<void()> kernel, const uint3& grid, unsigned threads,
                                    size_t shared_bytes, bool backwards) {
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    for (auto& buffer : exchanged) buffer.assign(threads, 0.0f);
    body = std::move(kernel);
    gridDim = grid;
    blockDim = {threads, 1, 1};
#if defined(__SANITIZE_THREAD__)
    scheduler_tsan = __tsan_get_current_fiber();
#endif
    const size_t blocks = size_t{grid.x} * grid.y * grid.z;
    const size_t floats = (shared_bytes + 15) / 16 * 4;
    // New memory for every block, kept until the end, so that ThreadSanitizer does not mix accesses of two blocks.
    std::vector<std::unique_ptr<float[], decltype(&free)>> kept;
    for (size_t step = 0; step < blocks; ++step) {
        const size_t block = backwards ? blocks - 1 - step : step;
        blockIdx = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                    static_cast<unsigned>(block / grid.x / grid.y)};
        kept.emplace_back(static_cast<float*>(aligned_alloc(16, (floats + guard) * sizeof(float))), &free);
        shared = kept.back().get();
        for (size_t at = 0; at < floats; ++at) shared[at] = std::numeric_limits<float>::quiet_NaN();
        memset(shared + floats, 0x5a, guard * sizeof(float));
        run_block(threads, backwards);
        for (size_t at = 0; at < guard * sizeof(float); ++at)
            if (reinterpret_cast<char*>(shared + floats)[at] != 0x5a) stop("a write past the end of shared memory");
    }
    acquire(&end_of_kernel);
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::Fiber::at_block_barrier, &cuda_on_host::block_barrier); }

CUDA_ON_HOST_OWN inline float __shfl_sync(unsigned mask, float value, int lane) {
    using namespace cuda_on_host;
    if (mask != 0xffffffffu) stop("a shuffle of part of a warp");
    const unsigned self = current;
    auto& buffer = exchanged[fibers[self].turn ^= 1];
    buffer[self] = value;
    wait(Fiber::at_warp_barrier, &warp_barriers[self / warp]);
    return buffer[self / warp * warp + lane];
}
