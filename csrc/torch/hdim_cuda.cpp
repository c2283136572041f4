// xlayer::hdim_attention and its backward on CUDA: the kernels score pairs, softmax them and take the scores'
// gradients; the three products of whole matrices are torch's own, and follow its settings (tf32 where the user allowed
// it).
#include <array>

#include "hdim_arguments.h"

#ifdef XLAYER_HAS_CUDA_KERNELS

namespace xlayer {
namespace {

using torch::stable::narrow;
using torch::stable::transpose;

// out = a · b, batched. With `out` given, autocast keeps its hands off: it would change the dtype of what a kernel
// reads.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
    using torch::stable::detail::from, torch::stable::detail::to;
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    call_torch("aten::bmm", "out", stack.data(),
               "the product of probabilities and values, or of their gradients, failed in aten::bmm (out of memory, or "
               "deterministic algorithms without CUBLAS_WORKSPACE_CONFIG=:4096:8)");
    to<Tensor>(stack[0]);  // the result's handle is ours to release
}

// The logits of all pairs, and the values that may meet them in a product.
struct Scores {
    Tensor logits, value;

    Scores(const HdimArguments& in, const Tensor& query, const Tensor& value_, void* workspace, void* stream)
        : logits(allocate(query, {in.args.batch, in.args.queries, cuda::hdim::logits_pitch(in.args.keys)},
                          in.accumulation(), "logits")),
          value(value_) {
        const HdimInputs& a = in.args;
        STD_TORCH_CHECK(a.proj_dim <= cuda::hdim::kHdimMaxProjDim, "the CUDA kernels of hdim take at most ",
                        cuda::hdim::kHdimMaxProjDim, " columns of query and key, got ", a.proj_dim);
        cuda::hdim::HdimScore args{a, nullptr, logits.mutable_data_ptr(), workspace};
        if (a.key_mask != nullptr || a.attn_mask != nullptr) {
            value = allocate(query, {a.batch, a.keys, a.value_dim}, "clean value");
            args.value = value.mutable_data_ptr();
        }
        cuda::hdim::score(args, stream);
    }
};

HdimOutputs hdim_attention_cuda(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weight1,
                                const Tensor& bias1, const Tensor& weight2, const OptionalTensor& key_mask,
                                const OptionalTensor& attn_mask, double temperature, bool gelu, bool tf32) {
    const CudaScope scope(query);
    const HdimArguments in(query, key, value, weight1, bias1, weight2, key_mask, attn_mask, temperature, gelu, tf32);
    const int64_t B = in.args.batch, Sq = in.args.queries;
    void* aligned = nullptr;
    const Tensor workspace = new_workspace(query, cuda::hdim::score_workspace(in.args), &aligned);
    Scores scores(in, query, value, aligned, scope.stream());

    const bool in_place = in.accumulation() == query.scalar_type();
    Tensor probability = in_place ? scores.logits : allocate(query, {B, Sq, scores.logits.size(2)}, "probability");
    Tensor statistics = allocate(query, {B, Sq, kHdimStatistics}, in.accumulation(), "statistics");
    Tensor row_entropy = allocate(query, {B, Sq}, in.accumulation(), "row_entropy");
    cuda::hdim::softmax({in.args, scores.logits.const_data_ptr(), probability.mutable_data_ptr(),
                         statistics.mutable_data_ptr(), row_entropy.mutable_data_ptr()},
                        scope.stream());
    const Tensor context = allocate(query, {B, Sq, in.args.value_dim}, "context");
    multiply(narrow(probability, 2, 0, in.args.keys), scores.value, context);
    return {context, statistics, row_entropy};
}

HdimGradients hdim_attention_backward_cuda(const Tensor& grad_context, const OptionalTensor& grad_row_entropy,
                                           const Tensor& query, const Tensor& key, const Tensor& value,
                                           const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                                           const OptionalTensor& key_mask, const OptionalTensor& attn_mask,
                                           const Tensor& context, const Tensor& statistics, double temperature,
                                           bool gelu, bool tf32) {
    const CudaScope scope(query);
    const HdimArguments in(query, key, value, weight1, bias1, weight2, key_mask, attn_mask, temperature, gelu, tf32);
    const HdimBackwardArguments saved(in, query, grad_context, grad_row_entropy, context, statistics);
    HdimGradTensors out(in, query);
    cuda::hdim::HdimGradPairs args{};
    args.in = in.args;
    const Tensor workspace = new_workspace(query, cuda::hdim::grad_pairs_workspace(in.args), &args.workspace);
    Scores scores(in, query, value, args.workspace, scope.stream());

    // ∂L/∂P, overwritten with P.
    Tensor probability = allocate(query, {in.args.batch, in.args.queries, in.args.keys}, "probability");
    multiply(saved.grad_context, transpose(scores.value, 1, 2), probability);
    args.logits = scores.logits.mutable_data_ptr();
    args.probability = probability.mutable_data_ptr();
    args.grad_row_entropy = saved.grad_entropy_data();
    args.grad_query = out.query.mutable_data_ptr();
    args.grad_key = out.key.mutable_data_ptr();
    args.grad_weight1 = out.weight1.mutable_data_ptr();
    args.grad_bias1 = out.bias1.mutable_data_ptr();
    args.grad_weight2 = out.weight2.mutable_data_ptr();
    cuda::hdim::grad_pairs(args, scope.stream());
    const Tensor grad_value = allocate(query, {in.args.batch, in.args.keys, in.args.value_dim}, "grad_value");
    multiply(transpose(probability, 1, 2), saved.grad_context, grad_value);
    return {out.query, out.key, grad_value, out.weight1, out.bias1, out.weight2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, XLAYER_CUDA_KEY, m) {
    m.impl("hdim_attention", TORCH_BOX(&hdim_attention_cuda));
    m.impl("hdim_attention_backward", TORCH_BOX(&hdim_attention_backward_cuda));
}

}  // namespace xlayer

#endif  // XLAYER_HAS_CUDA_KERNELS
