#include "fault.h"

namespace xlayer::faults {
namespace {

// As many frames of a KiB as `depth` says.
__attribute__((noinline)) float deep(const float* x, int depth) {  // fault: stack_overflow
    volatile float local[256];
    for (int i = 0; i < 256; ++i) local[i] = x[i % kWarp];  // fault: stack_overflow
    const float below = depth > 0 ? deep(x, depth - 1) : 0;
    return below + local[depth % 256];
}

template <bool fixed>
__global__ void recurse(InOut args) {
    args.out[threadIdx.x] = deep(args.x, fixed ? 8 : 1 << 20);
}

const Fault planted("stack_overflow", [](const char* name, bool fixed) {
    run_in_out(name, fixed ? recurse<true> : recurse<false>, kWarp, {1, kWarp, nullptr});
});

}  // namespace
}  // namespace xlayer::faults
