#include "fault.h"

namespace xlayer::faults {
namespace {

constexpr int kThreads = 64;

// Only every other thread writes.
template <bool fixed>
__global__ void half_written(InOut args) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x;
    if (fixed || i % 2 == 0) shared[i] = args.x[i];
    sync_block();
    args.out[i + blockIdx.x * kThreads] = shared[i];  // fault: unwritten_shared_memory
}

// What the block before left in shared memory is not there.
template <bool fixed>
__global__ void left_by_another_block(InOut args) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x;
    if (fixed || blockIdx.x == 0) shared[i] = args.x[i];
    args.out[i + blockIdx.x * kThreads] = shared[i];  // fault: shared_memory_of_another_block
}

void run(const char* name, void (*kernel)(InOut)) {
    run_in_out(name, kernel, 2 * kThreads, {2, kThreads, nullptr, kThreads * sizeof(float)});
}

const Fault half("unwritten_shared_memory",
                 [](const char* name, bool fixed) { run(name, fixed ? half_written<true> : half_written<false>); });
const Fault left("shared_memory_of_another_block", [](const char* name, bool fixed) {
    run(name, fixed ? left_by_another_block<true> : left_by_another_block<false>);
});

}  // namespace
}  // namespace xlayer::faults
