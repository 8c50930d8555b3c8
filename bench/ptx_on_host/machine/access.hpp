// Loads, stores and asynchronous copies.
#pragma once

#include "block.hpp"

namespace machine {

// The kind of a load or store: bytes of an element, whether it is signed, and whether the register has 64 bits.
struct Element {
    int bytes;
    bool sign, wide;

    explicit Element(s32 kind) : bytes(kind & 255), sign(kind >> 8 & 1), wide(kind >> 9 & 1) {}

    void take(Warp& warp, s32 number, int lane, const u8* from) const {
        u64 value = 0;
        memcpy(&value, from, bytes);
        if (sign && bytes < 8) value = static_cast<u64>(static_cast<s64>(value << (64 - 8 * bytes)) >> (64 - 8 * bytes));
        if (wide) {
            row<u64>(warp.registers.data(), number)[lane] = value;
        } else {
            words(warp, number)[lane] = static_cast<u32>(value);
        }
    }
    void give(Warp& warp, s32 number, int lane, u8* to) const {
        const u64 value = wide ? row<u64>(warp.registers.data(), number)[lane] : words(warp, number)[lane];
        memcpy(to, &value, bytes);
    }
};

template <class F>
inline void each_lane(const Block& block, u32 mask, F action) {
    for (int step = 0; step < lanes; ++step) {
        const int lane = block.launch.backwards ? lanes - 1 - step : step;
        if (mask >> lane & 1) action(lane);
    }
}

inline void shared_access(Block& block, Warp& warp, const Instruction& instruction, u32 mask) {
    const Element element(instruction.kind);
    const s32* list = block.list(instruction);
    const u32* base = words(warp, instruction.a);
    const int bytes = element.bytes * instruction.count;
    u32 addresses[lanes];
    for (int lane = 0; lane < lanes; ++lane) addresses[lane] = base[lane] + static_cast<u32>(instruction.offset);
    if (block.launch.counting) wavefronts(addresses, mask, bytes, block.count(instruction));
    each_lane(block, mask, [&](int lane) {
        if (instruction.operation == load_shared) {
            const u8* from = block.shared.read(addresses[lane], bytes, block.by(warp, lane));
            for (int i = 0; i < instruction.count; ++i) element.take(warp, list[i], lane, from + i * element.bytes);
        } else {
            u8 data[32];
            for (int i = 0; i < instruction.count; ++i) element.give(warp, list[i], lane, data + i * element.bytes);
            block.shared.write(addresses[lane], bytes, block.by(warp, lane), fences(warp), data);
        }
    });
}

inline void global_access(Block& block, Warp& warp, const Instruction& instruction, u32 mask) {
    const Element element(instruction.kind);
    const s32* list = block.list(instruction);
    const u64* base = row<u64>(warp.registers.data(), instruction.a);
    const int bytes = element.bytes * instruction.count;
    u64 addresses[lanes];
    for (int lane = 0; lane < lanes; ++lane) addresses[lane] = base[lane] + instruction.offset;
    if (block.launch.counting) sectors(addresses, mask, bytes, block.count(instruction));
    each_lane(block, mask, [&](int lane) {
        if (instruction.operation == load_global) {
            const u8* from = block.global.read(addresses[lane], bytes, block.by(warp, lane));
            for (int i = 0; i < instruction.count; ++i) element.take(warp, list[i], lane, from + i * element.bytes);
        } else {
            u8 data[32];
            for (int i = 0; i < instruction.count; ++i) element.give(warp, list[i], lane, data + i * element.bytes);
            block.global.write(addresses[lane], bytes, block.by(warp, lane), data);
        }
    });
}

inline void parameter_access(Block& block, Warp& warp, const Instruction& instruction, u32 mask) {
    const Element element(instruction.kind);
    const s32* list = block.list(instruction);
    const u32* base = words(warp, instruction.a);
    each_lane(block, mask, [&](int lane) {
        const s64 at = base[lane] + instruction.offset;
        if (at < 0 || at + element.bytes * instruction.count > block.launch.parameter_bytes)
            throw Error("a parameter that does not exist");
        for (int i = 0; i < instruction.count; ++i)
            element.take(warp, list[i], lane, block.launch.parameters + at + i * element.bytes);
    });
}

// cp.async: `taken` bytes come from global memory, the others are zero.
inline void perform(Block& block, const Copy& copy) {
    u8 data[16] = {};
    if (copy.taken) memcpy(data, reinterpret_cast<const u8*>(copy.from), copy.taken);
    memcpy(const_cast<u8*>(block.shared.raw(copy.to)), data, copy.bytes);
}

inline void start_copies(Block& block, Warp& warp, const Instruction& instruction, u32 mask) {
    const u32* to = words(warp, instruction.a);
    const u64* from = row<u64>(warp.registers.data(), instruction.b);
    const u32* taken = instruction.c < 0 ? nullptr : words(warp, instruction.c);
    const int bytes = instruction.kind;
    u32 targets[lanes], reading = 0;
    u64 sources[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
        targets[lane] = to[lane] + static_cast<u32>(instruction.offset);
        sources[lane] = from[lane] + instruction.offset_b;
    }
    each_lane(block, mask, [&](int lane) {
        const Copy copy{targets[lane], sources[lane], bytes, taken ? static_cast<int>(taken[lane]) : bytes, lane};
        if (copy.taken < 0 || copy.taken > bytes) throw Error("cp.async: more bytes than its size");
        if (copy.taken) {
            if (copy.from % bytes) throw Error("cp.async: a misaligned source");
            // A partial copy reads whole elements; its source must be inside as far as it is taken.
            block.global.read(copy.from, copy.taken == bytes ? bytes : 1, block.by(warp, lane));
            block.global.read(copy.from + copy.taken - 1, 1, block.by(warp, lane));
            reading |= 1u << lane;
        }
        u8* at = block.shared.start_copy(copy.to, bytes, block.by(warp, lane), fences(warp));
        if (block.launch.late) {
            memset(at, 0xff, bytes);
        } else {
            perform(block, copy);
        }
        warp.open_copies.push_back(copy);
    });
    if (block.launch.counting) sectors(sources, reading, bytes, block.count(instruction));
}

inline void commit_copies(Warp& warp) {
    warp.copies.push_back(std::move(warp.open_copies));
    warp.open_copies.clear();
}

inline void wait_for_copies(Block& block, Warp& warp, s64 left) {
    while (static_cast<s64>(warp.copies.size()) > left) {
        for (const Copy& copy : warp.copies.front()) {
            if (block.launch.late) perform(block, copy);
            block.shared.end_copy(copy.to, copy.bytes, block.by(warp, copy.lane), fences(warp));
        }
        warp.copies.pop_front();
    }
}

}  // namespace machine
