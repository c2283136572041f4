// The arena of a call's scratch memory; and the divisions that sizes are made of.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "xlayer/arena.h"

namespace xlayer::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace xlayer::cuda
