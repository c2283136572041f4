#include "fault.h"

namespace xlayer::faults {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;

// The sum of x. Without the fix every warp adds to the same word of shared memory.
template <bool fixed>
__global__ void sum(InOut args) {
    float* totals = shared_memory<float>();
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    if (threadIdx.x < kWarps) totals[threadIdx.x] = 0;
    sync_block();
    float value = args.x[threadIdx.x];
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    if (lane == 0) totals[fixed ? warp : 0] += value;  // fault: race_between_warps
    sync_block();
    if (threadIdx.x == 0) args.out[0] = totals[0] + totals[1] + totals[2] + totals[3];
}

const Fault planted("race_between_warps", [](const char* name, bool fixed) {
    run_in_out(name, fixed ? sum<true> : sum<false>, kThreads, {1, kThreads, nullptr, kWarps * sizeof(float)});
});

struct Bytes {
    const uint8_t* x;
    uint8_t* out;
};

// In global memory, the warps write the same bytes. Neighboring bytes, as after the fix, are no race.
template <bool fixed>
__global__ void copy(Bytes args) {
    const int i = threadIdx.x;
    args.out[fixed ? i : i % kWarpSize] = args.x[i];  // fault: race_in_global_memory
}

const Fault planted_in_global("race_in_global_memory", [](const char* name, bool fixed) {
    auto x = input<uint8_t>("x", kThreads);
    auto out = output<uint8_t>("out", kThreads);
    launch(name, fixed ? copy<true> : copy<false>, {1, kThreads, nullptr}, {x.data(), out.data()});
});

// One thread overwrites what all have read.
template <bool fixed>
__global__ void broadcast(InOut args) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x;
    if (i == 0) shared[0] = args.x[0];
    sync_block();
    args.out[i] = shared[0];  // fault: overwritten_broadcast
    if (fixed) sync_block();
    if (i == 0) shared[0] = 1;  // fault: overwritten_broadcast
}

const Fault planted_after_reads("overwritten_broadcast", [](const char* name, bool fixed) {
    run_in_out(name, fixed ? broadcast<true> : broadcast<false>, kThreads, {1, kThreads, nullptr, sizeof(float)});
});

}  // namespace
}  // namespace xlayer::faults
