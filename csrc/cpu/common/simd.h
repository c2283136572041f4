// Vectors of the instruction set that this file is compiled for (see isa.h), over GCC's vector extension: the same
// source is SSE2, AVX2 and AVX-512. Everything lives in the set's own namespace and is forced inline, and kernel files
// use no function template of the standard library: the linker must never merge one function across instruction sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "xlayer/types.h"

#define XLAYER_INLINE inline __attribute__((always_inline))
#define XLAYER_FLATTEN __attribute__((always_inline))  // for lambdas, which cannot be `inline`
#if defined(__clang__)
#define XLAYER_UNROLL _Pragma("unroll")
#else
#define XLAYER_UNROLL _Pragma("GCC unroll 32")
#endif

namespace xlayer::cpu::XLAYER_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd;
template <>
struct Simd<float> {
    typedef float Vec __attribute__((vector_size(kVectorBytes)));
    typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
    static constexpr int32_t kMagnitude = 0x7fffffff;
};
template <>
struct Simd<double> {
    typedef double Vec __attribute__((vector_size(kVectorBytes)));
    typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
    typedef int64_t IntVec __attribute__((vector_size(kVectorBytes)));
    static constexpr int64_t kMagnitude = 0x7fffffffffffffff;
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using IntVec = typename Simd<T>::IntVec;

template <class T>
constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
XLAYER_INLINE constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
XLAYER_INLINE constexpr T max(T a, T b) {
    return a < b ? b : a;
}
XLAYER_INLINE constexpr int64_t ceil_div(int64_t size, int64_t unit) { return (size + unit - 1) / unit; }
XLAYER_INLINE constexpr int64_t round_up(int64_t size, int64_t unit) { return ceil_div(size, unit) * unit; }

template <class T>
XLAYER_INLINE Vec<T> load(const T* from) {
    return *reinterpret_cast<const typename Simd<T>::Unaligned*>(from);
}
template <class T>
XLAYER_INLINE void store(T* to, Vec<T> value) {
    *reinterpret_cast<typename Simd<T>::Unaligned*>(to) = value;
}
// As `store`, past the caches: for results that are larger than they are, whose lines would only be read to be written
// over. `to` is aligned to a vector; streaming_fence comes before another thread may read.
template <class T>
XLAYER_INLINE void store_streaming(T* to, Vec<T> value) {
#if defined(__clang__)
    __builtin_nontemporal_store(value, reinterpret_cast<Vec<T>*>(to));
#elif defined(__AVX512F__)
    if constexpr (sizeof(T) == 8) {
        __builtin_ia32_movntpd512(to, value);
    } else {
        __builtin_ia32_movntps512(to, value);
    }
#elif defined(__AVX__)
    if constexpr (sizeof(T) == 8) {
        __builtin_ia32_movntpd256(to, value);
    } else {
        __builtin_ia32_movntps256(to, value);
    }
#elif defined(__SSE2__)
    if constexpr (sizeof(T) == 8) {
        __builtin_ia32_movntpd(to, value);
    } else {
        __builtin_ia32_movntps(to, value);
    }
#else
    store(to, value);
#endif
}
XLAYER_INLINE void streaming_fence() {
#if defined(__SSE2__)
    __builtin_ia32_sfence();
#endif
}
template <class T>
XLAYER_INLINE Vec<T> splat(T value) {
    return value - Vec<T>{};
}
template <class T>
XLAYER_INLINE Vec<T> magnitude(Vec<T> x) {
    return (Vec<T>)((IntVec<T>)x & Simd<T>::kMagnitude);
}
// −1, 0 or 1; 0 for NaN, as comparisons with NaN are false.
template <class T>
XLAYER_INLINE Vec<T> sign(Vec<T> x) {
    const Vec<T> zero = {}, one = splat<T>(1);
    return (x > zero ? one : zero) - (x < zero ? one : zero);
}

// Halves added to each other, down to one lane.
template <class T>
XLAYER_INLINE T sum_lanes(Vec<T> x) {
    XLAYER_UNROLL for (int width = lanes<T> / 2; width > 0; width /= 2) {
        IntVec<T> rotated;
        XLAYER_UNROLL for (int l = 0; l < lanes<T>; ++l) rotated[l] = (l + width) % lanes<T>;
        x += __builtin_shuffle(x, rotated);
    }
    return x[0];
}

// Lane l of the result is the sum over the lanes of rows[l]: a tree of even and odd lanes added.
template <class T>
XLAYER_INLINE Vec<T> sum_rows(const T* rows) {
    constexpr int kLanes = lanes<T>;
    IntVec<T> even, odd;
    XLAYER_UNROLL for (int l = 0; l < kLanes; ++l) {
        even[l] = 2 * l;
        odd[l] = 2 * l + 1;
    }
    Vec<T> level[kLanes];
    XLAYER_UNROLL for (int l = 0; l < kLanes; ++l) level[l] = load(rows + l * kLanes);
    XLAYER_UNROLL for (int width = kLanes / 2; width > 0; width /= 2) {
        XLAYER_UNROLL for (int l = 0; l < width; ++l) {
            const Vec<T> a = level[2 * l], b = level[2 * l + 1];
            level[l] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
        }
    }
    return level[0];
}

// out[r] = the sum over the lanes of rows[r], for a few rows at a time: the same tree, so the same bits for any `Rows`.
template <class T, int Rows>
XLAYER_INLINE void sum_each_lanes(const Vec<T>* rows, T* out) {
    constexpr int kLanes = lanes<T>;
    static_assert(Rows <= kLanes && (Rows & (Rows - 1)) == 0);
    IntVec<T> even, odd;
    XLAYER_UNROLL for (int l = 0; l < kLanes; ++l) {
        even[l] = 2 * l;
        odd[l] = 2 * l + 1;
    }
    Vec<T> level[Rows];
    XLAYER_UNROLL for (int r = 0; r < Rows; ++r) level[r] = rows[r];
    for (int left = Rows / 2; left > 0; left /= 2) {
        for (int r = 0; r < left; ++r) {
            const Vec<T> a = level[2 * r], b = level[2 * r + 1];
            level[r] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
        }
    }
    Vec<T> sum = level[0];
    XLAYER_UNROLL for (int width = kLanes / Rows; width > 1; width /= 2) {
        sum = __builtin_shuffle(sum, sum, even) + __builtin_shuffle(sum, sum, odd);
    }
    XLAYER_UNROLL for (int r = 0; r < Rows; ++r) out[r] = sum[r];
}

// e^x within one unit in the last place for x ≤ 88; 0 below −87, where the result would be subnormal.
XLAYER_INLINE Vec<float> exponential(Vec<float> x) {
    const Vec<float> low = splat(-87.0f), shifter = splat(12582912.0f);  // 1.5·2²³: adding it rounds to an integer
    const Vec<float> in = x < low ? low : x;
    const Vec<float> shifted = in * 1.44269504f + shifter;
    const Vec<float> n = shifted - shifter;
    const Vec<float> r = (in - n * 0.693145752f) - n * 1.42860677e-6f;
    Vec<float> p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));  // of lanes beyond the limits they wrap around
    const Bits exponent = ((Bits)shifted - 0x4b400000u) << 23;
    const Vec<float> result = (Vec<float>)((Bits)p + exponent);
    return x < low ? Vec<float>{} : x == x ? result : x;
}
XLAYER_INLINE Vec<double> exponential(Vec<double> x) {
    Vec<double> out = {};
    for (int l = 0; l < lanes<double>; ++l) out[l] = std::exp(x[l]);
    return out;
}
XLAYER_INLINE float exponential(float x) { return std::exp(x); }
XLAYER_INLINE double exponential(double x) { return std::exp(x); }

// 1 / (1 + e^−x).
XLAYER_INLINE Vec<float> sigmoid(Vec<float> x) {
    const Vec<float> limit = splat(88.0f);  // beyond which e^ would overflow
    return 1.0f / (1.0f + exponential(-x > limit ? limit : -x));
}
XLAYER_INLINE Vec<double> sigmoid(Vec<double> x) { return 1.0 / (1.0 + exponential(-x)); }

// tanh: near 0, where 1 − e^ would cancel, an odd polynomial with a relative error of 2⁻²³.
XLAYER_INLINE Vec<float> hyperbolic_tangent(Vec<float> x) {
    const Vec<float> size = magnitude<float>(x), limit = splat(44.0f);
    const Vec<float> large = 1.0f - 2.0f / (exponential(2.0f * (size > limit ? limit : size)) + 1.0f);
    const Vec<float> square = x * x;
    Vec<float> p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const Vec<float> small = p * square * x + x;
    return size < 0.625f ? small : x < 0.0f ? -large : x == x ? large : x;
}
XLAYER_INLINE Vec<double> hyperbolic_tangent(Vec<double> x) {
    Vec<double> out = {};
    for (int l = 0; l < lanes<double>; ++l) out[l] = std::tanh(x[l]);
    return out;
}

// Exact GELU: value = x·Φ(x), slope = Φ(x) + x·φ(x). In float, 1 − Φ(|x|) = φ-scaled polynomial in 1/(1 + p|x|/√2),
// a minimax fit of erfc(z)·exp(z²) whose absolute error in erf is 4e-10.
XLAYER_INLINE void gelu(Vec<float> x, Vec<float>* value, Vec<float>* slope) {
    const Vec<float> bell = exponential(x * x * -0.5f);
    const Vec<float> t = 1.0f / (1.0f + magnitude<float>(x) * (0.4f * 0.707106781f));
    Vec<float> p = splat(0.07393335205989338f);
    p = p * t - 0.3878843986105666f;
    p = p * t + 0.6582681829602564f;
    p = p * t - 0.3272657581925708f;
    p = p * t + 0.3633613765745459f;
    p = p * t + 0.1646057209963243f;
    p = p * t + 0.22914751470553113f;
    p = p * t + 0.2258340098415504f;
    const Vec<float> tail = 0.5f * p * t * bell;
    const Vec<float> phi = x < Vec<float>{} ? tail : 1.0f - tail;
    *value = x * phi;
    *slope = phi + x * bell * 0.398942280f;
}
XLAYER_INLINE void gelu(Vec<double> x, Vec<double>* value, Vec<double>* slope) {
    Vec<double> phi = {};
    for (int l = 0; l < lanes<double>; ++l) phi[l] = 0.5 * std::erfc(-x[l] * 0.70710678118654752440);
    *value = x * phi;
    *slope = phi + x * exponential(x * x * -0.5) * 0.39894228040143267794;
}

}  // namespace xlayer::cpu::XLAYER_ISA
