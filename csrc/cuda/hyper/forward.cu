// hyper forward (xlayer/hyper.h): post, pre or both, one block per token.
//
// A thread keeps to its own elements of d in every step, so that rows go through shared memory without a barrier, and
// rows that are too long for it through global memory by the same code. rms_all, whose weight is n² as large, computes
// z in a kernel of its own (logits.cu) between post and pre.
#include "cuda/hyper/forward.cuh"
#include "cuda/hyper/logits.cuh"

namespace xlayer::cuda::hyper {
namespace {

// resources: hyper_forward_kernel<double, *> threads 256, registers 255, shared 81920, occupancy 0.125
// resources: hyper_forward_kernel<*, 8> threads 256, registers 255, shared 81920, occupancy 0.125
// resources: hyper_forward_kernel threads 256, registers 128, shared 81920, occupancy 0.25
// sass: hyper_forward_kernel<*, [24]> LDGSTS.128, STG.128
// sass: hyper_forward_kernel<*, [08]> LDG, STG
template <class T, int N>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<T, N>) hyper_forward_kernel(ForwardPlan plan) {
    if (plan.prefetch_offset > 0) ForwardToken<T, N>(plan, blockIdx.x).prefetch();
    for (int64_t token = blockIdx.x; token < tokens_of(plan.args.size); token += gridDim.x)
        ForwardToken<T, N>(plan, token).run();
}

// Plans which rows are staged in shared memory and prefetched into it, as far as they fit.
template <class T, int N>
void plan_shared(ForwardPlan& plan) {
    constexpr int V = kForwardElements<T, N>;
    const HyperForward& args = plan.args;
    plan.pitch = round_up(args.size.width, V);
    plan.shared_bytes = kForwardShared<Accumulator<T>, N>;
    const int64_t row = plan.pitch * static_cast<int64_t>(sizeof(T));
    const auto take = [&](bool wanted, int64_t rows) {
        const bool taken = wanted && plan.shared_bytes + rows * row <= kSharedBytes;
        if (taken) plan.shared_bytes += rows * row;
        return taken;
    };
    // Rows are read once more for x, and before that for z: worth a place on the chip, but not for a last time alone.
    const bool layer = plan.dynamic && args.connection.norm == HyperNorm::layer;
    plan.staged = take(args.pre && (plan.post || (plan.dynamic && !plan.has_logits)), args.size.streams);
    const bool aligned_rows =
        plan.vec_in && (!plan.post || (plan.vec_branch && args.size.branch_dtype == args.size.dtype));
    const int64_t prefetch_offset = plan.shared_bytes;
    if (take(ForwardToken<T, N>::kCopies && aligned_rows && (plan.post || layer || plan.staged), args.size.streams + 1))
        plan.prefetch_offset = prefetch_offset;
}

template <class T, int N>
void launch_forward(const HyperForward& args, bool has_logits, void* stream) {
    using A = Accumulator<T>;
    constexpr int V = kForwardElements<T, N>;
    ForwardPlan plan{};
    plan.args = args;
    plan.post = args.post.branch.data != nullptr;
    plan.dynamic = args.pre && args.connection.norm != HyperNorm::none;
    plan.has_logits = has_logits;
    const bool vectorized = args.size.width % V == 0;
    plan.vec_in = vectorized && aligned(args.in, sizeof(T), V);
    plan.vec_out = vectorized && aligned(args.out, sizeof(T), V);
    plan.vec_branch = vectorized && aligned(args.post.branch, element_size(args.size.branch_dtype), V);
    plan.vec_rest =
        vectorized && aligned(args.branch_input, sizeof(T), V, {}) && aligned(args.connection.weight, sizeof(A), V, {});
    plan_shared<T, N>(plan);
    const int64_t blocks =
        plan.prefetch_offset > 0 && kForwardGrid < args.size.tokens() ? kForwardGrid : args.size.tokens();
    launch("hyper_forward", hyper_forward_kernel<T, N>,
           {blocks, kForwardThreads, stream, static_cast<size_t>(plan.shared_bytes)}, plan);
}

void launch_forward(const HyperForward& args, bool has_logits, void* stream) {
    dispatch_dtype(args.size.dtype, [&](auto element) {
        using T = decltype(element);
        dispatch_streams(args.size.streams,
                         [&](auto n) { launch_forward<T, decltype(n)::value>(args, has_logits, stream); });
    });
}

}  // namespace

int64_t forward_workspace(const HyperForward& args) {
    const bool layer = args.pre && args.connection.norm == HyperNorm::layer;
    return layer ? args.size.columns() * (args.size.dtype == DType::float64 ? 8 : 4) : 0;
}

void forward(const HyperForward& args, void* stream) {
    if (args.pre && args.connection.norm == HyperNorm::layer)
        sum_weights(args.size, args.connection.weight, args.workspace, stream);
    if (!args.pre || args.connection.norm != HyperNorm::rms_all) return launch_forward(args, false, stream);
    HyperForward rest = args;
    if (args.post.branch.data != nullptr) {
        HyperForward post = args;
        post.pre = false;
        launch_forward(post, false, stream);
        rest.post = {};
        const HyperStreams<void*>& out = args.out;
        rest.in = {out.data, {out.stride[0], out.stride[1], out.stride[2]}};
    }
    logits_of_all({args.size, rest.in, args.connection.weight, args.connection.eps, args.logits, args.statistics},
                  stream);
    launch_forward(rest, true, stream);
}

}  // namespace xlayer::cuda::hyper
