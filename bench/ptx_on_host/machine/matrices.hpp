// Matrix instructions: ldmatrix, stmatrix, mma.sync and wgmma.
//
// A product sums exactly in float64 and rounds towards zero once per instruction, which is not more accurate than the
// sums of tensor cores.
#pragma once

#include "access.hpp"

namespace machine {

enum Format : s32 { tf32, bf16, f16 };

inline double number(const u8* from, Format format) {
    if (format == tf32) {
        u32 word;
        memcpy(&word, from, 4);
        return from_tf32(word);
    }
    u16 half;
    memcpy(&half, from, 2);
    return format == bf16 ? from_bf16(half) : from_f16(half);
}

// Number `part` (0 or 1) of a register of an operand.
inline double number(u32 word, int part, Format format) {
    if (format == tf32) return from_tf32(word);
    const u16 half = word >> 16 * part & 0xffff;
    return format == bf16 ? from_bf16(half) : from_f16(half);
}

// A product of 16 rows of a warp: a [16][depth], b [depth][columns].
struct Product {
    int depth, columns;
    std::vector<double> a, b;

    Product(int depth, int columns) : depth(depth), columns(columns), a(16 * depth), b(depth * columns) {}

    // Reads the four registers of A: row l / 4 (+ 8 in odd registers), depth by 4 lanes (second half in registers 2, 3).
    void take_a(Warp& warp, const s32* list, Format format) {
        const int packed = format == tf32 ? 1 : 2;
        for (int i = 0; i < 4; ++i)
            for (int lane = 0; lane < lanes; ++lane)
                for (int part = 0; part < packed; ++part)
                    a[(lane / 4 + 8 * (i % 2)) * depth + packed * (lane % 4) + 4 * packed * (i / 2) + part] =
                        number(words(warp, list[i])[lane], part, format);
    }

    // sums [16][columns] of the registers: row l / 4 (+ 8), columns in pairs by 4 lanes.
    void add_to(Warp& warp, const s32* results, const s32* sums) const {
        std::vector<double> total(16 * columns, 0.0);
        const auto at = [&](int i, int lane) {
            return (lane / 4 + 8 * (i / 2 % 2)) * columns + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        };
        if (sums)
            for (int i = 0; i < columns / 2; ++i)
                for (int lane = 0; lane < lanes; ++lane) total[at(i, lane)] = bits<float>(words(warp, sums[i])[lane]);
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < depth; ++k) {
                const double left = a[row * depth + k];
                const double* right = &b[k * columns];
                double* into = &total[row * columns];
                for (int column = 0; column < columns; ++column) into[column] += left * right[column];
            }
        for (int i = 0; i < columns / 2; ++i)
            for (int lane = 0; lane < lanes; ++lane) words(warp, results[i])[lane] = bits<u32>(cut(total[at(i, lane)]));
    }
};

// mma.sync m16n8: results, A, B and sums in the list.
inline void multiply(Block& block, Warp& warp, const Instruction& instruction) {
    const Format format = static_cast<Format>(instruction.kind);
    const s32* list = block.list(instruction);
    const int packed = format == tf32 ? 1 : 2;
    Product product(8 * packed, 8);
    product.take_a(warp, list + 4, format);
    for (int i = 0; i < 2; ++i)
        for (int lane = 0; lane < lanes; ++lane)
            for (int part = 0; part < packed; ++part)
                product.b[(packed * (lane % 4) + 4 * packed * i + part) * 8 + lane / 4] =
                    number(words(warp, list[8 + i])[lane], part, format);
    product.add_to(warp, list, list + 10);
}

// ldmatrix and stmatrix: `count` matrices of 8 rows of 16 bytes; the lanes from 8 i give the rows of matrix i.
inline void move_matrices(Block& block, Warp& warp, const Instruction& instruction) {
    const s32* list = block.list(instruction);
    const bool transposed = instruction.kind, loads = instruction.operation == load_matrix;
    const u32* base = words(warp, instruction.a);
    const int given = 8 * instruction.count;
    u32 addresses[lanes];
    u8 rows[lanes][16];
    for (int lane = 0; lane < given; ++lane) {
        addresses[lane] = base[lane] + static_cast<u32>(instruction.offset);
        if (loads) memcpy(rows[lane], block.shared.read(addresses[lane], 16, block.by(warp, lane)), 16);
    }
    if (block.launch.counting) wavefronts(addresses, given == 32 ? ~0u : (1u << given) - 1, 16, block.count(instruction));
    for (int i = 0; i < instruction.count; ++i)
        for (int lane = 0; lane < lanes; ++lane) {
            u32 word = loads ? 0 : words(warp, list[i])[lane];
            for (int part = 0; part < 2; ++part) {
                const int row = transposed ? 2 * (lane % 4) + part : lane / 4;
                const int column = transposed ? lane / 4 : 2 * (lane % 4) + part;
                u8* const at = rows[8 * i + row] + 2 * column;
                u16 half = static_cast<u16>(word >> 16 * part);
                if (loads) {
                    memcpy(&half, at, 2);
                    word |= static_cast<u32>(half) << 16 * part;
                } else {
                    memcpy(at, &half, 2);
                }
            }
            if (loads) words(warp, list[i])[lane] = word;
        }
    for (int lane = 0; !loads && lane < given; ++lane)
        block.shared.write(addresses[lane], 16, block.by(warp, lane), fences(warp), rows[lane]);
}

// A matrix in shared memory, by its descriptor: rows (of A, or columns of B) and depth. Sixteen bytes are contiguous, in
// depth, or along the rows if `along` (a 16-bit matrix with the rows as its leading dimension).
struct Descriptor {
    u32 start, leading, stride, width;
    u32 flips;

    explicit Descriptor(u64 word)
        : start((word & 0x3fff) << 4), leading((word >> 16 & 0x3fff) << 4), stride((word >> 32 & 0x3fff) << 4) {
        const int swizzle = word >> 62 & 3;
        if (word >> 49 & 7) throw Error("wgmma: a descriptor with a base offset");
        width = swizzle ? 256u >> swizzle : 16;
        flips = width / 16 - 1;  // 16-byte parts within a row of `width` bytes are exchanged
    }

    // The address of the 16 bytes that contain the element; `size` bytes each.
    u32 address(int row, int k, int size, bool along) const {
        u32 at = start;
        if (!along && width > 16) {
            at += row % 8 * width + row / 8 * stride + k * size;
        } else if (!along) {
            at += row % 8 * 16 + row / 8 * stride + k * size / 16 * leading + k * size % 16;
        } else {
            at += row * size % width + k % 8 * width + row * size / width * leading + k / 8 * stride;
        }
        return (at ^ (at >> 7 & flips) << 4) & ~15u;
    }

    // Calls `take(row, k, bytes of one element)` for all elements; `chunk(address)` returns the 16 bytes there.
    template <class Chunk, class Take>
    void each(int first, int rows, int depth, Format format, bool along, Chunk chunk, Take take) const {
        const int size = format == tf32 ? 4 : 2, each = 16 / size;
        const int row_step = along ? each : 1, depth_step = along ? 1 : each;
        for (int row = first; row < first + rows; row += row_step)
            for (int k = 0; k < depth; k += depth_step) {
                const u8* const from = chunk(address(row, k, size, along));
                for (int i = 0; i < each; ++i) take(row + (along ? i : 0), k + (along ? 0 : i), from + size * i);
            }
    }
};

// A wgmma: format, columns, depth and whether A and B have the rows as their leading dimension.
struct Shape {
    Format format;
    int columns, depth;
    bool along_a, along_b, registers_a;

    explicit Shape(const Instruction& instruction)
        : format(static_cast<Format>(instruction.kind)),
          columns(static_cast<int>(instruction.offset)),
          depth(format == tf32 ? 8 : 16),
          along_a(instruction.offset_b & 1),
          along_b(instruction.offset_b & 2),
          registers_a(instruction.a < 0) {}
};

// Calls `chunk` for the shared memory that a wgmma of this warp reads, and fills the product.
template <class Chunk>
inline void read_operands(const Multiplication& one, const Warp& warp, Product* product, Chunk chunk) {
    const Shape shape(*one.instruction);
    if (!shape.registers_a) {
        const int first = 16 * (warp.number % 4);
        Descriptor(one.a).each(first, 16, shape.depth, shape.format, shape.along_a, chunk, [&](int row, int k, const u8* at) {
            if (product) product->a[(row - first) * shape.depth + k] = number(at, shape.format);
        });
    }
    Descriptor(one.b).each(0, shape.columns, shape.depth, shape.format, shape.along_b, chunk, [&](int row, int k, const u8* at) {
        if (product) product->b[k * shape.columns + row] = number(at, shape.format);
    });
}

inline void perform(Block& block, Warp& warp, const Multiplication& one) {
    const Shape shape(*one.instruction);
    const s32* list = block.list(*one.instruction);
    Product product(shape.depth, shape.columns);
    if (shape.registers_a) product.take_a(warp, list + shape.columns / 2, shape.format);
    read_operands(one, warp, &product, [&](u32 address) { return block.shared.raw(address); });
    product.add_to(warp, list, one.accumulate ? list : nullptr);
}

// Starts a wgmma: its registers must not be used and its shared memory must not be written until it is waited for.
inline void start_product(Block& block, Warp& warp, const Instruction& instruction) {
    const s32* list = block.list(instruction);
    for (int i = 0; i < instruction.count; ++i) {
        if (warp.unfenced[list[i]]) throw Error("wgmma: a register was written after the last wgmma.fence");
        ++warp.in_flight[list[i]];
    }
    const auto value = [&](s32 number) { return number < 0 ? 0 : row<u64>(warp.registers.data(), number)[0]; };
    Multiplication one{&instruction, value(instruction.a), value(instruction.b), words(warp, instruction.c)[0] != 0, {}};
    const auto fenced = [&](u32 writer, u32 epoch, u32 before) {
        const Warp& of = block.warps[writer / lanes];
        const bool by_writer = before < fences(of) && (&of == &warp || of.fence_epochs[before] < block.epoch);
        return by_writer || (fences(warp) && warp.fence_epochs.back() > epoch);
    };
    read_operands(one, warp, nullptr, [&](u32 address) {
        one.spans.push_back({address, 16});
        if (block.launch.counting) block.count(instruction).bytes += 16;
        return block.shared.start_multiply(address, 16, block.by(warp), fenced);
    });
    if (!block.launch.late) perform(block, warp, one);
    warp.open_products.push_back(std::move(one));
}

inline void commit_products(Warp& warp) {
    warp.products.push_back(std::move(warp.open_products));
    warp.open_products.clear();
}

inline void wait_for_products(Block& block, Warp& warp, s64 left) {
    while (static_cast<s64>(warp.products.size()) > left) {
        for (const Multiplication& one : warp.products.front()) {
            if (block.launch.late) perform(block, warp, one);
            for (const Span& span : one.spans) block.shared.end_multiply(span.address, span.bytes, block.by(warp));
            const s32* list = block.list(*one.instruction);
            for (int i = 0; i < one.instruction->count; ++i) --warp.in_flight[list[i]];
        }
        warp.products.pop_front();
    }
}

// For an instruction with registers that a wgmma uses: they must not be in flight; a write needs a wgmma.fence.
inline void check_tracked(Block& block, Warp& warp, const Instruction& instruction) {
    const s32* rows = block.program.lists + instruction.tracked;
    for (int i = 0; i < rows[0]; ++i) {
        const s32 row = rows[2 + i];
        if (warp.in_flight[row]) throw Error("a register of a wgmma is used before the wgmma is waited for");
        if (i < rows[1]) warp.unfenced[row] = 1;
    }
}

}  // namespace machine
