#include "fault.h"

namespace xlayer::faults {
namespace {

constexpr int kBlocks = 4;

// Every block adds to the same sum.
template <bool fixed>
__global__ void add(InOut args) {
    args.out[fixed ? blockIdx.x : 0] += args.x[blockIdx.x];  // fault: blocks_add_to_one_sum
}

// A block takes what the block before it wrote.
template <bool fixed>
__global__ void chain(InOut args) {
    float before = 0;
    if (!fixed && blockIdx.x > 0) before = args.out[blockIdx.x - 1];  // fault: block_reads_what_another_wrote
    args.out[blockIdx.x] = before + args.x[blockIdx.x];               // fault: block_reads_what_another_wrote
}

// All blocks read one element, which one of them overwrites.
template <bool fixed>
__global__ void overwrite(InOut args) {
    const float first = fixed ? args.x[0] : args.out[0];  // fault: block_overwrites_what_others_read
    args.out[blockIdx.x] = first + 1;                     // fault: block_overwrites_what_others_read
}

const Fault adds("blocks_add_to_one_sum", [](const char* name, bool fixed) {
    run_in_out(name, fixed ? add<true> : add<false>, kBlocks, {kBlocks, 1, nullptr});
});
const Fault chains("block_reads_what_another_wrote", [](const char* name, bool fixed) {
    run_in_out(name, fixed ? chain<true> : chain<false>, kBlocks, {kBlocks, 1, nullptr});
});
const Fault overwrites("block_overwrites_what_others_read", [](const char* name, bool fixed) {
    run_in_out(name, fixed ? overwrite<true> : overwrite<false>, kBlocks, {kBlocks, 1, nullptr});
});

}  // namespace
}  // namespace xlayer::faults
