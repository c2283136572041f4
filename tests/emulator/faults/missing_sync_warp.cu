#include "fault.h"

namespace xlayer::faults {
namespace {

struct Args {
    const uint32_t* x;
    uint32_t* out;
};

// A matrix of 8×8 16-bit elements through shared memory into registers. Lanes name the rows that they have written
// themselves, but what they get comes from the rows of others.
template <bool fixed>
__global__ void matrix_to_registers(Args args) {
    uint32_t* shared = shared_memory<uint32_t>();
    const int lane = threadIdx.x;
    uint32_t* row = shared + lane % 8 * 4;
    if (lane < 8) store_vec(row, load_vec<4>(args.x + lane * 4));
    if (fixed) sync_warp();
    uint32_t elements[1];
    load_matrices(elements, row);  // fault: missing_sync_warp
    args.out[lane] = elements[0];
}

const Fault planted("missing_sync_warp", [](const char* name, bool fixed) {
    auto x = input<uint32_t>("x", kWarpSize);
    auto out = output<uint32_t>("out", kWarpSize);
    launch(name, fixed ? matrix_to_registers<true> : matrix_to_registers<false>,
           {1, kWarpSize, nullptr, kWarpSize * sizeof(uint32_t)}, {x.data(), out.data()});
});

}  // namespace
}  // namespace xlayer::faults
