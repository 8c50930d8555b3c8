// Shared and global memory with checks of every access.
//
// Every word has a record of its last write and its last reads. Two accesses of different threads to the same word, one
// of them a write, are an error unless a barrier is between them; in global memory, also if they are of different blocks.
// So a missing barrier is found in any order of execution. Threads of a block may write the same value.
#pragma once

#include <vector>

#include "program.hpp"

namespace machine {

constexpr u32 nobody = 0xffffffffu, many = 0xfffffffeu;

// Who accesses memory, and when: `epoch` counts the barriers of the block.
struct Access {
    u32 block, thread, epoch;
};

struct Record {
    u32 writer = nobody, write_block = 0, write_epoch = 0;
    u32 reader = nobody, read_block = 0, read_epoch = 0;

    void read(const Access& by, const char* where) {
        if (writer != nobody) {
            if (write_block != by.block) throw Error(std::string(where) + ": another block writes what is read");
            if (writer != by.thread && write_epoch == by.epoch)
                throw Error(std::string(where) + ": thread " + std::to_string(by.thread) + " reads what thread " +
                            std::to_string(writer) + " writes, with no barrier between them");
        }
        if (reader != nobody && read_block != by.block) {
            read_block = many;
        } else if (reader == nobody || read_epoch != by.epoch) {
            reader = by.thread, read_block = by.block, read_epoch = by.epoch;
        } else if (reader != by.thread) {
            reader = many;
        }
    }

    void write(const Access& by, const char* where, bool same = false) {
        if (writer != nobody) {
            if (write_block != by.block) throw Error(std::string(where) + ": two blocks write the same word");
            if (writer != by.thread && write_epoch == by.epoch && !same)
                throw Error(std::string(where) + ": threads " + std::to_string(by.thread) + " and " +
                            std::to_string(writer) + " write the same word, with no barrier between them");
        }
        if (reader != nobody) {
            if (read_block != by.block) throw Error(std::string(where) + ": another block reads what is written");
            if (reader != by.thread && read_epoch == by.epoch)
                throw Error(std::string(where) + ": thread " + std::to_string(by.thread) +
                            " writes what another thread reads, with no barrier between them");
        }
        writer = by.thread, write_block = by.block, write_epoch = by.epoch;
    }
};

class Global {
  public:
    explicit Global(const Launch& launch) {
        for (s32 i = 0; i < launch.region_count; ++i) {
            const Region& region = launch.regions[i];
            kept_.push_back({region, std::vector<Record>((region.bytes + region.granule - 1) / region.granule)});
        }
    }

    u8* read(u64 address, int bytes, const Access& by) {
        each(address, bytes, "a read", [&](Record& record, u64, u64) { record.read(by, "global memory"); });
        return reinterpret_cast<u8*>(address);
    }
    void write(u64 address, int bytes, const Access& by, const u8* data) {
        u8* const to = reinterpret_cast<u8*>(address);
        each(address, bytes, "a write", [&](Record& record, u64 at, u64 size) {
            const u64 part = at - address;
            record.write(by, "global memory", part < static_cast<u64>(bytes) && !memcmp(to + part, data + part, size));
        });
        memcpy(to, data, bytes);
    }

  private:
    struct Kept {
        Region region;
        std::vector<Record> records;
    };

    template <class F>
    void each(u64 address, int bytes, const char* what, F check) {
        if (address % bytes) throw Error(std::string("global memory: ") + what + " at a misaligned address");
        if (last_ >= kept_.size() || !inside(kept_[last_], address, bytes)) {
            last_ = 0;
            while (last_ < kept_.size() && !inside(kept_[last_], address, bytes)) ++last_;
            if (last_ == kept_.size()) throw Error(std::string("global memory: ") + what + " outside every tensor");
        }
        Kept& kept = kept_[last_];
        const u64 at = address - kept.region.begin, granule = kept.region.granule;
        const u64 size = std::min<u64>(granule, bytes);
        for (u64 word = at / granule; word * granule < at + bytes; ++word)
            check(kept.records[word], kept.region.begin + word * granule, size);
    }
    static bool inside(const Kept& kept, u64 address, int bytes) {
        return address >= kept.region.begin && address + bytes <= kept.region.begin + kept.region.bytes;
    }

    std::vector<Kept> kept_;
    size_t last_ = 0;
};

// Shared memory of the block that runs. It starts as NaN.
//
// Asynchronous instructions: a word is `copying` while a cp.async to it may run, and `multiplying` as often as a wgmma
// that may run reads it. A word that a thread wrote must pass a proxy fence before a wgmma reads it: of the writer before
// the barrier, or of the reader after it; `fences` counts the writer's before the write.
class Shared {
  public:
    Shared(u32 bytes, s32 granule) : memory_(bytes, 0xff), granule_(granule), records_(bytes / granule + 1) {}

    void clear() {
        std::fill(memory_.begin(), memory_.end(), 0xff);
        std::fill(records_.begin(), records_.end(), Word{});
    }

    u8* read(u32 address, int bytes, const Access& by) {
        each(address, bytes, [&](Word& word, u32) { word.read(by); });
        return &memory_[address];
    }
    void write(u32 address, int bytes, const Access& by, u32 fences, const u8* data) {
        each(address, bytes, [&](Word& word, u32 at) {
            word.write(by, fences, !memcmp(&memory_[at], data + (at - address), granule_));
        });
        memcpy(&memory_[address], data, bytes);
    }
    // A cp.async starts: it may write until it ends.
    u8* start_copy(u32 address, int bytes, const Access& by, u32 fences) {
        each(address, bytes, [&](Word& word, u32) { word.write(by, fences, false), word.copying = true; });
        return &memory_[address];
    }
    void end_copy(u32 address, int bytes, const Access& by, u32 fences) {
        each(address, bytes, [&](Word& word, u32) {
            word.copying = false;
            word.record.write(by, "shared memory");
            word.fences = fences;
        });
    }
    // A wgmma starts: `fenced(writer, epoch, fences)` returns whether a write has passed a proxy fence.
    template <class F>
    const u8* start_multiply(u32 address, int bytes, const Access& by, F fenced) {
        each(address, bytes, [&](Word& word, u32) {
            word.read(by);
            if (word.record.writer != nobody && !fenced(word.record.writer, word.record.write_epoch, word.fences))
                throw Error("shared memory: wgmma reads what thread " + std::to_string(word.record.writer) +
                            " writes, with no fence.proxy.async between them");
            ++word.multiplying;
        });
        return &memory_[address];
    }
    void end_multiply(u32 address, int bytes, const Access& by) {
        each(address, bytes, [&](Word& word, u32) {
            --word.multiplying;
            word.record.read(by, "shared memory");
        });
    }
    const u8* raw(u32 address) const { return &memory_[address]; }

  private:
    struct Word {
        Record record;
        u32 fences = 0;
        u16 multiplying = 0;
        bool copying = false;

        void read(const Access& by) {
            if (copying) throw Error("shared memory: a read of what an unfinished cp.async writes");
            record.read(by, "shared memory");
        }
        void write(const Access& by, u32 now, bool same) {
            if (copying) throw Error("shared memory: a write to what an unfinished cp.async writes");
            if (multiplying) throw Error("shared memory: a write to what an unfinished wgmma reads");
            record.write(by, "shared memory", same);
            fences = now;
        }
    };

    template <class F>
    void each(u32 address, int bytes, F check) {
        if (address + static_cast<u64>(bytes) > memory_.size())
            throw Error("shared memory: byte " + std::to_string(address) + " of " + std::to_string(memory_.size()));
        if (address % bytes) throw Error("shared memory: a misaligned address");
        for (u32 at = address; at < address + bytes; at += granule_) check(records_[at / granule_], at);
    }

    std::vector<u8> memory_;
    u32 granule_;
    std::vector<Word> records_;
};

// Wavefronts of shared memory of one request, and the fewest for its bytes: lanes whose words fill 128 bytes go together
// and a bank gives one word at a time.
inline void wavefronts(const u32* addresses, u32 mask, int bytes, Count& count) {
    const int together = bytes <= 4 ? lanes : 128 / bytes;
    ++count.requests;
    for (int start = 0; start < lanes; start += together) {
        u32 words[32][32];
        int used[32] = {}, most = 0;
        for (int lane = start; lane < start + together; ++lane) {
            if (!(mask >> lane & 1)) continue;
            count.bytes += bytes;
            for (int part = 0; part < bytes; part += 4) {
                const u32 word = (addresses[lane] + part) / 4, bank = word % 32;
                int i = 0;
                while (i < used[bank] && words[bank][i] != word) ++i;
                if (i == used[bank]) words[bank][used[bank]++] = word;
                most = std::max(most, used[bank]);
            }
        }
        count.units += most;
        count.least += most > 0;
    }
}

// Sectors of 32 bytes of one request to global memory, and the fewest for its bytes.
inline void sectors(const u64* addresses, u32 mask, int bytes, Count& count) {
    u64 seen[32];
    int used = 0, active = 0;
    ++count.requests;
    for (int lane = 0; lane < lanes; ++lane) {
        if (!(mask >> lane & 1)) continue;
        ++active;
        const u64 sector = addresses[lane] / 32;  // an access of at most 16 bytes is aligned, so it lies in one
        int i = used;
        while (i > 0 && seen[i - 1] != sector) --i;
        if (i == 0) seen[used++] = sector;
    }
    count.bytes += active * bytes;
    count.units += used;
    count.least += (active * bytes + 31) / 32;
}

}  // namespace machine
