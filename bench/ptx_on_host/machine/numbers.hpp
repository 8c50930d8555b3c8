// Number formats, and values of 32 lanes.
//
// A register of a warp is one row of 32 words, or two rows for 64 bits. 16-bit values and predicates occupy a word.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace machine {

using u8 = uint8_t;
using s8 = int8_t;
using u16 = uint16_t;
using s16 = int16_t;
using u32 = uint32_t;
using s32 = int32_t;
using u64 = uint64_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using pred = bool;

constexpr int lanes = 32;

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Rounds to nearest, ties to even.
inline u16 to_bf16(float x) {
    const u32 word = bits<u32>(x);
    return (word & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

inline float from_bf16(u16 x) { return bits<float>(static_cast<u32>(x) << 16); }

inline float from_f16(u16 x) {
    const int exponent = x >> 10 & 31, fraction = x & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                      : exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24);
    return x >> 15 ? -size : size;
}

// cvt.rna: rounds to 11 bits, ties away from zero.
inline u32 to_tf32(u32 word) { return (word & 0x7f800000u) == 0x7f800000u ? word : (word + 0x1000u) & ~0x1fffu; }

// What a matrix instruction reads of a word: it ignores the low 13 bits.
inline float from_tf32(u32 word) { return bits<float>(word & ~0x1fffu); }

// Rounds towards zero, as the sums of matrix instructions are.
inline float cut(double x) {
    const float near = static_cast<float>(x);
    return std::fabs(static_cast<double>(near)) > std::fabs(x) ? bits<float>(bits<u32>(near) - 1) : near;
}

template <class To, class From>
inline To truncated(From x) {
    if (x != x) return 0;
    const From least = static_cast<From>(std::numeric_limits<To>::min());
    if (x <= least) return std::numeric_limits<To>::min();
    return x >= -least ? std::numeric_limits<To>::max() : static_cast<To>(x);
}

inline u32 permuted(u32 a, u32 b, u32 selector) {
    const u64 both = static_cast<u64>(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 part = selector >> 4 * i;
        u32 byte = both >> 8 * (part & 7) & 0xff;
        if (part & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << 8 * i;
    }
    return result;
}

template <class T>
struct Stored {
    using type = T;
};
template <>
struct Stored<u16> {
    using type = u32;
};
template <>
struct Stored<s16> {
    using type = u32;
};
template <>
struct Stored<pred> {
    using type = u32;
};

template <class T>
inline T load(typename Stored<T>::type stored) {
    return static_cast<T>(stored);
}

template <class T>
inline typename Stored<T>::type stored(T value) {
    if constexpr (sizeof(T) == 2) return static_cast<u16>(value);
    return static_cast<typename Stored<T>::type>(value);
}

// The values of a register, given the number of its first row.
template <class T>
inline typename Stored<T>::type* row(u32* registers, int number) {
    return reinterpret_cast<typename Stored<T>::type*>(registers + lanes * number);
}

}  // namespace machine
