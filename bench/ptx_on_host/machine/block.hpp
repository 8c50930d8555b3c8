// The state of a block and its warps.
#pragma once

#include <deque>
#include <vector>

#include "memory.hpp"

namespace machine {

struct Copy {
    u32 to;
    u64 from;
    int bytes, taken, lane;
};

// Of a wgmma that may still run: the bytes of shared memory that it reads.
struct Span {
    u32 address;
    int bytes;
};
struct Multiplication {
    const Instruction* instruction;
    u64 a, b;
    bool accumulate;
    std::vector<Span> spans;
};

struct Fragment {
    u32 pc, mask;
};

struct Warp {
    u32 number;
    std::vector<u32> registers;
    std::vector<Fragment> fragments;  // lanes by the instruction that they execute next
    u32 live;
    bool waiting;  // at a barrier

    std::vector<Copy> open_copies;
    std::deque<std::vector<Copy>> copies;
    std::vector<Multiplication> open_products;
    std::deque<std::vector<Multiplication>> products;

    std::vector<u32> fence_epochs;  // of the proxy fences so far
    std::vector<u8> in_flight;      // by row of registers: how many unfinished wgmma use it
    std::vector<u8> unfenced;       // by row: written after the last wgmma.fence
};

struct Block {
    const Program& program;
    const Launch& launch;
    Count* counts;
    Global& global;
    Shared& shared;
    std::vector<Warp>& warps;
    u32 number = 0, epoch = 0;

    Access by(const Warp& warp, int lane = 0) const { return {number, warp.number * lanes + lane, epoch}; }
    Count& count(const Instruction& instruction) const { return counts[&instruction - program.code]; }
    const s32* list(const Instruction& instruction) const { return program.lists + instruction.first; }
};

inline u32* words(Warp& warp, s32 number) { return row<u32>(warp.registers.data(), number); }

inline u32 fences(const Warp& warp) { return static_cast<u32>(warp.fence_epochs.size()); }

}  // namespace machine
