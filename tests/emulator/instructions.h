// The instruction section of csrc/cuda/common/device.cuh for the emulator: what each function means is said there.
//
// The functions here are thin: all state is in the emulator, which is compiled without the instrumentation that kernels
// have. Those that hand on their caller's address are not inlined, so that it is one of kernel code.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"

#define XLAYER_UNCHECKED __attribute__((no_sanitize("thread")))
#define XLAYER_CALLED __attribute__((noinline, no_sanitize("thread")))

namespace xlayer::cuda {

using emulator::Site;

template <class T>
T* shared_memory() {
    return static_cast<T*>(emulator::shared_base());
}

inline void sync_block(Site site = Site::here()) { emulator::sync_block(site); }
inline void sync_warp(Site site = Site::here()) { emulator::sync_warp(site); }

inline unsigned ballot(bool vote, Site site = Site::here()) { return emulator::ballot(vote, site); }
inline int popcount(unsigned bits) { return __builtin_popcount(bits); }

template <class V>
XLAYER_UNCHECKED V shuffle(V value, int lane, Site site = Site::here()) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8, "a shuffle moves 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = emulator::shuffle(bits, lane, site);
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <class V>
XLAYER_UNCHECKED V shuffle_xor(V value, int mask, Site site = Site::here()) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8, "a shuffle moves 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = emulator::shuffle_xor(bits, mask, site);
    memcpy(&value, &bits, sizeof value);
    return value;
}

XLAYER_CALLED inline void copy_async(void* shared, const void* global, Site site = Site::here()) {
    emulator::copy_async(shared, global, site, __builtin_return_address(0));
}
inline void commit_copies() { emulator::commit_copies(); }
template <int N>
void wait_copies() {
    static_assert(N >= 0);
    emulator::wait_copies(N);
}

template <int N>
XLAYER_CALLED void load_matrices(uint32_t (&to)[N], const void* row, Site site = Site::here()) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
    emulator::load_matrices(to, N, false, row, site, __builtin_return_address(0));
}
template <int N>
XLAYER_CALLED void load_matrices_transposed(uint32_t (&to)[N], const void* row, Site site = Site::here()) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
    emulator::load_matrices(to, N, true, row, site, __builtin_return_address(0));
}

template <class T>
XLAYER_UNCHECKED void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  Site site = Site::here()) {
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
    constexpr bool brain = std::is_same_v<T, __nv_bfloat16>;
    const auto kind = brain ? emulator::MatrixKind::bfloat16_16x8x16 : emulator::MatrixKind::float16_16x8x16;
    emulator::multiply_matrices(kind, d, a, b, site);
}
XLAYER_UNCHECKED inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             Site site = Site::here()) {
    emulator::multiply_matrices(emulator::MatrixKind::tf32_16x8x8, d, a, b, site);
}
XLAYER_UNCHECKED inline void mma_8x8x4(double& d0, double& d1, double a, double b, Site site = Site::here()) {
    double d[2] = {d0, d1};
    emulator::multiply_matrices(emulator::MatrixKind::float64_8x8x4, d, &a, &b, site);
    d0 = d[0];
    d1 = d[1];
}

inline float clamp_min_zero(float x) { return x < 0 ? 0 : x; }
inline double clamp_min_zero(double x) { return x < 0 ? 0 : x; }
inline float reciprocal(float x) { return emulator::reciprocal(x); }
inline double reciprocal(double x) { return 1 / x; }
inline uint32_t to_tf32(float x) { return emulator::to_tf32(x); }

template <class T>
uint32_t pair_fma(uint32_t a, uint32_t b, uint32_t c) {
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
    return std::is_same_v<T, __nv_bfloat16> ? emulator::pair_fma_bfloat16(a, b, c)
                                            : emulator::pair_fma_float16(a, b, c);
}

using LaunchName = emulator::KernelName;

}  // namespace xlayer::cuda
