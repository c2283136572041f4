// The limits that a device puts on launches. They are those of the smallest supported device.
#include "cuda_runtime.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>

#include "emulator.h"

namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_message;

cudaError_t fail(cudaError_t error, const std::string& message) {
    last_error = error;
    last_message = message;
    return error;
}

// How much dynamic shared memory each kernel asked to be allowed.
std::unordered_map<const void*, size_t>& allowed_shared() {
    static std::unordered_map<const void*, size_t> allowed;
    return allowed;
}

// The most dynamic shared memory of a kernel's launches, by the threads of their blocks.
std::map<std::pair<const void*, unsigned>, size_t>& largest_shared() {
    static std::map<std::pair<const void*, unsigned>, size_t> largest;
    return largest;
}

struct Limit {
    const char* what;
    uint64_t value, most;
};

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
    if (error != cudaSuccess && error == last_error) return last_message.c_str();
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
    }
    return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device != 0) return fail(cudaErrorInvalidDevice, "there is device 0 only, not " + std::to_string(device));
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = 4;  // few, so that blocks that take several shares of the work do so in small tests
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = 100 << 10;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = xlayer::emulator::kMaxShared;
            return cudaSuccess;
    }
    return fail(cudaErrorInvalidValue, "the emulator does not know device attribute " + std::to_string(attribute));
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
        return fail(cudaErrorInvalidValue,
                    "the emulator does not know function attribute " + std::to_string(attribute));
    }
    if (value < 0 || static_cast<size_t>(value) > xlayer::emulator::kMaxShared) {
        return fail(cudaErrorInvalidValue, "dynamic shared memory of " + std::to_string(value) +
                                               " bytes, a block gets at most " +
                                               std::to_string(xlayer::emulator::kMaxShared));
    }
    allowed_shared()[kernel] = static_cast<size_t>(value);
    return cudaSuccess;
}

namespace xlayer::emulator {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*call)(void*), void* closure) {
    const dim3 &grid = config.gridDim, &block = config.blockDim;
    for (const Limit& limit : {
             Limit{"grid.x", grid.x, 0x7fffffff},
             Limit{"grid.y", grid.y, 65535},
             Limit{"grid.z", grid.z, 65535},
             Limit{"block.x", block.x, kMaxThreads},
             Limit{"block.y", block.y, kMaxThreads},
             Limit{"block.z", block.z, 64},
             Limit{"the number of threads", uint64_t{block.x} * block.y * block.z, kMaxThreads},
         }) {
        if (limit.value >= 1 && limit.value <= limit.most) continue;
        return fail(cudaErrorInvalidConfiguration,
                    std::string(limit.what) + " is " + std::to_string(limit.value) + ", the " +
                        (limit.value == 0 ? "least is 1" : "most is " + std::to_string(limit.most)));
    }
    const auto asked = allowed_shared().find(kernel);
    const size_t allowed =
        asked == allowed_shared().end() ? kSharedWithoutAsking : std::max(asked->second, kSharedWithoutAsking);
    if (config.dynamicSmemBytes > allowed) {
        return fail(cudaErrorInvalidValue, "dynamic shared memory is " + std::to_string(config.dynamicSmemBytes) +
                                               " bytes, the most is " + std::to_string(allowed) +
                                               " (more after cudaFuncSetAttribute)");
    }
    size_t& largest = largest_shared()[{kernel, block.x * block.y * block.z}];
    largest = std::max(largest, config.dynamicSmemBytes);
    run_grid({{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config.dynamicSmemBytes}, call, closure);
    return cudaSuccess;
}

std::vector<LaunchedBlock> launched_blocks() {
    std::vector<LaunchedBlock> blocks;
    for (const auto& [of, bytes] : largest_shared()) blocks.push_back({of.first, of.second, bytes});
    return blocks;
}

void forget_launched_blocks() { largest_shared().clear(); }

}  // namespace xlayer::emulator
