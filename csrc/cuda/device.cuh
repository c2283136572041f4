// The one file with launches, intrinsics and PTX. Kernels are written against it: vectors of 16 bytes, conversions to
// and from the accumulation type, warp votes, and launch(), which is used instead of <<<>>> everywhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef XLAYER_NVTX
#include <nvtx3/nvToolsExt.h>
#endif

#include "xlayer/types.h"

namespace xlayer::cuda {

constexpr int kWarp = 32;

// --- Elements -------------------------------------------------------------------------------------------------------

template <class T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(Accumulator<T> x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
    return __float2half_rn(x);
}

// --- Vectors: loaded and stored in one instruction; the address must be a multiple of their size ---------------------

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T at[N];
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
    return *reinterpret_cast<const Vector<T, N>*>(from);
}
template <int N, class T>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& value) {
    *reinterpret_cast<Vector<T, N>*>(to) = value;
}

// The most elements that one access may take: 16 bytes' worth if the address and every stride allow it, else one.
template <class T, class... Strides>
int vector_length(const void* address, Strides... strides) {
    constexpr int full = 16 / sizeof(T);
    const bool aligned = reinterpret_cast<uintptr_t>(address) % 16 == 0 && ((strides % full == 0) && ...);
    return aligned ? full : 1;
}

// --- Warps ----------------------------------------------------------------------------------------------------------

// Bit l is set where lane l's vote is true. All 32 lanes must take part.
__device__ __forceinline__ unsigned ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }

// --- Launches -------------------------------------------------------------------------------------------------------

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Queues kernel(args) on `stream` with `blocks` blocks of `threads` threads. No blocks, no launch.
template <class Args>
void launch(const char* name, void (*kernel)(Args), int64_t blocks, int threads, void* stream, const Args& args) {
    if (blocks == 0) return;
    constexpr int64_t most = (int64_t{1} << 31) - 1;  // kernels loop over what a full grid does not cover
#ifdef XLAYER_NVTX
    nvtxRangePushA(name);
#endif
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks < most ? blocks : most));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args);
#ifdef XLAYER_NVTX
    nvtxRangePop();
#endif
    check(status, name);
}

}  // namespace xlayer::cuda
