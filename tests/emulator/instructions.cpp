// What the instructions of a warp compute, and the asynchronous copies of a thread.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "checker.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"
#include "scheduler.h"

namespace xlayer::emulator {
namespace {

float as_float(uint32_t bits) {
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}
uint32_t as_bits(float x) {
    uint32_t out;
    memcpy(&out, &x, sizeof out);
    return out;
}

// --- Matrix products ------------------------------------------------------------------------------------------------

constexpr uint32_t kNaN = 0x7fffffff;  // the one that the device makes

using Doubles = double __attribute__((vector_size(8 * sizeof(double))));  // a row of a product
using Floats = float __attribute__((vector_size(8 * sizeof(float))));
using Longs = int64_t __attribute__((vector_size(8 * sizeof(int64_t))));
using Ints = int32_t __attribute__((vector_size(8 * sizeof(int32_t))));

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define XLAYER_WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), optimize("O3")))
#else
#define XLAYER_WIDEST
#endif

// d += a·b, of 16×inner and inner×8 elements; products of 16-bit and tf32 elements are exact in float64. The device
// drops what it cannot keep of a sum, so that the result is never further from zero than the sum. Too large a sum
// becomes infinity.
template <int inner>
XLAYER_WIDEST void add_product(Product& product) {
    for (int i = 0; i < 16; ++i) {
        Doubles sum = {}, column;
        for (int k = 0; k < inner; ++k) {
            memcpy(&column, product.b + k * 8, sizeof column);
            sum += product.a[i * inner + k] * column;
        }
        Floats row;
        memcpy(&row, product.d + i * 8, sizeof row);
        sum += __builtin_convertvector(row, Doubles);

        const Floats nearest = __builtin_convertvector(sum, Floats);
        const Longs magnitude = (Longs)sum & INT64_MAX;
        const Longs rounded = (Longs) __builtin_convertvector(nearest, Doubles) & INT64_MAX;
        const Ints beyond = __builtin_convertvector(rounded > magnitude, Ints);
        const Ints finite = ((Ints)nearest & INT32_MAX) < 0x7f800000;
        const Ints is_nan = nearest != nearest;
        const Ints out = (((Ints)nearest + (beyond & finite)) & ~is_nan) | (static_cast<int32_t>(kNaN) & is_nan);
        memcpy(product.d + i * 8, &out, sizeof out);
    }
}

// The same for 8×4 and 4×8 elements of float64, each product added with one rounding.
XLAYER_WIDEST void add_wide_product(Product& product) {
    for (int i = 0; i < 8; ++i) {
        double* const row = product.wide_d + i * 8;
        for (int k = 0; k < 4; ++k) {
            for (int j = 0; j < 8; ++j) row[j] = __builtin_fma(product.a[i * 4 + k], product.b[k * 8 + j], row[j]);
        }
    }
}

inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float widen(__half x) { return __half2float(x); }
inline float widen_tf32(uint32_t bits) { return as_float(bits & ~uint32_t{0x1fff}); }

// Where a lane's elements of a 16×8 result are: columns 2t and 2t + 1 of rows g and g + 8, for lane 4g + t.
void lay_down(float* d, const float* own, int g, int t) {
    memcpy(d + g * 8 + 2 * t, own, 2 * sizeof *d);
    memcpy(d + (g + 8) * 8 + 2 * t, own + 2, 2 * sizeof *d);
}
void take(const float* d, float* own, int g, int t) {
    memcpy(own, d + g * 8 + 2 * t, 2 * sizeof *d);
    memcpy(own + 2, d + (g + 8) * 8 + 2 * t, 2 * sizeof *d);
}

template <class Element>
void multiply_16x8x16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
    Product& product = running_warp().product;
    const int lane = running_fiber().lane, g = lane / 4, t = lane % 4;
    for (int n = 0; n < 4; ++n) {
        double* const to = product.a + (g + n % 2 * 8) * 16 + 2 * t + n / 2 * 8;
        to[0] = widen(Element{static_cast<uint16_t>(a[n])});
        to[1] = widen(Element{static_cast<uint16_t>(a[n] >> 16)});
    }
    for (int n = 0; n < 2; ++n) {
        double* const to = product.b + (2 * t + n * 8) * 8 + g;
        to[0] = widen(Element{static_cast<uint16_t>(b[n])});
        to[8] = widen(Element{static_cast<uint16_t>(b[n] >> 16)});
    }
    lay_down(product.d, d, g, t);
    meet_in_warp(Operation::mma_16x8x16, site, [](Warp& warp) { add_product<16>(warp.product); });
    take(product.d, d, g, t);
}

void multiply_16x8x8(float* d, const uint32_t* a, const uint32_t* b, Site site) {
    Product& product = running_warp().product;
    const int lane = running_fiber().lane, g = lane / 4, t = lane % 4;
    for (int n = 0; n < 4; ++n) product.a[(g + n % 2 * 8) * 8 + t + n / 2 * 4] = widen_tf32(a[n]);
    for (int n = 0; n < 2; ++n) product.b[(t + n * 4) * 8 + g] = widen_tf32(b[n]);
    lay_down(product.d, d, g, t);
    meet_in_warp(Operation::mma_16x8x8_tf32, site, [](Warp& warp) { add_product<8>(warp.product); });
    take(product.d, d, g, t);
}

void multiply_8x8x4(double* d, const double* a, const double* b, Site site) {
    Product& product = running_warp().product;
    const int lane = running_fiber().lane, g = lane / 4, t = lane % 4;
    product.a[g * 4 + t] = *a;
    product.b[t * 8 + g] = *b;
    double* const own = product.wide_d + g * 8 + 2 * t;
    memcpy(own, d, 2 * sizeof *d);
    meet_in_warp(Operation::mma_8x8x4, site, [](Warp& warp) { add_wide_product(warp.product); });
    memcpy(d, own, 2 * sizeof *d);
}

// --- Matrices from shared memory ------------------------------------------------------------------------------------

[[noreturn]] void fault_address(const char* what, const void* address, const char* why, Site site) {
    char text[32];
    snprintf(text, sizeof text, "%p", address);
    fault(std::string(what) + " with address " + text + ", which " + why, site);
}

// Row r of matrix n, whose address lane 8n + r brought.
const char* row_of(const Warp& warp, int n, int r) {
    const MatrixLoad& load = warp.loads[8 * n + r];
    const auto* row = static_cast<const char*>(load.row);
    const InTheNameOf lane(warp.lanes[8 * n + r]);
    if (outside_shared(row)) fault_address("load_matrices", row, "is not in shared memory", warp.meeting.site);
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
        fault_address("misaligned load_matrices", row, "is not a multiple of 16", warp.meeting.site);
    }
    check_warp_read(row, 16, load.pc);
    return row;
}

template <bool transposed>
void load(Warp& warp) {
    for (int n = 0; n < warp.matrix_count; ++n) {
        uint16_t matrix[8][8];
        for (int r = 0; r < 8; ++r) memcpy(matrix[r], row_of(warp, n, r), sizeof matrix[r]);
        for (int lane = 0; lane < kLanes; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const uint16_t first = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
            const uint16_t second = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
            warp.loads[lane].to[n] = first | uint32_t{second} << 16;
        }
    }
}

// --- Pairs ----------------------------------------------------------------------------------------------------------

template <class Element>
Element half(uint32_t pair, int shift) {
    return {static_cast<uint16_t>(pair >> shift)};
}
inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
inline void narrow(float x, __half& to) { to = __float2half_rn(x); }

// f of each element, which it gets the shift of.
template <class Element, class F>
uint32_t each_half(const F& f) {
    Element low, high;
    narrow(f(0), low);
    narrow(f(16), high);
    return low.bits | uint32_t{high.bits} << 16;
}

// The float that is nearest of those no further from zero.
float toward_zero(double x) {
    const auto nearest = static_cast<float>(x);
    if (std::isnan(nearest)) return as_float(kNaN);
    const bool beyond = std::fabs(static_cast<double>(nearest)) > std::fabs(x) && !std::isinf(nearest);
    return as_float(as_bits(nearest) - (beyond ? 1 : 0));
}

// Rounded to odd: of the two neighbors of an inexact value, the one whose last bit is set. Rounding that to a format
// with at least two bits less gives what rounding the value itself gives.
double odd_sum(double a, double b) {
    const double sum = a + b;
    if (!std::isfinite(sum)) return sum;
    const double part = sum - a, error = (a - (sum - part)) + (b - part);
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if (error == 0 || bits % 2 != 0) return sum;
    bits += (error > 0) == (sum > 0) ? 1 : -1;
    double out;
    memcpy(&out, &bits, sizeof out);
    return out;
}
float odd_float(double x) {
    const float chopped = toward_zero(x);
    if (!std::isfinite(chopped)) {
        return std::isfinite(x) ? std::copysign(std::numeric_limits<float>::max(), static_cast<float>(x)) : chopped;
    }
    return chopped == x ? chopped : as_float(as_bits(chopped) | 1);
}

template <class Element>
uint32_t pair_fma(uint32_t a, uint32_t b, uint32_t c) {
    return each_half<Element>([=](int shift) {
        const auto at = [shift](uint32_t pair) { return static_cast<double>(widen(half<Element>(pair, shift))); };
        return odd_float(odd_sum(at(a) * at(b), at(c)));  // the product is exact
    });
}

}  // namespace

// --- Instructions of a warp -----------------------------------------------------------------------------------------

unsigned ballot(bool vote, Site site) {
    Warp& warp = running_warp();
    warp.values[warp.parity][running_fiber().lane] = vote;
    meet_in_warp(Operation::ballot, site, [](Warp& warp) {
        warp.votes = 0;
        for (int lane = 0; lane < kLanes; ++lane) warp.votes |= unsigned(warp.values[warp.parity][lane]) << lane;
    });
    return warp.votes;
}

uint64_t shuffle(uint64_t value, int lane, Site site) {
    Warp& warp = running_warp();
    uint64_t* const values = warp.values[warp.parity];
    values[running_fiber().lane] = value;
    meet_in_warp(Operation::shuffle, site, nullptr);
    return values[lane & (kLanes - 1)];
}

uint64_t shuffle_xor(uint64_t value, int mask, Site site) {
    const int self = running_fiber().lane, other = self ^ mask;
    return shuffle(value, other >= 0 && other < kLanes ? other : self, site);
}

void multiply_matrices(MatrixKind kind, void* d, const void* a, const void* b, Site site) {
    auto* const to = static_cast<float*>(d);
    const auto *left = static_cast<const uint32_t*>(a), *right = static_cast<const uint32_t*>(b);
    switch (kind) {
        case MatrixKind::bfloat16_16x8x16:
            return multiply_16x8x16<__nv_bfloat16>(to, left, right, site);
        case MatrixKind::float16_16x8x16:
            return multiply_16x8x16<__half>(to, left, right, site);
        case MatrixKind::tf32_16x8x8:
            return multiply_16x8x8(to, left, right, site);
        case MatrixKind::float64_8x8x4:
            return multiply_8x8x4(static_cast<double*>(d), static_cast<const double*>(a), static_cast<const double*>(b),
                                  site);
    }
}

void load_matrices(uint32_t* to, int count, bool transposed, const void* row, Site site, const void* pc) {
    Warp& warp = running_warp();
    warp.matrix_count = count;
    warp.loads[running_fiber().lane] = {to, row, pc};
    if (transposed) {
        meet_in_warp(Operation::load_matrices_transposed, site, load<true>);
    } else {
        meet_in_warp(Operation::load_matrices, site, load<false>);
    }
}

// --- Asynchronous copies --------------------------------------------------------------------------------------------

void copy_async(void* shared, const void* global, Site site, const void* pc) {
    constexpr size_t bytes = 16;
    if (outside_shared(shared)) fault_address("copy_async", shared, "is not in shared memory", site);
    if (!outside_shared(global)) fault_address("copy_async", global, "is in shared memory, not in global", site);
    for (const void* address : {const_cast<const void*>(shared), global}) {
        if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
            fault_address("misaligned copy_async", address, "is not a multiple of 16", site);
        }
    }
    check_access(global, bytes, false, pc);
    copy_began(shared, bytes, pc);
    Fiber& self = running_fiber();
    self.copies.push_back({shared, global, self.groups, site});
}

void commit_copies() { ++running_fiber().groups; }

void wait_copies(int may_stay) {
    Fiber& self = running_fiber();
    const auto landed = [&](const Copy& copy) { return copy.group + static_cast<unsigned>(may_stay) < self.groups; };
    const auto end = std::find_if_not(self.copies.begin(), self.copies.end(), landed);
    for (auto copy = self.copies.begin(); copy != end; ++copy) {
        memcpy(copy->shared, copy->global, 16);
        copy_landed(copy->shared, 16);
    }
    self.copies.erase(self.copies.begin(), end);
}

// --- Arithmetic -----------------------------------------------------------------------------------------------------

uint32_t to_tf32(float x) {
    if (std::isnan(x)) return kNaN;
    return (as_bits(x) + 0x1000) & ~uint32_t{0x1fff};
}

float reciprocal(float x) {
    const auto flush = [](float number) { return std::fpclassify(number) == FP_SUBNORMAL ? number * 0 : number; };
    return flush(1 / flush(x));
}

uint32_t pair_fma_bfloat16(uint32_t a, uint32_t b, uint32_t c) { return pair_fma<__nv_bfloat16>(a, b, c); }
uint32_t pair_fma_float16(uint32_t a, uint32_t b, uint32_t c) { return pair_fma<__half>(a, b, c); }

}  // namespace xlayer::emulator
