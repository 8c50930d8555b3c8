// Cholesky of the n x n innovation covariance and forward substitution with it, in one launch. No GPU has run this yet.
//
// Every block factors the matrix for itself in shared memory (cheaper than a second launch) and then solves for its own
// columns, one a thread; block 0 writes the factor and the verdict.
#include "status.cuh"

namespace {

constexpr int threads = 128;
constexpr int64_t most_edits = 128;
constexpr size_t unasked_shared_memory = 48 << 10;  // more must be asked for

__global__ __launch_bounds__(threads) void factor(const float* gram, const float* noise, const float* projected,
                                                  const float* innovation, float* u, float* a, float* lower,
                                                  int32_t* info, int n, int64_t d_k, int64_t d_v, float sign) {
    extern __shared__ float matrix[];
    const int stride = n + 1;  // odd for even n: columns are then read without bank conflicts
    auto at = [&](int i, int j) -> float& { return matrix[i * stride + j]; };

    for (int e = threadIdx.x; e < n * n; e += threads) {
        const int i = e / n, j = e % n;
        at(i, j) = (i == j ? noise[i] : 0.0f) + 0.5f * sign * (gram[i * n + j] + gram[j * n + i]);
    }
    __syncthreads();

    for (int j = 0; j < n; ++j) {
        const float pivot = at(j, j);
        if (!(pivot > 0.0f)) {  // also when it is not a number; every thread of every block sees the same pivot
            if (blockIdx.x == 0 && threadIdx.x == 0) *info = j + 1;
            return;
        }
        __syncthreads();  // all have read the pivot
        const float root = sqrtf(pivot);
        for (int i = j + threadIdx.x; i < n; i += threads) at(i, j) = i == j ? root : at(i, j) / root;
        __syncthreads();
        const int rest = n - j - 1;
        for (int e = threadIdx.x; e < rest * rest; e += threads) {
            const int i = j + 1 + e / rest, k = j + 1 + e % rest;
            if (k <= i) at(i, k) -= at(i, j) * at(k, j);
        }
        __syncthreads();
    }

    if (blockIdx.x == 0) {
        for (int e = threadIdx.x; e < n * n; e += threads) lower[e] = e % n <= e / n ? at(e / n, e % n) : 0.0f;
        if (threadIdx.x == 0) *info = 0;
    }

    int64_t column = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
    if (column >= d_k + d_v) return;
    const bool of_keys = column < d_k;
    const int64_t width = of_keys ? d_k : d_v;
    if (!of_keys) column -= d_k;
    const float* right = (of_keys ? projected : innovation) + column;
    float* solved = (of_keys ? u : a) + column;
    for (int i = 0; i < n; ++i) {
        float rest = right[i * width];
        for (int k = 0; k < i; ++k) rest -= at(i, k) * solved[k * width];
        solved[i * width] = rest / at(i, i);
    }
}

}  // namespace

extern "C" int rlsedit_cuda_factor(const float* gram, const float* noise, const float* projected,
                                   const float* innovation, float* u, float* a, float* lower, int32_t* info, int64_t n,
                                   int64_t d_k, int64_t d_v, int sign, int device, void* stream) {
    using rlsedit::fail;
    if (n < 1 || n > most_edits || d_k < 1 || d_v < 1 || d_k + d_v > static_cast<int64_t>(INT32_MAX) * threads) {
        return fail(RLSEDIT_BAD_ARGUMENT, "factor: n=%lld, d_k=%lld, d_v=%lld: expected n in 1..%lld and d_k, d_v >= 1",
                    (long long)n, (long long)d_k, (long long)d_v, (long long)most_edits);
    }
    if (sign != 1 && sign != -1) return fail(RLSEDIT_BAD_ARGUMENT, "factor: sign=%d: expected 1 or -1", sign);
    if (!gram || !noise || !projected || !innovation || !u || !a || !lower || !info) {
        return fail(RLSEDIT_BAD_ARGUMENT, "factor: a pointer is null");
    }

    rlsedit::OnDevice scope(device);
    if (int status = rlsedit::check(scope.error(), "factor: choosing the device")) return status;
    const size_t shared = static_cast<size_t>(n) * (n + 1) * sizeof(float);
    if (shared > unasked_shared_memory) {
        const cudaError_t asked =
            cudaFuncSetAttribute(factor, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (int status = rlsedit::check(asked, "factor: asking for shared memory")) return status;
    }
    const int64_t blocks = (d_k + d_v + threads - 1) / threads;
    factor<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(
        gram, noise, projected, innovation, u, a, lower, info, static_cast<int>(n), d_k, d_v, static_cast<float>(sign));
    return rlsedit::check(cudaGetLastError(), "factor: launching");
}
