#include "fault.h"

namespace xlayer::faults {
namespace {

constexpr int kRows = 16, kInner = 16, kColumns = 8;

struct Product {
    const float *a, *b;  // (kRows, kInner), (kInner, kColumns)
    float* out;          // (kRows, kColumns)
};

// Without the fix lanes hold b as they would hold its transpose.
template <bool fixed>
__global__ void multiply(Product args) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t a[4], b[2];
    for (int n = 0; n < 4; ++n) {
        const float* from = args.a + (g + n % 2 * 8) * kInner + 2 * t + n / 2 * 8;
        a[n] = pack<bfloat16>(from[0], from[1]);
    }
    for (int n = 0; n < 2; ++n) {
        const int k = fixed ? 2 * t + n * 8 : g + n * 8, column = fixed ? g : 2 * t;
        const float* from = args.b + k * kColumns + column;
        b[n] = pack<bfloat16>(from[0], from[fixed ? kColumns : 1]);
    }
    float d[4] = {};
    mma_16x8x16<bfloat16>(d, a, b);
    for (int n = 0; n < 4; ++n) args.out[(g + n / 2 * 8) * kColumns + 2 * t + n % 2] = d[n];
}

// Against the plain product, which is exact for small integers.
const Fault planted("wrong_mma_layout", [](const char* name, bool fixed) {
    auto a = input<float>("a", kRows * kInner);
    auto b = input<float>("b", kInner * kColumns);
    auto out = output<float>("out", kRows * kColumns);
    launch(name, fixed ? multiply<true> : multiply<false>, {1, kWarpSize, nullptr}, {a.data(), b.data(), out.data()});
    for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kColumns; ++j) {
            float expected = 0;
            for (int k = 0; k < kInner; ++k) expected += a[i * kInner + k] * b[k * kColumns + j];
            const float found = out[i * kColumns + j];
            if (found == expected) continue;
            throw std::runtime_error(std::string(name) + ": wrong product at (" + std::to_string(i) + ", " +
                                     std::to_string(j) + "): " + std::to_string(found) + " instead of " +
                                     std::to_string(expected));
        }
    }
});

}  // namespace
}  // namespace xlayer::faults
