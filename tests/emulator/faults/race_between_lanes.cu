#include "fault.h"

namespace xlayer::faults {
namespace {

// Nothing but sync_warp orders what the lanes of a warp do.
template <bool fixed>
__global__ void reverse_twice(InOut args) {
    float* shared = shared_memory<float>();
    const int lane = threadIdx.x;
    shared[lane] = args.x[lane];
    sync_warp();
    const float other = shared[kWarpSize - 1 - lane];  // fault: race_between_lanes
    if (fixed) sync_warp();
    shared[lane] = other;  // fault: race_between_lanes
    sync_warp();
    args.out[lane] = shared[kWarpSize - 1 - lane];
}

const Fault planted("race_between_lanes", [](const char* name, bool fixed) {
    run_in_out(name, fixed ? reverse_twice<true> : reverse_twice<false>, kWarpSize,
               {1, kWarpSize, nullptr, kWarpSize * sizeof(float)});
});

// One lane overwrites what all have read.
template <bool fixed>
__global__ void broadcast(InOut args) {
    float* shared = shared_memory<float>();
    const int lane = threadIdx.x;
    if (lane == 0) shared[0] = args.x[0];
    sync_warp();
    args.out[lane] = shared[0];  // fault: overwritten_broadcast_in_warp
    if (fixed) sync_warp();
    if (lane == 0) shared[0] = 1;  // fault: overwritten_broadcast_in_warp
}

const Fault planted_after_reads("overwritten_broadcast_in_warp", [](const char* name, bool fixed) {
    run_in_out(name, fixed ? broadcast<true> : broadcast<false>, kWarpSize, {1, kWarpSize, nullptr, sizeof(float)});
});

}  // namespace
}  // namespace xlayer::faults
