// As much of the CUDA runtime as the kernels and their launches use, on the emulator.
#pragma once

#include <math.h>

#include <cstddef>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Set for the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t error);  // of the last error, also what exceeded which limit
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

namespace xlayer::emulator {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*call)(void*), void* closure);

// A kernel and what it was launched with. The copies made for each thread are the device's own doing, so the checker
// does not look at them.
template <class... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;

    __attribute__((no_sanitize("thread"))) static void make(void* closure) {
        static_cast<Call*>(closure)->unpack(std::index_sequence_for<Parameters...>());
    }

  private:
    template <size_t... i>
    __attribute__((no_sanitize("thread"))) void unpack(std::index_sequence<i...>) {
        kernel(std::get<i>(parameters)...);
    }
};

}  // namespace xlayer::emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    using Call = xlayer::emulator::Call<Parameters...>;
    Call call{kernel, {std::forward<Arguments>(arguments)...}};
    return xlayer::emulator::launch(*config, reinterpret_cast<const void*>(kernel), Call::make, &call);
}
