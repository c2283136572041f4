// bfloat16 for the emulator: the upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t wide = uint32_t{x.bits} << 16;
    float out;
    memcpy(&out, &wide, sizeof out);
    return out;
}

// To nearest, ties to even; a NaN becomes the one that the device makes.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t wide;
    memcpy(&wide, &x, sizeof wide);
    if ((wide & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}
