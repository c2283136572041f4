#include "fault.h"

namespace xlayer::faults {
namespace {

constexpr int kThreads = 64;

template <bool fixed>
__global__ void reverse_twice(InOut args) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x;
    shared[i] = args.x[i];
    sync_block();
    const float other = shared[kThreads - 1 - i];  // fault: missing_sync_block
    if (fixed) sync_block();
    shared[i] = other;  // fault: missing_sync_block
    sync_block();
    args.out[i] = shared[kThreads - 1 - i];
}

const Fault planted("missing_sync_block", [](const char* name, bool fixed) {
    run_in_out(name, fixed ? reverse_twice<true> : reverse_twice<false>, kThreads,
               {1, kThreads, nullptr, kThreads * sizeof(float)});
});

}  // namespace
}  // namespace xlayer::faults
