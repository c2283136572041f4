#include "fault.h"

namespace xlayer::faults {
namespace {

template <bool fixed>
__global__ void load_vector(InOut args) {
    const auto values = load_vec<4>(args.x + (fixed ? 4 : 5));  // fault: misaligned_load
    args.out[0] = values.at[0] + values.at[3];
}

template <bool fixed>
__global__ void store_vector(InOut args) {
    Vector<float, 4> values;
    for (int n = 0; n < 4; ++n) values.at[n] = args.x[n];
    store_vec(args.out + (fixed ? 4 : 2), values);  // fault: misaligned_store
}

template <bool fixed>
__global__ void matrix_rows(InOut args) {
    uint32_t* shared = shared_memory<uint32_t>();
    const int lane = threadIdx.x;
    shared[lane] = shared[lane + kWarpSize] = 0;
    sync_warp();
    uint32_t elements[1];
    load_matrices(elements, shared + lane % 8 * 4 + (fixed ? 0 : 1));  // fault: misaligned_matrix_row
    args.out[lane] = static_cast<float>(elements[0]);
}

void run(const char* name, void (*kernel)(InOut), int threads) {
    run_in_out(name, kernel, 4 * kWarpSize, {1, threads, nullptr, 2 * kWarpSize * sizeof(uint32_t)});
}

const Fault loads("misaligned_load",
                  [](const char* name, bool fixed) { run(name, fixed ? load_vector<true> : load_vector<false>, 1); });
const Fault stores("misaligned_store", [](const char* name, bool fixed) {
    run(name, fixed ? store_vector<true> : store_vector<false>, 1);
});
const Fault rows("misaligned_matrix_row", [](const char* name, bool fixed) {
    run(name, fixed ? matrix_rows<true> : matrix_rows<false>, kWarpSize);
});

}  // namespace
}  // namespace xlayer::faults
