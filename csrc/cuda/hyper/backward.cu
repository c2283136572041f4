// hyper backward: plans the workspace and launches the steps of backward.cuh.
#include "cuda/hyper/backward.cuh"

namespace xlayer::cuda::hyper {
namespace {

constexpr int64_t kMaxRuns = 256;
constexpr int64_t kMinRunTokens = 16;
constexpr int64_t kTargetBlocks = 1024;  // of the streams' kernel
constexpr int64_t kMaxWeightRuns = 32;   // of rms_all's weight, which is large

int64_t max_size(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T, int N>
void plan_runs(BackwardPlan& plan) {
    using A = Accumulator<T>;
    const HyperBackward& args = plan.args;
    const int64_t tokens = args.size.tokens(), n = args.size.streams;
    plan.tiles = ceil_div(args.size.width, kStreamTile<T, N>);
    // Long enough that a run's partial sums are few beside what its tokens move, short enough for many blocks.
    plan.run_tokens =
        max_size(max_size(kMinRunTokens, ceil_div(tokens, kMaxRuns)), ceil_div(tokens * plan.tiles, kTargetBlocks));
    plan.runs = ceil_div(tokens, plan.run_tokens);
    plan.weight_run_tokens = plan.all ? max_size(kMinRunTokens, ceil_div(tokens, kMaxWeightRuns)) : plan.run_tokens;
    plan.weight_runs = ceil_div(tokens, plan.weight_run_tokens);
    plan.coefficient_run_tokens = round_up(max_size(1, ceil_div(tokens, kMaxRuns)), kCoefficientTokens<N>);
    plan.coefficient_runs = ceil_div(tokens, plan.coefficient_run_tokens);
    plan.history = plan.dynamic && is_constrained(args.connection) ? (2 * args.connection.iterations + 1) * n * n : 0;
    const int64_t history_bytes = kCoefficientTokens<N> * plan.history * static_cast<int64_t>(sizeof(A));
    plan.history_shared = static_cast<int64_t>(sizeof(CoefficientShared<A, N>)) + history_bytes <= kCoefficientBytes;
    if (!plan.history_shared) plan.histories_bytes = plan.coefficient_runs * history_bytes;
}

// Fills in `plan`, whose arrays point into the workspace, and returns the workspace's bytes.
int64_t make_plan(const HyperBackward& args, BackwardPlan& plan) {
    const HyperSizes& size = args.size;
    const int64_t n = size.streams, tokens = size.tokens();
    plan.args = args;
    plan.post = args.post.branch.data != nullptr;
    plan.dynamic = args.pre && args.connection.norm != HyperNorm::none;
    plan.all = plan.dynamic && args.connection.norm == HyperNorm::rms_all;
    plan.num_coefficients = size.coefficients();
    dispatch_dtype(size.dtype, [&](auto element) {
        using T = decltype(element);
        dispatch_streams(n, [&](auto streams) { plan_runs<T, decltype(streams)::value>(plan); });
    });
    Workspace space(args.workspace);
    const int64_t element = size.dtype == DType::float64 ? 8 : 4;
    if (args.pre) {
        plan.dots = space.take<char>(element, tokens, n);
        plan.records = space.take<char>(element, tokens, record_size(n));
        plan.weight_sum = space.take<char>(element, size.columns());
        plan.coefficient_partials = space.take<char>(8, plan.coefficient_runs, 3, plan.num_coefficients);
        plan.histories = space.take<char>(plan.histories_bytes);
    }
    if (plan.post) {
        const int64_t places = args.post.shared ? plan.runs : tokens;
        plan.post_partials = space.take<char>(element, places, plan.tiles, n, n + 1);
    }
    if (plan.dynamic) plan.weight_partials = space.take<char>(element, plan.weight_runs, args.connection.weights(size));
    return space.bytes;
}

}  // namespace

int64_t backward_workspace(const HyperBackward& args) {
    BackwardPlan plan{};
    return make_plan(args, plan);
}

void backward(const HyperBackward& args, void* stream) {
    BackwardPlan plan{};
    make_plan(args, plan);
    if (args.pre) backward_coefficients(plan, stream);
    backward_streams(plan, stream);
    if (plan.all) backward_weight_of_all(plan, stream);
    backward_finish(plan, stream);
}

}  // namespace xlayer::cuda::hyper
