// C_base -= U^T D U. No GPU has run this yet.
//
// One block owns one 64 x 64 tile of the lower triangle, computes it and writes it and its mirror image, so every
// element has one writer and the result is exactly symmetric.
#include "status.cuh"

namespace {

constexpr int tile = 64;     // rows and columns of a block's tile
constexpr int depth = 16;    // pending rows staged at a time
constexpr int side = 16;     // threads along each side of a block
constexpr int each = tile / side;  // a thread's elements along each side, `side` apart

__global__ __launch_bounds__(side * side) void downdate(float* base, int64_t base_stride, const float* pending,
                                                        int64_t pending_stride, const float* signs, int64_t d,
                                                        int64_t r) {
    __shared__ float left[depth][tile], right[depth][tile];
    __shared__ float result[tile][tile + 1];  // one column more: columns are then read without bank conflicts

    // Block b is tile (ti, tj) with b = ti (ti + 1) / 2 + tj and tj <= ti; the root may be off by one in floating point.
    const int64_t b = blockIdx.x;
    int64_t ti = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(b) + 1.0) - 1.0) / 2.0);
    while (ti * (ti + 1) / 2 > b) --ti;
    while ((ti + 1) * (ti + 2) / 2 <= b) ++ti;
    const int64_t row = ti * tile, column = (b - ti * (ti + 1) / 2) * tile;

    const int x = threadIdx.x, y = threadIdx.y, thread = y * side + x;
    float sum[each][each] = {};
    for (int64_t k0 = 0; k0 < r; k0 += depth) {
        for (int at = thread; at < depth * tile; at += side * side) {
            const int k = at / tile, j = at % tile;
            const bool inside = k0 + k < r;
            const float* from = pending + (k0 + k) * pending_stride;
            left[k][j] = inside && row + j < d ? signs[k0 + k] * from[row + j] : 0.0f;
            right[k][j] = inside && column + j < d ? from[column + j] : 0.0f;
        }
        __syncthreads();
        for (int k = 0; k < depth; ++k)
            for (int i = 0; i < each; ++i)
                for (int j = 0; j < each; ++j) sum[i][j] += left[k][y + i * side] * right[k][x + j * side];
        __syncthreads();
    }

    for (int i = 0; i < each; ++i) {
        for (int j = 0; j < each; ++j) {
            const int64_t at_row = row + y + i * side, at_column = column + x + j * side;
            if (at_row >= d || at_column > at_row) continue;  // at_column <= at_row < d
            float* element = base + at_row * base_stride + at_column;
            *element -= sum[i][j];
            result[y + i * side][x + j * side] = *element;
        }
    }
    __syncthreads();
    for (int i = 0; i < each; ++i) {
        for (int j = 0; j < each; ++j) {
            const int64_t at_row = column + y + i * side, at_column = row + x + j * side;
            if (at_column >= d || at_column <= at_row) continue;  // strictly above the diagonal
            base[at_row * base_stride + at_column] = result[x + j * side][y + i * side];
        }
    }
}

}  // namespace

extern "C" int rlsedit_cuda_downdate(float* base, int64_t base_stride, const float* pending, int64_t pending_stride,
                                     const float* signs, int64_t d, int64_t r, int device, void* stream) {
    using rlsedit::fail;
    if (d < 1 || r < 0) {
        return fail(RLSEDIT_BAD_ARGUMENT, "downdate: d=%lld, r=%lld: expected d >= 1 and r >= 0", (long long)d,
                    (long long)r);
    }
    if (base_stride < d || (r > 0 && pending_stride < d)) {
        return fail(RLSEDIT_BAD_ARGUMENT, "downdate: row strides %lld and %lld: expected at least d=%lld",
                    (long long)base_stride, (long long)pending_stride, (long long)d);
    }
    if (!base || (r > 0 && (!pending || !signs))) return fail(RLSEDIT_BAD_ARGUMENT, "downdate: a pointer is null");
    const int64_t tiles = (d + tile - 1) / tile, blocks = tiles * (tiles + 1) / 2;
    if (blocks > INT32_MAX) return fail(RLSEDIT_BAD_ARGUMENT, "downdate: d=%lld is too large", (long long)d);

    rlsedit::OnDevice scope(device);
    if (int status = rlsedit::check(scope.error(), "downdate: choosing the device")) return status;
    downdate<<<static_cast<unsigned>(blocks), dim3(side, side), 0, static_cast<cudaStream_t>(stream)>>>(
        base, base_stride, pending, pending_stride, signs, d, r);
    return rlsedit::check(cudaGetLastError(), "downdate: launching");
}
