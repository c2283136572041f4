#include "fault.h"

namespace xlayer::faults {
namespace {

// A row per block, in y alone or in x.
template <bool in_x>
__global__ void each_row(InOut args) {
    const unsigned row = in_x ? blockIdx.x : blockIdx.y;
    args.out[row] = args.x[row];
}

const Fault grid("grid_y_too_large", [](const char* name, bool fixed) {
    constexpr int rows = 65536;
    if (fixed) {
        run_in_out(name, each_row<true>, rows, {rows, 1, nullptr});
    } else {
        run_in_out(name, each_row<false>, rows, {1, 1, nullptr, 0, rows});
    }
});

template <bool fixed>
__global__ void use_shared(InOut args) {
    float* shared = shared_memory<float>();
    shared[12 * 1024] = args.x[0];  // beyond 48 KiB
    args.out[0] = shared[12 * 1024];
}

// launch() opts in by itself.
template <bool fixed>
void launch_with_much_shared_memory(const char* name, InOut args) {
    const LaunchName named(name);
    cudaLaunchConfig_t config{};
    config.gridDim = config.blockDim = dim3(1);
    config.dynamicSmemBytes = 64 * 1024;
    if (fixed) {
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(use_shared<fixed>),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * 1024),
              name);
    }
    check(cudaLaunchKernelEx(&config, use_shared<fixed>, args), name);
}

const Fault shared("shared_memory_without_opting_in", [](const char* name, bool fixed) {
    auto x = input<float>("x", 1);
    auto out = output<float>("out", 1);
    const InOut args{x.data(), out.data()};
    fixed ? launch_with_much_shared_memory<true>(name, args) : launch_with_much_shared_memory<false>(name, args);
});

}  // namespace
}  // namespace xlayer::faults
