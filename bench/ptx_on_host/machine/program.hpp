// The interface with Python: translated instructions, launches and counts. `machine.py` declares the same structures.
#pragma once

#include <stdexcept>
#include <string>

#include "numbers.hpp"

namespace machine {

enum Operation : s32 {
#define UNARY(name, ...) name,
#define BINARY(name, ...) name,
#define TERNARY(name, ...) name,
#include "operations.inc"
#undef UNARY
#undef BINARY
#undef TERNARY
#define OTHER(name) name,
#include "others.inc"
#undef OTHER
};

// Operands are numbers of register rows; `first` and `count` select operands of a vector in the list of the program.
struct Instruction {
    s32 operation;
    s32 guard;    // row of a predicate, or -1
    s32 negated;  // whether the guard is negated
    s32 result, a, b, c;
    s32 first, count;
    s32 kind;  // see the operation
    s32 line;
    s32 tracked;  // whether an operand is a register of a wgmma: the rows to check are in the list, before `first`
    s64 offset, offset_b;
};

struct Constant {
    s32 row, wide;
    u64 value;
};

// Rows of the special registers, or -1.
struct Specials {
    s32 thread, lane, threads, block[3], blocks[3];
};

struct Program {
    const Instruction* code;
    const s32* lists;
    const Constant* constants;
    s32 size, constant_count, rows;
    s32 granule;  // bytes of shared memory that are checked together
    Specials specials;
};

// Global memory that a kernel may access.
struct Region {
    u64 begin, bytes;
    s64 granule;
};

struct Launch {
    const u8* parameters;
    const Region* regions;
    s32 parameter_bytes, region_count;
    u32 grid[3];
    u32 threads, shared;
    s32 late;       // asynchronous instructions run when they are waited for, else at once
    s32 backwards;  // blocks, warps and lanes in reverse order
    s32 counting;
    s64 limit;  // instructions of warps
};

// Of one instruction: executions by warps, accesses to memory, wavefronts of shared memory or sectors of global memory,
// the fewest possible for the same bytes, and bytes.
struct Count {
    s64 executed, requests, units, least, bytes;
};

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace machine
