// Sums the partial sums of hyper's backward, always in the same order.
#include "cuda/hyper/backward.cuh"

namespace xlayer::cuda::hyper {
namespace {

constexpr int kFinishWarps = 8;
constexpr int kFinishThreads = kFinishWarps * kWarpSize;

// `count` arrays, `stride` elements apart.
template <class A>
struct Partials {
    const A* from;
    int64_t count, stride;
};

// Sums arrays at `at`, one element per lane: every warp takes each kFinishWarps-th array.
template <class A>
__device__ __forceinline__ A sum_over_arrays(const Partials<A>& partials, int64_t at, bool real, A* shared) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    A sum = 0;
#pragma unroll 8
    for (int64_t p = warp; p < partials.count && real; p += kFinishWarps)
        sum += partials.from[p * partials.stride + at];
    sync_block();  // the last use of `shared` is over
    shared[threadIdx.x] = sum;
    sync_block();
    sum = 0;
#pragma unroll
    for (int w = 0; w < kFinishWarps; ++w) sum += shared[w * kWarpSize + lane_id()];
    return sum;
}

template <class A>
struct FinishWeight {
    Partials<A> partials;
    int64_t elements;
    A* to;
};

// A lane per element.
// resources: hyper_finish_weight_kernel threads 256, registers 64, shared 2048, occupancy 0.5
// sass: hyper_finish_weight_kernel LDG
template <class A>
__global__ void __launch_bounds__(kFinishThreads, 4) hyper_finish_weight_kernel(FinishWeight<A> args) {
    A* const shared = shared_memory<A>();
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kWarpSize; first < args.elements;
         first += static_cast<int64_t>(gridDim.x) * kWarpSize) {
        const int64_t at = first + lane_id();
        const A sum = sum_over_arrays(args.partials, at, at < args.elements, shared);
        if (threadIdx.x < kWarpSize && at < args.elements) args.to[at] = sum;
    }
}

template <class A>
struct FinishCoefficients {
    Partials<double> num_coefficients;
    Partials<A> post;
    int n;
    A *base, *bias, *scale, *grad_post;  // null: not wanted
};

// One block: the gradients of base, bias and scale, and of post's coefficients where tokens share them.
// resources: hyper_finish_coefficients_kernel threads 256, registers 64, shared 9216, occupancy 0.5
// sass: hyper_finish_coefficients_kernel LDG
template <class A>
__global__ void __launch_bounds__(kFinishThreads, 4) hyper_finish_coefficients_kernel(FinishCoefficients<A> args) {
    double* const shared = shared_memory<double>();
    double* const sums = shared + kFinishThreads;
    const int n = args.n, columns = n + 2, num_coefficients = n * columns;
    for (int first = 0; first < 3 * num_coefficients && args.base != nullptr; first += kWarpSize) {
        const int at = first + lane_id();
        const double sum = sum_over_arrays(args.num_coefficients, at, at < 3 * num_coefficients, shared);
        if (threadIdx.x < kWarpSize && at < 3 * num_coefficients) sums[at] = sum;
    }
    sync_block();
    const int thread = static_cast<int>(threadIdx.x);
    for (int at = thread; at < num_coefficients && args.base != nullptr; at += kFinishThreads)
        args.base[at] = static_cast<A>(sums[at]);
    if (thread < columns && args.scale != nullptr) {
        double scale = 0, bias = 0;
        for (int j = 0; j < n; ++j) {
            scale += sums[num_coefficients + j * columns + thread];
            bias += sums[2 * num_coefficients + j * columns + thread];
        }
        args.scale[thread] = static_cast<A>(scale);
        args.bias[thread] = static_cast<A>(bias);
    }
    if (args.grad_post == nullptr) return;
    for (int first = 0; first < n * (n + 1); first += kWarpSize) {
        const int at = first + lane_id();
        const A sum = sum_over_arrays(args.post, at, at < n * (n + 1), reinterpret_cast<A*>(shared));
        if (threadIdx.x < kWarpSize && at < n * (n + 1)) args.grad_post[post_index(n, at / n, at % n)] = sum;
    }
    if (thread < n) args.grad_post[thread * columns] = 0;  // post does not use c_j0
}

template <class A>
struct FinishTokens {
    const A* partials;  // [tokens, tiles, n+1, n]
    int64_t tokens, tiles;
    int n;
    A* to;  // [tokens, n, n+2]
};

// The gradient of post's coefficients where every token has its own. A thread per number.
// resources: hyper_finish_tokens_kernel threads 256, registers 64, shared 0, occupancy 0.5
// sass: hyper_finish_tokens_kernel LDG
template <class A>
__global__ void __launch_bounds__(kFinishThreads, 4) hyper_finish_tokens_kernel(FinishTokens<A> args) {
    const int n = args.n, columns = n + 2;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kFinishThreads, all = args.tokens * n * columns;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x; i < all; i += step) {
        const int64_t token = i / (n * columns);
        const int at = static_cast<int>(i % (n * columns)), j = at / columns, m = at % columns;
        A sum = 0;
        if (m > 0) {
            const int which = m <= n ? j * n + m - 1 : n * n + j;
            const A* from = args.partials + token * args.tiles * n * (n + 1) + which;
#pragma unroll 4
            for (int64_t tile = 0; tile < args.tiles; ++tile) sum += from[tile * n * (n + 1)];
        }
        args.to[i] = sum;
    }
}

template <class A>
void finish(const BackwardPlan& plan, void* stream) {
    const HyperBackward& args = plan.args;
    const int64_t n = args.size.streams, tokens = args.size.tokens();
    const bool shared = plan.post && args.post.shared;
    if (args.pre || shared) {
        const FinishCoefficients<A> num_coefficients{
            {static_cast<const double*>(plan.coefficient_partials), plan.coefficient_runs, 3 * plan.num_coefficients},
            {static_cast<const A*>(plan.post_partials), plan.runs * plan.tiles, n * (n + 1)},
            static_cast<int>(n),
            args.pre ? static_cast<A*>(args.grad_base) : nullptr,
            plan.dynamic ? static_cast<A*>(args.grad_bias) : nullptr,
            plan.dynamic ? static_cast<A*>(args.grad_scale) : nullptr,
            shared ? static_cast<A*>(args.grad_post_coefficients) : nullptr};
        const size_t bytes = sizeof(double) * static_cast<size_t>(kFinishThreads + 3 * plan.num_coefficients);
        launch("hyper_finish_coefficients", hyper_finish_coefficients_kernel<A>, {1, kFinishThreads, stream, bytes},
               num_coefficients);
    }
    if (plan.post && !shared) {
        const FinishTokens<A> post{static_cast<const A*>(plan.post_partials), tokens, plan.tiles, static_cast<int>(n),
                                   static_cast<A*>(args.grad_post_coefficients)};
        launch("hyper_finish_tokens", hyper_finish_tokens_kernel<A>,
               {ceil_div(tokens * plan.num_coefficients, kFinishThreads), kFinishThreads, stream}, post);
    }
    if (plan.dynamic) {
        const int64_t elements = args.connection.weights(args.size);
        const FinishWeight<A> weight{{static_cast<const A*>(plan.weight_partials), plan.weight_runs, elements},
                                     elements,
                                     static_cast<A*>(args.grad_weight)};
        launch("hyper_finish_weight", hyper_finish_weight_kernel<A>,
               {ceil_div(elements, kWarpSize), kFinishThreads, stream, sizeof(A) * kFinishThreads}, weight);
    }
}

}  // namespace

void backward_finish(const BackwardPlan& plan, void* stream) {
    plan.args.size.dtype == DType::float64 ? finish<double>(plan, stream) : finish<float>(plan, stream);
}

}  // namespace xlayer::cuda::hyper
