// Instructions of a warp: votes, shuffles, matrices from shared memory and their products.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "selftest.h"

namespace xlayer::selftest {
namespace {

// --- Votes and shuffles ---------------------------------------------------------------------------------------------

template <class V>
struct Exchange {
    const V* values;
    const int* lanes;
    V *shuffled, *exchanged;
    const bool* votes;
    unsigned* ballots;
    int mask;
};

template <class V>
__global__ void exchange(Exchange<V> args) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    args.shuffled[i] = shuffle(args.values[i], args.lanes[i]);
    args.exchanged[i] = shuffle_xor(args.values[i], args.mask);
    args.ballots[i] = ballot(args.votes[i]);
}

template <class V>
V random_value(Random& random) {
    return static_cast<V>(random.unit() * 1e9);
}

template <class V>
void exchanges(Random& random) {
    const int warps = random.between(1, 6), blocks = random.between(1, 4), threads = warps * kWarpSize;
    const auto count = static_cast<size_t>(threads * blocks);
    std::vector<V> values(count), shuffled(count), exchanged(count);
    std::vector<int> lanes(count);
    std::vector<char> votes(count);
    std::vector<unsigned> ballots(count);
    for (size_t i = 0; i < count; ++i) {
        values[i] = random_value<V>(random);
        lanes[i] = random.below(3 * kWarpSize);  // the device takes what is left of a division by 32
        votes[i] = static_cast<char>(random.below(2));
    }
    const int mask = random.below(kWarpSize);
    const auto* as_bools = reinterpret_cast<const bool*>(votes.data());
    with_schedules(random, [&] {
        launch("exchange", exchange<V>, {blocks, threads, nullptr},
               {values.data(), lanes.data(), shuffled.data(), exchanged.data(), as_bools, ballots.data(), mask});
        for (size_t i = 0; i < count; ++i) {
            const size_t warp = i / kWarpSize * kWarpSize, lane = i % kWarpSize;
            require_equal(shuffled[i], values[warp + static_cast<size_t>(lanes[i]) % kWarpSize], "shuffle");
            require_equal(exchanged[i], values[warp + (lane ^ static_cast<size_t>(mask))], "shuffle_xor");
            require_equal(ballots[i] >> lane & 1, votes[i] ? 1u : 0u, "the own bit of ballot");
            require_equal(ballots[i], ballots[warp], "ballot in another lane");
        }
    });
}

// --- Matrices from shared memory ------------------------------------------------------------------------------------

constexpr int kRowBytes = 16, kRows = 64;  // rows in shared memory, more than are loaded

struct Load {
    const uint16_t* elements;  // [kRows, 8]
    const int* row;            // of each lane
    uint16_t* out;             // [N, 8, 8]
};

template <int N, bool transposed>
__global__ void load_kernel(Load args) {
    auto* shared = shared_memory<uint16_t>();
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = lane; i < kRows * 8; i += kWarpSize) shared[i] = args.elements[i];
    sync_warp();
    uint32_t loaded[N];
    const uint16_t* row = shared + args.row[lane] * 8;
    if constexpr (transposed) {
        load_matrices_transposed(loaded, row);
    } else {
        load_matrices(loaded, row);
    }
    const int g = lane / 4, t = lane % 4;
    for (int n = 0; n < N; ++n) {
        for (int half = 0; half < 2; ++half) {
            const int i = transposed ? 2 * t + half : g, j = transposed ? g : 2 * t + half;
            args.out[n * 64 + i * 8 + j] = static_cast<uint16_t>(loaded[n] >> (16 * half));
        }
    }
}

template <int N, bool transposed>
void loads(Random& random) {
    std::vector<uint16_t> elements(kRows * 8), out(N * 64);
    for (auto& x : elements) x = static_cast<uint16_t>(random.bits());
    std::vector<int> rows(kWarpSize);
    for (int& row : rows) row = random.below(kRows);
    with_schedules(random, [&] {
        std::fill(out.begin(), out.end(), uint16_t{0});
        launch("load", load_kernel<N, transposed>, {1, kWarpSize, nullptr, kRows * kRowBytes},
               {elements.data(), rows.data(), out.data()});
        for (size_t i = 0; i < out.size(); ++i) {
            const auto row = static_cast<size_t>(rows[i / 8]);
            require_equal(out[i], elements[row * 8 + i % 8], "element " + std::to_string(i));
        }
    });
}

// --- Matrix products ------------------------------------------------------------------------------------------------

// d [M, 8] += a [M, K] · b [K, 8], one product per block.
template <class T>
struct Factors {
    const T *a, *b;
    Accumulator<T>* d;
};

template <class T>
__global__ void multiply_16x8x16(Factors<T> args) {
    const T *a = args.a + blockIdx.x * 256, *b = args.b + blockIdx.x * 128;
    float* d = args.d + blockIdx.x * 128;
    const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
    const auto pair = [](T first, T second) { return first.bits | uint32_t{second.bits} << 16; };
    uint32_t as[4], bs[2];
    for (int n = 0; n < 4; ++n) {
        const T* from = a + (g + n % 2 * 8) * 16 + 2 * t + n / 2 * 8;
        as[n] = pair(from[0], from[1]);
    }
    for (int n = 0; n < 2; ++n) {
        const T* from = b + (2 * t + n * 8) * 8 + g;
        bs[n] = pair(from[0], from[8]);
    }
    float ds[4];
    for (int n = 0; n < 4; ++n) ds[n] = d[(g + n / 2 * 8) * 8 + 2 * t + n % 2];
    mma_16x8x16<T>(ds, as, bs);
    for (int n = 0; n < 4; ++n) d[(g + n / 2 * 8) * 8 + 2 * t + n % 2] = ds[n];
}

__global__ void multiply_16x8x8(Factors<float> args) {
    const float *a = args.a + blockIdx.x * 128, *b = args.b + blockIdx.x * 64;
    float* d = args.d + blockIdx.x * 128;
    const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
    const auto bits = [](float x) {
        uint32_t out;
        memcpy(&out, &x, sizeof out);
        return out;
    };
    uint32_t as[4], bs[2];
    for (int n = 0; n < 4; ++n) as[n] = bits(a[(g + n % 2 * 8) * 8 + t + n / 2 * 4]);
    for (int n = 0; n < 2; ++n) bs[n] = bits(b[(t + n * 4) * 8 + g]);
    float ds[4];
    for (int n = 0; n < 4; ++n) ds[n] = d[(g + n / 2 * 8) * 8 + 2 * t + n % 2];
    mma_16x8x8_tf32(ds, as, bs);
    for (int n = 0; n < 4; ++n) d[(g + n / 2 * 8) * 8 + 2 * t + n % 2] = ds[n];
}

__global__ void multiply_8x8x4(Factors<double> args) {
    const double *a = args.a + blockIdx.x * 32, *b = args.b + blockIdx.x * 32;
    double* d = args.d + blockIdx.x * 64 + threadIdx.x / 4 * 8 + threadIdx.x % 4 * 2;
    mma_8x8x4(d[0], d[1], a[threadIdx.x], b[threadIdx.x % 4 * 8 + threadIdx.x / 4]);
}

double seen(bfloat16 x) { return widen(x); }
double seen(float16 x) { return widen(x); }
double seen(double x) { return x; }
double seen(float x) {  // what the hardware takes of a tf32 operand
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= ~0x1fffu;
    memcpy(&x, &bits, sizeof x);
    return x;
}

template <class T>
T drawn(Random& random, bool whole) {
    const double x = whole ? random.between(-16, 16) : std::ldexp(random.unit(), random.between(-6, 6));
    return narrow<T>(static_cast<Accumulator<T>>(x));
}

// Of whole numbers every product and sum is exact, so any result but the right one shows. Other sums must be what is
// kept of the exact one when it is cut off.
template <class T, int M, int K, void kernel(Factors<T>)>
void products(Random& random) {
    using A = Accumulator<T>;
    const int blocks = random.between(2, 8);
    for (const bool whole : {true, false}) {
        std::vector<T> a(static_cast<size_t>(blocks * M * K)), b(static_cast<size_t>(blocks * K * 8));
        std::vector<A> before(static_cast<size_t>(blocks * M * 8));
        for (T& x : a) x = drawn<T>(random, whole);
        for (T& x : b) x = drawn<T>(random, whole);
        for (A& x : before) x = static_cast<A>(whole ? random.between(-1000, 1000) : random.unit() * 10);
        with_schedules(random, [&] {
            std::vector<A> d = before;
            launch("multiply", kernel, {blocks, kWarpSize, nullptr}, {a.data(), b.data(), d.data()});
            for (int i = 0; i < blocks * M * 8; ++i) {
                const int block = i / (M * 8), row = i / 8 % M, column = i % 8;
                double sum = before[static_cast<size_t>(i)], sizes = std::fabs(sum);
                for (int k = 0; k < K; ++k) {
                    const double product = seen(a[static_cast<size_t>((block * M + row) * K + k)]) *
                                           seen(b[static_cast<size_t>((block * K + k) * 8 + column)]);
                    sum += product;
                    sizes += std::fabs(product);
                }
                const A got = d[static_cast<size_t>(i)];
                const std::string where = "(" + std::to_string(row) + ", " + std::to_string(column) + ")";
                const double short_of = std::fabs(sum) - std::fabs(static_cast<double>(got)), slack = 1e-14 * sizes;
                const double step = std::fabs(static_cast<double>(std::nextafter(got, 2 * got)) - got);
                require(got * sum >= 0 && short_of >= -slack && short_of <= step + slack,
                        where + " is " + std::to_string(got) + ", the sum " + std::to_string(sum));
                if (whole) require_equal(static_cast<double>(got), sum, where);
            }
        });
    }
}

// One row of a times one column of b, the rest zero.
float product_of(const std::vector<float>& row, const std::vector<float>& column, float d) {
    std::vector<bfloat16> a(256), b(128);
    for (auto& x : a) x = narrow<bfloat16>(0);
    for (auto& x : b) x = narrow<bfloat16>(0);
    for (size_t k = 0; k < row.size(); ++k) {
        a[k] = narrow<bfloat16>(row[k]);
        b[k * 8] = narrow<bfloat16>(column[k]);
    }
    std::vector<float> out(128);
    out[0] = d;
    launch("multiply", multiply_16x8x16<bfloat16>, {1, kWarpSize, nullptr}, {a.data(), b.data(), out.data()});
    return out[0];
}

void special_sums(Random&) {
    const float infinity = INFINITY;
    require(std::isnan(product_of({infinity}, {0}, 1)), "infinity · 0 is a number");
    require(std::isnan(product_of({infinity, 1}, {1, -infinity}, 0)), "infinity − infinity is a number");
    require(std::isnan(product_of({1}, {NAN}, 0)), "a product with NaN is a number");
    require_equal(product_of({infinity}, {-2}, 7), -infinity, "an infinite sum");
    require_equal(product_of({0x1p127f}, {4}, 0), infinity, "a sum that is too large");
    require_equal(product_of({0x1p127f, -0x1p127f}, {4, 4}, 3), 3.0f, "a sum of products that are too large");
    require_equal(product_of({1}, {0x1p-24f}, 1), 1.0f, "a sum that is cut off");
    require_equal(product_of({1}, {-0x1p-30f}, 1), std::nextafter(1.0f, 0.0f), "a difference that is cut off");
    require_equal(product_of({0x1p-70f}, {0x1p-79f}, 0), 0x1p-149f, "the least number there is");
    require_equal(product_of({1, 0x1p-20f, -1}, {1, 0x1p-20f, 1}, 0), 0x1p-40f, "a sum in which much cancels");
}

const Registered all[] = {
    {"shuffles and votes of int", exchanges<int>},
    {"shuffles and votes of unsigned", exchanges<unsigned>},
    {"shuffles and votes of float", exchanges<float>},
    {"shuffles and votes of double", exchanges<double>},
    {"load_matrices<1>", loads<1, false>},
    {"load_matrices<2>", loads<2, false>},
    {"load_matrices<4>", loads<4, false>},
    {"load_matrices_transposed<1>", loads<1, true>},
    {"load_matrices_transposed<2>", loads<2, true>},
    {"load_matrices_transposed<4>", loads<4, true>},
    {"products of bfloat16 matrices", products<bfloat16, 16, 16, multiply_16x8x16<bfloat16>>},
    {"products of float16 matrices", products<float16, 16, 16, multiply_16x8x16<float16>>},
    {"products of tf32 matrices", products<float, 16, 8, multiply_16x8x8>},
    {"products of float64 matrices", products<double, 8, 4, multiply_8x8x4>},
    {"sums that overflow, cancel or are cut off", special_sums},
};

}  // namespace
}  // namespace xlayer::selftest
