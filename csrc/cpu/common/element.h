// Conversions between the elements of a tensor, of any dtype, and the accumulation type: widened when read, rounded to
// nearest when written.
#pragma once

#include "cpu/common/simd.h"

namespace xlayer::cpu::XLAYER_ISA {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

XLAYER_INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
XLAYER_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

XLAYER_INLINE double widen(double x) { return x; }
XLAYER_INLINE float widen(float x) { return x; }
XLAYER_INLINE float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
// Multiplying by 2¹¹² moves binary16's exponent bias to binary32's and makes subnormals normal, exactly.
XLAYER_INLINE float widen(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
    const float finite = from_bits(rest) * from_bits(0x77800000);
    const uint32_t value = (x.bits & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : to_bits(finite);
    return from_bits(sign | value);
}

XLAYER_INLINE void narrow(double x, double* to) { *to = x; }
XLAYER_INLINE void narrow(float x, float* to) { *to = x; }
XLAYER_INLINE void narrow(float x, BFloat16* to) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
XLAYER_INLINE void narrow(float x, Float16* to) {
    const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    // Below 2⁻¹⁴ the result is subnormal: adding 0.5 leaves its rounded mantissa in the low bits.
    const uint32_t subnormal = to_bits(from_bits(rest) + 0.5f) - 0x3f000000;
    const uint32_t normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
    const uint32_t finite = rest < 0x38800000 ? subnormal : normal;
    const uint32_t large = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
    to->bits = static_cast<uint16_t>(sign | (rest >= 0x477ff000 ? large : finite));
}

// Calls f with a null pointer of the element type that `dtype` names.
template <class F>
XLAYER_INLINE void dispatch_dtype(DType dtype, F f) {
    switch (dtype) {
        case DType::float64:
            return f(static_cast<double*>(nullptr));
        case DType::float32:
            return f(static_cast<float*>(nullptr));
        case DType::bfloat16:
            return f(static_cast<BFloat16*>(nullptr));
        case DType::float16:
            return f(static_cast<Float16*>(nullptr));
    }
}
template <class S>
struct Accumulation {
    using Type = float;
};
template <>
struct Accumulation<double> {
    using Type = double;
};

// to[c] = from[c·stride] for c in [0, count).
template <class S, class T>
XLAYER_INLINE void read_row(const S* from, int64_t stride, int64_t count, T* to) {
    if (stride == 1) {
        for (int64_t c = 0; c < count; ++c) to[c] = widen(from[c]);
    } else {
        for (int64_t c = 0; c < count; ++c) to[c] = widen(from[c * stride]);
    }
}
template <class S, class T>
XLAYER_INLINE void write_row(const T* from, int64_t count, S* to) {
    for (int64_t c = 0; c < count; ++c) narrow(from[c], to + c);
}

}  // namespace xlayer::cpu::XLAYER_ISA
