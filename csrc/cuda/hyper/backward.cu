// Hyper's backward: what its steps (backward.cuh) are given, and where they put it.
#include "cuda/hyper/backward.cuh"

namespace xlayer::cuda::hyper {
namespace {

constexpr int64_t kMostRuns = 256;
constexpr int64_t kFewestRunTokens = 16;
constexpr int64_t kEnoughBlocks = 1024;  // of the streams' kernel: several for every place on an H200
constexpr int64_t kMostRunsOfAll = 32;   // of rms_all's weight, which is large

int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T, int N>
void plan_runs(Backward& with) {
    using A = Accumulator<T>;
    const HyperBackward& args = with.args;
    const int64_t tokens = args.size.tokens(), n = args.size.streams;
    with.tiles = ceil_div(args.size.width, kStreamTile<T, N>);
    // Long enough that a run's partial sums are few beside what its tokens move, short enough for many blocks.
    with.run_tokens =
        greater(greater(kFewestRunTokens, ceil_div(tokens, kMostRuns)), ceil_div(tokens * with.tiles, kEnoughBlocks));
    with.runs = ceil_div(tokens, with.run_tokens);
    with.weight_run_tokens = with.all ? greater(kFewestRunTokens, ceil_div(tokens, kMostRunsOfAll)) : with.run_tokens;
    with.weight_runs = ceil_div(tokens, with.weight_run_tokens);
    with.number_run_tokens = round_up(greater(1, ceil_div(tokens, kMostRuns)), kNumberTokens<N>);
    with.number_runs = ceil_div(tokens, with.number_run_tokens);
    with.history = with.dynamic && is_constrained(args.connection) ? (2 * args.connection.iterations + 1) * n * n : 0;
    const int64_t history_bytes = kNumberTokens<N> * with.history * static_cast<int64_t>(sizeof(A));
    with.history_shared = static_cast<int64_t>(sizeof(NumberShared<A, N>)) + history_bytes <= kNumberBytes;
    if (!with.history_shared) with.histories_bytes = with.number_runs * history_bytes;
}

// The bytes of the workspace, whose pieces `with` is given.
int64_t plan(const HyperBackward& args, Backward& with) {
    const HyperSizes& size = args.size;
    const int64_t n = size.streams, tokens = size.tokens();
    with.args = args;
    with.post = args.post.branch.data != nullptr;
    with.dynamic = args.pre && args.connection.norm != HyperNorm::none;
    with.all = with.dynamic && args.connection.norm == HyperNorm::rms_all;
    with.numbers = size.coefficients();
    with_element(size.dtype, [&](auto element) {
        using T = decltype(element);
        with_streams(n, [&](auto streams) { plan_runs<T, decltype(streams)::value>(with); });
    });
    Arena arena(args.workspace);
    const int64_t element = size.dtype == DType::float64 ? 8 : 4;
    if (args.pre) {
        with.dots = arena.take<char>(element, tokens, n);
        with.records = arena.take<char>(element, tokens, record_size(n));
        with.weight_sum = arena.take<char>(element, size.columns());
        with.number_partials = arena.take<char>(8, with.number_runs, 3, with.numbers);
        with.histories = arena.take<char>(with.histories_bytes);
    }
    if (with.post) {
        const int64_t places = args.post.shared ? with.runs : tokens;
        with.post_partials = arena.take<char>(element, places, with.tiles, n, n + 1);
    }
    if (with.dynamic) with.weight_partials = arena.take<char>(element, with.weight_runs, args.connection.weights(size));
    return arena.used;
}

}  // namespace

int64_t backward_workspace(const HyperBackward& args) {
    Backward with{};
    return plan(args, with);
}

void backward(const HyperBackward& args, void* stream) {
    Backward with{};
    plan(args, with);
    if (args.pre) backward_numbers(with, stream);
    backward_streams(with, stream);
    if (with.all) backward_weight_of_all(with, stream);
    backward_finish(with, stream);
}

}  // namespace xlayer::cuda::hyper
