// Scratch memory of a call, cut into arrays; and the divisions that sizes are made of.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace xlayer::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

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

}  // namespace xlayer::cuda
