#include "fault.h"

namespace xlayer::faults {
namespace {

constexpr int kThreads = 64, kPerCopy = 4;

// Each thread copies 16 bytes and then reads some that another copied.
template <bool fixed>
__global__ void read_early(InOut args) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x;
    copy_async(shared + i * kPerCopy, args.x + i * kPerCopy);
    commit_copies();
    if (fixed) wait_copies<0>();
    sync_block();
    args.out[i] = shared[kThreads - 1 - i];  // fault: missing_wait_copies
    if (!fixed) wait_copies<0>();
}

// Waits for the older of two groups and reads the younger.
template <bool fixed>
__global__ void wait_for_too_few(InOut args) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x;
    copy_async(shared + i * kPerCopy, args.x + i * kPerCopy);
    commit_copies();
    float* const second = shared + kThreads * kPerCopy;
    copy_async(second + i * kPerCopy, args.x + i * kPerCopy);
    commit_copies();
    wait_copies<fixed ? 0 : 1>();
    args.out[i] = shared[i * kPerCopy] + second[i * kPerCopy];  // fault: waits_for_too_few_copies
    wait_copies<0>();
}

// Reads what other threads copied: their own waiting is not enough without a barrier.
template <bool fixed>
__global__ void share_without_barrier(InOut args) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x;
    for (int n = 0; n < kPerCopy; ++n) shared[i * kPerCopy + n] = 0;
    sync_block();
    copy_async(shared + i * kPerCopy, args.x + i * kPerCopy);  // fault: copies_shared_without_barrier
    commit_copies();
    wait_copies<0>();
    if (fixed) sync_block();
    args.out[i] = shared[(kThreads - 1 - i) * kPerCopy];  // fault: copies_shared_without_barrier
}

template <bool fixed>
__global__ void never_wait(InOut args) {
    const int i = threadIdx.x * kPerCopy;
    copy_async(shared_memory<float>() + i, args.x + i);  // fault: copies_never_waited_for
    commit_copies();
    if (fixed) wait_copies<0>();
}

void run(const char* name, void (*kernel)(InOut)) {
    constexpr int copied = kThreads * kPerCopy;
    run_in_out(name, kernel, copied, {1, kThreads, nullptr, 2 * copied * sizeof(float)});
}

const Fault early("missing_wait_copies",
                  [](const char* name, bool fixed) { run(name, fixed ? read_early<true> : read_early<false>); });
const Fault too_few("waits_for_too_few_copies", [](const char* name, bool fixed) {
    run(name, fixed ? wait_for_too_few<true> : wait_for_too_few<false>);
});
const Fault no_barrier("copies_shared_without_barrier", [](const char* name, bool fixed) {
    run(name, fixed ? share_without_barrier<true> : share_without_barrier<false>);
});
const Fault never("copies_never_waited_for",
                  [](const char* name, bool fixed) { run(name, fixed ? never_wait<true> : never_wait<false>); });

}  // namespace
}  // namespace xlayer::faults
