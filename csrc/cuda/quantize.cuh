// What the quantize kernels share.
#pragma once

#include <cmath>

#include "device.cuh"
#include "xlayer/quantize.h"

namespace xlayer::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t kMostBlocks = 65535;  // of kernels that loop over the rest

// Cuts one allocation into arrays aligned to 64 bytes; with no memory behind it, only counts.
struct Arena {
    char* base;
    int64_t used = 0;

    template <class V>
    V* take(int64_t count) {
        const int64_t at = used;
        used += round_up(count * static_cast<int64_t>(sizeof(V)), 64);
        return base == nullptr ? nullptr : reinterpret_cast<V*>(base + at);
    }
};

// A sum over the warp in a fixed order, equal in all lanes.
template <class A>
__device__ __forceinline__ A add_over_warp(A x) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// Neither NaN nor inf.
template <class A>
__device__ __forceinline__ bool is_finite(A x) {
    return x - x == A(0);
}

}  // namespace xlayer::cuda
