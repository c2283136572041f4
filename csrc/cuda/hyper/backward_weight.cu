// Gradient of the weight for hyper's norm rms_all: the matrix product of ∂L/∂z [n·(n+2), tokens] and the streams that
// pre read [tokens, n·d], recomputed from h and y. A block takes a tile of columns of one stream and kRows rows of the
// weight, and loops over a run of tokens.
#include "cuda/hyper/backward.cuh"

namespace xlayer::cuda::hyper {
namespace {

constexpr int kWeightThreads = 128;
constexpr int kRows = 24;    // of the weight, whose sums a thread has
constexpr int kTokens = 16;  // whose ∂L/∂z are in shared memory together
template <class T, int N>
constexpr int kWeightElements = N == 0 || sizeof(T) > 2 ? 1 : 2;
template <class T>
constexpr int kWeightBlocks = sizeof(T) == 8 ? 2 : 4;  // on a multiprocessor

struct WeightCall {
    BackwardPlan plan;
    bool vec_in, vec_branch, vec_weight;
    int64_t column_tiles, row_tiles;
};

template <class A, int N>
struct WeightShared {
    A logits[kTokens][kRows], post[kTokens][kMaxStreamsOf<N> + 1];
};

// A thread has V columns of one stream and kRows rows, over a run of tokens.
// resources: hyper_backward_weight_kernel<double, *> threads 128, registers 255, shared 5376, occupancy 0.125
// resources: hyper_backward_weight_kernel threads 128, registers 128, shared 2688, occupancy 0.25
// sass: hyper_backward_weight_kernel LDG, STG
template <class T, int N>
__global__ void __launch_bounds__(kWeightThreads, kWeightBlocks<T>) hyper_backward_weight_kernel(WeightCall call) {
    using A = Accumulator<T>;
    constexpr int V = kWeightElements<T, N>;
    WeightShared<A, N>& shared = *shared_memory<WeightShared<A, N>>();
    const BackwardPlan& plan = call.plan;
    const HyperBackward& args = plan.args;
    const HyperSizes& size = args.size;
    const int n = streams_of<N>(size), num_coefficients = n * (n + 2), thread = static_cast<int>(threadIdx.x);
    const int j = static_cast<int>(blockIdx.x / call.column_tiles % n);
    const int row = static_cast<int>(blockIdx.x / (call.column_tiles * n)) * kRows;
    const int64_t e = (blockIdx.x % call.column_tiles * kWeightThreads + thread) * V, count = size.width - e;
    const bool inside = count > 0;
    const int64_t first = blockIdx.y * plan.weight_run_tokens, tokens = tokens_of(size);
    const int64_t last = first + plan.weight_run_tokens < tokens ? first + plan.weight_run_tokens : tokens;

    A sum[kRows][V] = {};
    for (int64_t begin = first; begin < last; begin += kTokens) {
        const int some = static_cast<int>(last - begin < kTokens ? last - begin : kTokens);
        sync_block();  // the tokens before are done with shared memory
        for (int at = thread; at < some * kRows; at += kWeightThreads) {
            const int t = at / kRows, m = at % kRows;
            const A* const record = static_cast<const A*>(plan.records) + (begin + t) * record_size(n);
            shared.logits[t][m] = row + m < num_coefficients ? record[kLogits * n + row + m] : A(0);
        }
        for (int at = thread; at < some * (n + 1) && plan.post; at += kWeightThreads) {
            const int t = at / (n + 1), i = at % (n + 1);
            const A* const c =
                static_cast<const A*>(args.post.coefficients) + (args.post.shared ? 0 : (begin + t) * num_coefficients);
            shared.post[t][i] = c[post_index(n, i, j)];
        }
        sync_block();
#pragma unroll 2
        for (int t = 0; t < some; ++t) {
            const int64_t token = begin + t;
            const T* const in = static_cast<const T*>(args.in.data) + token_offset(size, args.in.stride, token) + e;
            Vector<T, V> h;
            if (plan.post) {
                A y[V] = {};
                Vector<T, V> all[kMaxStreamsOf<N>];
#pragma unroll
                for (int i = 0; i < kMaxStreamsOf<N>; ++i) {
                    if (N != 0 || i < n) all[i] = read<V>(in + i * args.in.stride[2], count, call.vec_in && inside);
                }
                read_branch<T>(size.branch_dtype, args.post.branch.data,
                               token_offset(size, args.post.branch.stride, token) + e, count, call.vec_branch && inside,
                               y);
                h = mix<T, N>(n, [&](int i) { return shared.post[t][i]; }, all, y);
            } else {
                h = read<V>(in + j * args.in.stride[2], count, call.vec_in && inside);
            }
#pragma unroll
            for (int m = 0; m < kRows; ++m) {
                const A factor = shared.logits[t][m];
#pragma unroll
                for (int v = 0; v < V; ++v) sum[m][v] = fma(factor, widen(h.at[v]), sum[m][v]);
            }
        }
    }
    A* const to = static_cast<A*>(plan.weight_partials) +
                  static_cast<int64_t>(blockIdx.y) * num_coefficients * n * size.width + j * size.width + e;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
        Vector<A, V> local;
#pragma unroll
        for (int v = 0; v < V; ++v) local.at[v] = sum[m][v];
        if (row + m < num_coefficients) write(to + (row + m) * n * size.width, local, count, call.vec_weight && inside);
    }
}

template <class T, int N>
void launch_weight(const BackwardPlan& plan, void* stream) {
    constexpr int V = kWeightElements<T, N>;
    const HyperBackward& args = plan.args;
    const bool vectorized = args.size.width % V == 0;
    const WeightCall call{plan,
                          vectorized && aligned(args.in, sizeof(T), V),
                          vectorized && aligned(args.post.branch, element_size(args.size.branch_dtype), V),
                          vectorized,
                          ceil_div(args.size.width, kWeightThreads * V),
                          ceil_div(plan.num_coefficients, kRows)};
    launch("hyper_backward_weight", hyper_backward_weight_kernel<T, N>,
           {call.column_tiles * args.size.streams * call.row_tiles, kWeightThreads, stream,
            sizeof(WeightShared<Accumulator<T>, N>), plan.weight_runs},
           call);
}

}  // namespace

void backward_weight_of_all(const BackwardPlan& plan, void* stream) {
    dispatch_dtype(plan.args.size.dtype, [&](auto element) {
        using T = decltype(element);
        dispatch_streams(plan.args.size.streams, [&](auto n) { launch_weight<T, decltype(n)::value>(plan, stream); });
    });
}

}  // namespace xlayer::cuda::hyper
