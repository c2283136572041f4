#include "fault.h"

namespace xlayer::faults {
namespace {

constexpr int kThreads = 64;

template <bool fixed>
__global__ void divergent(InOut) {
    if (fixed || threadIdx.x < kWarpSize) {
        sync_block();  // fault: divergent_barrier
    } else {
        sync_block();  // fault: divergent_barrier
    }
}

// Lane 0 of the second warp goes to the barrier, while the others of its warp wait for it in the shuffle.
template <bool fixed>
__global__ void not_reached(InOut args) {
    float value = args.x[threadIdx.x];
    if (fixed || (threadIdx.x >= kWarpSize && threadIdx.x % kWarpSize != 0)) {
        value = shuffle(value, 0);  // fault: barrier_not_reached
    }
    sync_block();  // fault: barrier_not_reached
    args.out[threadIdx.x] = value;
}

template <bool fixed>
__global__ void missing_lane(InOut args) {
    const int lane = threadIdx.x % kWarpSize;
    if (!fixed && lane == kWarpSize - 1) return;
    args.out[threadIdx.x] = shuffle_xor(args.x[threadIdx.x], 1);  // fault: shuffle_without_a_lane
}

void run(const char* name, void (*kernel)(InOut)) { run_in_out(name, kernel, kThreads, {1, kThreads, nullptr}); }

const Fault diverges("divergent_barrier",
                     [](const char* name, bool fixed) { run(name, fixed ? divergent<true> : divergent<false>); });
const Fault deadlock("barrier_not_reached",
                     [](const char* name, bool fixed) { run(name, fixed ? not_reached<true> : not_reached<false>); });
const Fault lane("shuffle_without_a_lane",
                 [](const char* name, bool fixed) { run(name, fixed ? missing_lane<true> : missing_lane<false>); });

}  // namespace
}  // namespace xlayer::faults
