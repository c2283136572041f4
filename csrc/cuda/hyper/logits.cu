// z of hyper's norm rms_all: the matrix product [tokens, n·d] × [n·d, n·(n+2)] and the norm of each row. A block
// computes kTokens tokens by kRows rows of the weight in slices of kStep elements of n·d; a thread one token and kGroup
// rows.
#include "cuda/hyper/logits.cuh"

namespace xlayer::cuda::hyper {
namespace {

constexpr int kTokens = 32;  // of a block
constexpr int kRows = 32;    // of the weight
constexpr int kStep = 32;    // elements of n·d at a time
constexpr int kGroup = 4;    // rows of a thread
constexpr int kLogitThreads = kTokens * kRows / kGroup;

constexpr int kSumWarps = 4;
constexpr int kSumThreads = kSumWarps * kWarpSize;

template <class A>
struct LogitsShared {
    A h[kStep][kTokens + 1], weight[kStep][kRows + 1];
};

// Thread (t, r): token t of the block, rows r·kGroup and on. Sums go over n·d in order: sums of kStep products are
// added to a sum of sums, so that rounding does not grow with the length of one chain.
// resources: hyper_logits_kernel threads 256, registers 128, shared 17408, occupancy 0.25
// sass: hyper_logits_kernel LDG
template <class T>
__global__ void __launch_bounds__(kLogitThreads, 2) hyper_logits_kernel(LogitsOfAll args) {
    using A = Accumulator<T>;
    LogitsShared<A>& shared = *shared_memory<LogitsShared<A>>();
    const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = thread / kWarpSize;
    const HyperSizes& size = args.size;
    const int64_t tokens = tokens_of(size), d = size.width, all = size.streams * d;
    const int64_t rows = size.streams * (size.streams + 2);
    const int64_t row = blockIdx.y * kRows;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens; first < tokens;
         first += static_cast<int64_t>(gridDim.x) * kTokens) {
        A sum[kGroup] = {}, squares = 0;
        for (int64_t begin = 0; begin < all; begin += kStep) {
            // A warp brings rows warp, warp + 8, … of both, a lane one element.
            const int64_t e = begin + lane, j = e / d;
            for (int r = warp; r < kTokens; r += kLogitThreads / kWarpSize) {
                const bool real = first + r < tokens && e < all;
                const int64_t offset =
                    token_offset(size, args.in.stride, first + r) + j * args.in.stride[2] + e - j * d;
                shared.h[lane][r] = real ? widen(static_cast<const T*>(args.in.data)[offset]) : A(0);
                const bool used = row + r < rows && e < all;
                shared.weight[lane][r] = used ? static_cast<const A*>(args.weight)[(row + r) * all + e] : A(0);
            }
            sync_block();
            A step[kGroup] = {}, step_squares = 0;
#pragma unroll 8
            for (int i = 0; i < kStep; ++i) {
                const A h = shared.h[i][lane];
                step_squares = fma(h, h, step_squares);
#pragma unroll
                for (int g = 0; g < kGroup; ++g) step[g] = fma(h, shared.weight[i][warp * kGroup + g], step[g]);
            }
            squares += step_squares;
#pragma unroll
            for (int g = 0; g < kGroup; ++g) sum[g] += step[g];
            sync_block();
        }
        const int64_t token = first + lane;
        if (token >= tokens) continue;  // all barriers of these tokens are behind
        const A inverse = A(1) / sqrt(squares / static_cast<A>(all) + static_cast<A>(args.eps));
        for (int g = 0; g < kGroup && row + warp * kGroup + g < rows; ++g)
            static_cast<A*>(args.logits)[token * rows + row + warp * kGroup + g] = inverse * sum[g];
        if (blockIdx.y > 0) continue;
        A* const statistics = static_cast<A*>(args.statistics) + token * size.streams * kHyperStatistics;
        for (int64_t j = warp; j < size.streams; j += kLogitThreads / kWarpSize) {
            A* const of = statistics + j * kHyperStatistics;
            of[0] = of[1] = 0, of[2] = inverse;
        }
    }
}

// The sum of each row of the weight: what a mean of 1 would add to z. A block per row.
template <class A>
struct WeightSums {
    const A* weight;
    int64_t width;
    A* sums;
};
// resources: hyper_weight_sums_kernel threads 128, registers 64, shared 32, occupancy 0.5
// sass: hyper_weight_sums_kernel LDG, STG
template <class A>
__global__ void __launch_bounds__(kSumThreads) hyper_weight_sums_kernel(WeightSums<A> args) {
    A* const shared = shared_memory<A>();
    const A* const row = args.weight + blockIdx.x * args.width;
    A sum[1] = {};
    for (int64_t e = threadIdx.x; e < args.width; e += kSumThreads) sum[0] += row[e];
    sum_over_block<1, kSumWarps>(sum, shared, args.sums + blockIdx.x);
}

}  // namespace

void sum_weights(const HyperSizes& size, const void* weight, void* sums, void* stream) {
    const auto launch_sums = [&](auto accumulator) {
        using A = decltype(accumulator);
        launch("hyper_weight_sums", hyper_weight_sums_kernel<A>,
               {size.columns(), kSumThreads, stream, sizeof(A) * kSumWarps},
               WeightSums<A>{static_cast<const A*>(weight), size.width, static_cast<A*>(sums)});
    };
    size.dtype == DType::float64 ? launch_sums(double{}) : launch_sums(float{});
}

void logits_of_all(const LogitsOfAll& args, void* stream) {
    dispatch_dtype(args.size.dtype, [&](auto element) {
        using T = decltype(element);
        launch("hyper_logits", hyper_logits_kernel<T>,
               {ceil_div(args.size.tokens(), kTokens), kLogitThreads, stream, sizeof(LogitsShared<Accumulator<T>>),
                ceil_div(args.size.coefficients(), kRows)},
               args);
    });
}

}  // namespace xlayer::cuda::hyper
