// No fault, but work whose bits would tell if they depended on the order of blocks and threads.
#include "fault.h"

namespace xlayer::faults {
namespace {

constexpr int kBlocks = 7, kWarps = 4, kThreads = kWarps * kWarpSize;

__global__ void sums(InOut args) {
    float* partial = shared_memory<float>();
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    float value = args.x[blockIdx.x * kThreads + threadIdx.x];
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    if (lane == 0) partial[warp] = value;
    sync_block();
    if (threadIdx.x == 0) args.out[blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
}

}  // namespace
}  // namespace xlayer::faults

// As run_fault. The blocks' sums of 1/(i + 3).
XLAYER_EXPORT int run_sums(float* out, char* message, size_t size) {
    using namespace xlayer::faults;
    const auto launch_it = [=] {
        auto x = input<float>("x", kBlocks * kThreads);
        for (int i = 0; i < kBlocks * kThreads; ++i) x[i] = 1 / static_cast<float>(i + 3);
        xlayer::emulator::allow_memory(out, kBlocks * sizeof(float), true, "out");
        launch("sums", sums, {kBlocks, kThreads, nullptr, kWarps * sizeof(float)}, {x.data(), out});
    };
    return message_of(launch_it, message, size);
}
