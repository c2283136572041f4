// float16 for the emulator: 5 exponent bits, 10 mantissa bits.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) {
    // With its exponent in float32's place the number is 2^112 too small, subnormal or not.
    const uint32_t sign = uint32_t{x.bits} >> 15 << 31, magnitude = x.bits & 0x7fffu;
    uint32_t wide = magnitude << 13;
    if (magnitude >= 0x7c00) {
        wide |= 0x7f800000;  // infinity, NaN
    } else {
        float value;
        memcpy(&value, &wide, sizeof value);
        value *= 0x1p112f;
        memcpy(&wide, &value, sizeof wide);
    }
    wide |= sign;
    float out;
    memcpy(&out, &wide, sizeof out);
    return out;
}

// To nearest, ties to even; a NaN becomes the one that the device makes.
inline __half __float2half_rn(float x) {
    uint32_t wide;
    memcpy(&wide, &x, sizeof wide);
    const auto sign = static_cast<uint16_t>(wide >> 31 << 15);
    wide &= 0x7fffffff;
    if (wide > 0x7f800000) return {0x7fff};
    if (wide >= 0x47800000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65536 or more
    if (wide >= 0x38800000) {                                               // 2^-14: the least normal number
        wide -= uint32_t{112} << 23;
        return {static_cast<uint16_t>(sign | (wide + 0xfff + (wide >> 13 & 1)) >> 13)};
    }
    // Subnormal. The sum's unit in the last place is 2^-24, as float16's is here, so the addition rounds.
    float value;
    memcpy(&value, &wide, sizeof value);
    value += 0.5f;
    memcpy(&wide, &value, sizeof wide);
    return {static_cast<uint16_t>(sign | (wide - 0x3f000000))};
}
