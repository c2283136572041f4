// Shared parts of the quantize kernels.
#pragma once

#include <cmath>

#include "cuda/common/device.cuh"
#include "xlayer/quantize.h"
#include "xlayer/workspace.h"

namespace xlayer::cuda::quantize {

constexpr int64_t kMaxBlocks = 65535;  // of kernels that loop over the rest

// A sum over the warp in a fixed order, equal in all lanes.
template <class A>
__device__ __forceinline__ A add_over_warp(A x) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// Neither NaN nor inf.
template <class A>
__device__ __forceinline__ bool is_finite(A x) {
    return x - x == A(0);
}

}  // namespace xlayer::cuda::quantize
