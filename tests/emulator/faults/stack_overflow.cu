#include "fault.h"

namespace xlayer::faults {
namespace {

// As many frames as `depth` says. They read and write nothing but the stack itself: an access would be checked on the
// same stack, which might then end within the checker.
__attribute__((noinline)) float deep(float x, int depth) {       // fault: stack_overflow
    const float below = depth > 0 ? deep(x + 1, depth - 1) : 0;  // fault: stack_overflow
    return below + x;
}

template <bool fixed>
__global__ void recurse(InOut args) {
    args.out[threadIdx.x] = deep(args.x[threadIdx.x], fixed ? 8 : 1 << 20);
}

const Fault planted("stack_overflow", [](const char* name, bool fixed) {
    run_in_out(name, fixed ? recurse<true> : recurse<false>, kWarpSize, {1, kWarpSize, nullptr});
});

}  // namespace
}  // namespace xlayer::faults
