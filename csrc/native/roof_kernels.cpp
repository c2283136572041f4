// What a processor's limits are measured with, compiled once per instruction set like the kernels of csrc/cpu, and with
// their vectors. An empty asm statement that takes or changes a value keeps the compiler from leaving it out.
#include <cstdint>

#include "cpu/common/simd.h"
#include "roof.h"

#if defined(__aarch64__)
#define XLAYER_CHANGES(value) asm volatile("" : "+w"(value))
#define XLAYER_TAKES(value) asm volatile("" : : "w"(value))
#elif defined(__x86_64__)
#define XLAYER_CHANGES(value) asm volatile("" : "+v"(value))
#define XLAYER_TAKES(value) asm volatile("" : : "v"(value))
#else
#define XLAYER_CHANGES(value) asm volatile("" : "+m"(value))
#define XLAYER_TAKES(value) asm volatile("" : : "m"(value))
#endif

namespace xlayer::roof::XLAYER_ISA {

namespace simd = xlayer::cpu::XLAYER_ISA;
using Vec = simd::Vec<float>;

namespace {

// At least pipes × latency (2 × 4 or 5, without FMA 2 × 6 or 1 × 8), and all in registers beside the two factors.
#if defined(__AVX512F__)
constexpr int kChains = 24;
#elif defined(__FMA__)
constexpr int kChains = 12;
#else
constexpr int kChains = 13;
#endif

template <class T>
XLAYER_INLINE void multiply_adds(int64_t steps) {
    simd::Vec<T> factor = simd::splat<T>(T(0.5)), term = simd::splat<T>(T(1)), sums[kChains];
    XLAYER_CHANGES(factor);
    XLAYER_CHANGES(term);
    XLAYER_UNROLL
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = term;
    for (int64_t step = 0; step < steps; ++step) {
        XLAYER_UNROLL
        for (int chain = 0; chain < kChains; ++chain) {
            sums[chain] = sums[chain] * factor + term;
            XLAYER_CHANGES(sums[chain]);
        }
    }
}

void multiply_adds_float(int64_t steps) { multiply_adds<float>(steps); }
void multiply_adds_double(int64_t steps) { multiply_adds<double>(steps); }

constexpr int kUnroll = 8;
constexpr int64_t kFloats = simd::kVectorBytes / sizeof(float);
constexpr int64_t kAhead = 1024 / sizeof(float);  // so far is asked for before it is read, where several streams are

// body(at) for every vector, eight to a turn; `at` counts floats. The bytes are cut into so many streams, which advance
// together: a processor fetches more of several streams at once than of one, and less of what lies in a near cache.
template <int kStreams, class Body>
XLAYER_INLINE void for_each_vector(int64_t bytes, Body body) {
    const int64_t count = bytes / static_cast<int64_t>(sizeof(float)) / kStreams;
    for (int64_t at = 0; at < count; at += kUnroll / kStreams * kFloats) {
        XLAYER_UNROLL
        for (int64_t stream = 0; stream < kStreams; ++stream) {
            XLAYER_UNROLL
            for (int64_t i = 0; i < kUnroll / kStreams; ++i) body(stream * count + at + i * kFloats);
        }
        asm volatile("" : : : "memory");  // a loop of stores must not become a call of memset or memcpy
    }
}

template <int kStreams>
XLAYER_INLINE Vec load_of(const float* from) {
    if (kStreams > 1) __builtin_prefetch(from + kAhead);
    return simd::load(from);
}

template <bool kPastCaches>
XLAYER_INLINE void store(float* to, Vec value) {
    if constexpr (kPastCaches) {
        simd::store_streaming(to, value);
    } else {
        simd::store(to, value);
    }
}

template <int kStreams, bool kPastCaches>
XLAYER_INLINE void copy_vectors(char* to, const char* from, int64_t bytes) {
    float* target = reinterpret_cast<float*>(to);
    const float* source = reinterpret_cast<const float*>(from);
    for_each_vector<kStreams>(
        bytes, [=](int64_t at) XLAYER_FLATTEN { store<kPastCaches>(target + at, load_of<kStreams>(source + at)); });
    simd::streaming_fence();
}

template <bool kPastCaches>
XLAYER_INLINE void write_vectors(char* to, int64_t bytes) {
    float* target = reinterpret_cast<float*>(to);
    const Vec value = simd::splat<float>(1);
    for_each_vector<1>(bytes, [=](int64_t at) XLAYER_FLATTEN { store<kPastCaches>(target + at, value); });
    simd::streaming_fence();
}

template <int kStreams>
XLAYER_INLINE void read_vectors(const char* from, int64_t bytes) {
    const float* source = reinterpret_cast<const float*>(from);
    for_each_vector<kStreams>(bytes, [=](int64_t at) XLAYER_FLATTEN {
        const Vec value = load_of<kStreams>(source + at);
        XLAYER_TAKES(value);
    });
}

void copy(char* to, const char* from, int64_t bytes) { copy_vectors<1, false>(to, from, bytes); }
void copy_past_caches(char* to, const char* from, int64_t bytes) { copy_vectors<1, true>(to, from, bytes); }
void copy_streams(char* to, const char* from, int64_t bytes) { copy_vectors<4, true>(to, from, bytes); }
void read(const char* from, int64_t bytes) { read_vectors<1>(from, bytes); }
void read_streams(const char* from, int64_t bytes) { read_vectors<4>(from, bytes); }
void write(char* to, int64_t bytes) { write_vectors<false>(to, bytes); }
void write_past_caches(char* to, int64_t bytes) { write_vectors<true>(to, bytes); }

}  // namespace

extern const Kernels kKernels = {simd::kVectorBytes,
                                 kChains,
                                 &multiply_adds_float,
                                 &multiply_adds_double,
                                 &copy,
                                 &copy_past_caches,
                                 &copy_streams,
                                 &read,
                                 &read_streams,
                                 &write,
                                 &write_past_caches};

}  // namespace xlayer::roof::XLAYER_ISA
