// Runs a translated kernel: blocks one after the other, and in a block a warp as far as it gets, then the next.
//
// The lanes of a warp execute an instruction together. Lanes that diverge are fragments; those at the lowest instruction
// run first, so that they meet again where the paths join.
#include <cstdio>

#include "matrices.hpp"

namespace machine {
namespace {

template <class R, class F>
inline void assign(u32* registers, s32 result, u32 mask, F value) {
    auto* to = row<R>(registers, result);
    if (mask == ~0u) {
#pragma GCC ivdep
        for (int lane = 0; lane < lanes; ++lane) to[lane] = stored<R>(static_cast<R>(value(lane)));
    } else {
        for (int lane = 0; lane < lanes; ++lane)
            if (mask >> lane & 1) to[lane] = stored<R>(static_cast<R>(value(lane)));
    }
}

u32 lanes_of(Warp& warp, const Instruction& instruction, u32 mask) {
    if (instruction.guard < 0) return mask;
    const u32* values = words(warp, instruction.guard);
    u32 set = 0;
    for (int lane = 0; lane < lanes; ++lane) set |= static_cast<u32>(values[lane] != 0) << lane;
    return mask & (instruction.negated ? ~set : set);
}

void shuffled(Warp& warp, const Instruction& instruction, u32 mask) {
    const u32* value = words(warp, instruction.a);
    const u32* by = words(warp, instruction.b);
    u32 result[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
        int from = 0;
        switch (instruction.kind) {
            case 0: from = by[lane] & 31; break;
            case 1: from = lane ^ (by[lane] & 31); break;
            case 2: from = lane + by[lane] < lanes ? lane + by[lane] : lane; break;
            case 3: from = static_cast<u32>(lane) >= by[lane] ? lane - by[lane] : lane; break;
        }
        if ((mask >> lane & 1) && !(mask >> from & 1)) throw Error("shfl: from a lane that does not take part");
        result[lane] = value[from];
    }
    assign<u32>(warp.registers.data(), instruction.result, mask, [&](int lane) { return result[lane]; });
}

class Runner {
  public:
    Runner(Block& block, s64* left) : block_(block), left_(left) {}

    // Runs the warp up to a barrier or its end.
    void run(Warp& warp) {
        while (!warp.fragments.empty()) {
            Fragment now = lowest(warp);
            const u32 next = warp.fragments.empty() ? ~0u : lowest_pc(warp);
            while (now.pc < next) {
                const Instruction& instruction = block_.program.code[now.pc];
                at_ = &instruction, warp_ = &warp;
                if (--*left_ < 0) throw Error("more instructions than the limit");
                const u32 mask = lanes_of(warp, instruction, now.mask);
                if (mask) ++block_.count(instruction).executed;
                if (instruction.operation == branch) {
                    const u32 stay = now.mask & ~mask, target = static_cast<u32>(instruction.offset);
                    if (stay && mask) {
                        warp.fragments.push_back({target, mask});
                        warp.fragments.push_back({now.pc + 1, stay});
                        now.mask = 0;
                        break;
                    }
                    now.pc = mask ? target : now.pc + 1;
                    continue;
                }
                ++now.pc;
                if (!mask) continue;
                if (instruction.operation == leave) {
                    warp.live &= ~mask, now.mask &= ~mask;
                    if (!now.mask) break;
                } else if (instruction.operation == barrier) {
                    if (mask != warp.live || mask != now.mask) throw Error("bar.sync: not all lanes of the warp reach it");
                    warp.fragments.push_back(now);
                    warp.waiting = true;
                    return;
                } else {
                    execute(warp, instruction, mask);
                }
            }
            if (now.mask) warp.fragments.push_back(now);
        }
    }

    std::string place() const {
        char text[200];
        snprintf(text, sizeof text, " (line %d of the PTX, block %u, warp %u)", at_ ? at_->line : 0, block_.number,
                 warp_ ? warp_->number : 0);
        return text;
    }

  private:
    static u32 lowest_pc(const Warp& warp) {
        u32 pc = ~0u;
        for (const Fragment& fragment : warp.fragments) pc = std::min(pc, fragment.pc);
        return pc;
    }

    // Removes the fragments at the lowest instruction and returns them as one.
    static Fragment lowest(Warp& warp) {
        Fragment joined{lowest_pc(warp), 0};
        size_t kept = 0;
        for (const Fragment& fragment : warp.fragments) {
            if (fragment.pc == joined.pc) {
                joined.mask |= fragment.mask;
            } else {
                warp.fragments[kept++] = fragment;
            }
        }
        warp.fragments.resize(kept);
        return joined;
    }

    void whole(const Warp& warp, u32 mask) const {
        if (mask != ~0u || warp.live != ~0u) throw Error("an instruction of whole warps is executed by a part of a warp");
    }

    // sqrt.approx: an error of one unit in the last place, up or down by the order of execution.
    float inexact(float x) const {
        return x > 0 && std::isfinite(x) ? bits<float>(bits<u32>(x) + (block_.launch.backwards ? 1 : -1)) : x;
    }

    void execute(Warp& warp, const Instruction& instruction, u32 mask) {
        if (instruction.tracked >= 0) check_tracked(block_, warp, instruction);
        u32* const registers = warp.registers.data();
        switch (instruction.operation) {
#define UNARY(name, R, A, value)                                   \
    case name: {                                                   \
        const auto* as = row<A>(registers, instruction.a);         \
        assign<R>(registers, instruction.result, mask, [=](int lane) { \
            const A a = load<A>(as[lane]);                         \
            return value;                                          \
        });                                                        \
        break;                                                     \
    }
#define BINARY(name, R, A, B, value)                               \
    case name: {                                                   \
        const auto* as = row<A>(registers, instruction.a);         \
        const auto* bs = row<B>(registers, instruction.b);         \
        assign<R>(registers, instruction.result, mask, [=](int lane) { \
            const A a = load<A>(as[lane]);                         \
            const B b = load<B>(bs[lane]);                         \
            return value;                                          \
        });                                                        \
        break;                                                     \
    }
#define TERNARY(name, R, A, B, C, value)                           \
    case name: {                                                   \
        const auto* as = row<A>(registers, instruction.a);         \
        const auto* bs = row<B>(registers, instruction.b);         \
        const auto* cs = row<C>(registers, instruction.c);         \
        assign<R>(registers, instruction.result, mask, [=](int lane) { \
            const A a = load<A>(as[lane]);                         \
            const B b = load<B>(bs[lane]);                         \
            const C c = load<C>(cs[lane]);                         \
            return value;                                          \
        });                                                        \
        break;                                                     \
    }
#include "operations.inc"
#undef UNARY
#undef BINARY
#undef TERNARY
            case load_parameter: parameter_access(block_, warp, instruction, mask); break;
            case load_shared:
            case store_shared: shared_access(block_, warp, instruction, mask); break;
            case load_global:
            case store_global: global_access(block_, warp, instruction, mask); break;
            case shuffle: shuffled(warp, instruction, mask); break;
            case load_matrix:
            case store_matrix: whole(warp, mask), move_matrices(block_, warp, instruction); break;
            case multiply_matrix: whole(warp, mask), multiply(block_, warp, instruction); break;
            case copy: start_copies(block_, warp, instruction, mask); break;
            case copy_commit: whole(warp, mask), commit_copies(warp); break;
            case copy_wait: whole(warp, mask), wait_for_copies(block_, warp, instruction.offset); break;
            case proxy_fence: whole(warp, mask), warp.fence_epochs.push_back(block_.epoch); break;
            case wgmma: whole(warp, mask), start_product(block_, warp, instruction); break;
            case wgmma_fence: whole(warp, mask), std::fill(warp.unfenced.begin(), warp.unfenced.end(), 0); break;
            case wgmma_commit: whole(warp, mask), commit_products(warp); break;
            case wgmma_wait: whole(warp, mask), wait_for_products(block_, warp, instruction.offset); break;
            default: break;
        }
    }

    Block& block_;
    s64* left_;
    const Instruction* at_ = nullptr;
    const Warp* warp_ = nullptr;
};

void fill(Warp& warp, s32 number, u32 value) {
    if (number >= 0) std::fill_n(words(warp, number), lanes, value);
}

void prepare(const Program& program, const Launch& launch, Warp& warp, u32 number) {
    warp.number = number;
    warp.registers.assign(static_cast<size_t>(program.rows) * lanes, ~0u);
    for (s32 i = 0; i < program.constant_count; ++i) {
        const Constant& constant = program.constants[i];
        if (constant.wide) {
            std::fill_n(row<u64>(warp.registers.data(), constant.row), lanes, constant.value);
        } else {
            fill(warp, constant.row, static_cast<u32>(constant.value));
        }
    }
    const Specials& specials = program.specials;
    for (int lane = 0; lane < lanes; ++lane) {
        if (specials.thread >= 0) words(warp, specials.thread)[lane] = number * lanes + lane;
        if (specials.lane >= 0) words(warp, specials.lane)[lane] = lane;
    }
    fill(warp, specials.threads, launch.threads);
    for (int axis = 0; axis < 3; ++axis) fill(warp, specials.blocks[axis], launch.grid[axis]);
}

void start(const Program& program, Warp& warp, const u32* index) {
    for (int axis = 0; axis < 3; ++axis) fill(warp, program.specials.block[axis], index[axis]);
    warp.fragments.assign(1, {0, ~0u});
    warp.live = ~0u;
    warp.waiting = false;
    warp.open_copies.clear(), warp.copies.clear();
    warp.open_products.clear(), warp.products.clear();
    warp.fence_epochs.clear();
    warp.in_flight.assign(program.rows, 0);
    warp.unfenced.assign(program.rows, 0);
}

void run_block(Block& block, Runner& runner) {
    std::vector<Warp>& warps = block.warps;
    const size_t size = warps.size();
    for (size_t done = 0; done < size;) {
        done = 0;
        size_t waiting = 0;
        for (size_t step = 0; step < size; ++step) {
            Warp& warp = warps[block.launch.backwards ? size - 1 - step : step];
            if (!warp.waiting) runner.run(warp);
            waiting += warp.waiting;
            done += warp.fragments.empty();
        }
        if (waiting && waiting < size) throw Error("bar.sync: some warps have ended");
        for (Warp& warp : warps) warp.waiting = false;
        ++block.epoch;
    }
    for (const Warp& warp : warps)
        for (const auto& group : warp.products)
            if (!group.empty()) throw Error("the kernel ends before a wgmma is waited for");
}

}  // namespace
}  // namespace machine

// Returns 0, or 1 and a message.
extern "C" int ptx_run(const machine::Program* program, const machine::Launch* launch, machine::Count* counts,
                       char* message, size_t message_size) {
    using namespace machine;
    std::string place;
    try {
        Global global(*launch);
        Shared shared(launch->shared, program->granule);
        std::vector<Warp> warps(launch->threads / lanes);
        for (u32 i = 0; i < warps.size(); ++i) prepare(*program, *launch, warps[i], i);
        Block block{*program, *launch, counts, global, shared, warps};
        s64 left = launch->limit;
        Runner runner(block, &left);
        const u64 size = static_cast<u64>(launch->grid[0]) * launch->grid[1] * launch->grid[2];
        for (u64 step = 0; step < size; ++step) {
            const u64 number = launch->backwards ? size - 1 - step : step;
            const u32 index[3] = {static_cast<u32>(number % launch->grid[0]),
                                  static_cast<u32>(number / launch->grid[0] % launch->grid[1]),
                                  static_cast<u32>(number / launch->grid[0] / launch->grid[1])};
            block.number = static_cast<u32>(number);
            block.epoch = 0;
            if (step) shared.clear();
            for (Warp& warp : warps) start(*program, warp, index);
            try {
                run_block(block, runner);
            } catch (const Error&) {
                place = runner.place();
                throw;
            }
        }
        return 0;
    } catch (const std::exception& error) {
        snprintf(message, message_size, "%s%s", error.what(), place.c_str());
        return 1;
    }
}
