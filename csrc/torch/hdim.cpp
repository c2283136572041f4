// xlayer::hdim_attention and its backward: schemas, and the operators on the CPU. Shapes and formulas: xlayer/hdim.h.
#include "hdim_arguments.h"

namespace xlayer {

#ifndef XLAYER_EMULATED
namespace {

HdimOutputs hdim_attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weight1,
                               const Tensor& bias1, const Tensor& weight2, const OptionalTensor& key_mask,
                               const OptionalTensor& attn_mask, double temperature, bool gelu, bool tf32) {
    const HdimArguments in(query, key, value, weight1, bias1, weight2, key_mask, attn_mask, temperature, gelu, tf32);
    const int64_t B = in.args.batch, Sq = in.args.queries;
    Tensor context = allocate(query, {B, Sq, in.args.value_dim}, "context");
    Tensor statistics = allocate(query, {B, Sq, kHdimStatistics}, in.accumulation(), "statistics");
    Tensor row_entropy = allocate(query, {B, Sq}, in.accumulation(), "row_entropy");
    HdimForward args{
        in.args,     context.mutable_data_ptr(), statistics.mutable_data_ptr(), row_entropy.mutable_data_ptr(), nullptr,
        torch_pool()};
    CpuScope(query).run(query, args, cpu::hdim::forward_workspace, cpu::hdim::forward);
    return {context, statistics, row_entropy};
}

HdimGradients hdim_attention_backward_cpu(const Tensor& grad_context, const OptionalTensor& grad_row_entropy,
                                          const Tensor& query, const Tensor& key, const Tensor& value,
                                          const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                                          const OptionalTensor& key_mask, const OptionalTensor& attn_mask,
                                          const Tensor& context, const Tensor& statistics, double temperature,
                                          bool gelu, bool tf32) {
    const HdimArguments in(query, key, value, weight1, bias1, weight2, key_mask, attn_mask, temperature, gelu, tf32);
    const HdimBackwardArguments saved(in, query, grad_context, grad_row_entropy, context, statistics);
    HdimGradTensors out(in, query);
    Tensor grad_value = allocate(query, {in.args.batch, in.args.keys, in.args.value_dim}, "grad_value");
    HdimBackward args{};
    args.in = in.args;
    args.grad_context = saved.grad_context.const_data_ptr();
    args.grad_row_entropy = saved.grad_entropy_data();
    args.context = saved.context.const_data_ptr();
    args.statistics = saved.statistics.const_data_ptr();
    args.grad_query = out.query.mutable_data_ptr();
    args.grad_key = out.key.mutable_data_ptr();
    args.grad_value = grad_value.mutable_data_ptr();
    args.grad_weight1 = out.weight1.mutable_data_ptr();
    args.grad_bias1 = out.bias1.mutable_data_ptr();
    args.grad_weight2 = out.weight2.mutable_data_ptr();
    args.pool = torch_pool();
    CpuScope(query).run(query, args, cpu::hdim::backward_workspace, cpu::hdim::backward);
    return {out.query, out.key, grad_value, out.weight1, out.bias1, out.weight2};
}

}  // namespace
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(XLAYER_OPS, m) {
    m.def(
        "hdim_attention(Tensor query, Tensor key, Tensor value, Tensor weight1, Tensor bias1, Tensor weight2, "
        "Tensor? key_mask, Tensor? attn_mask, float temperature, bool gelu, bool tf32) "
        "-> (Tensor context, Tensor statistics, Tensor row_entropy)");
    m.def(
        "hdim_attention_backward(Tensor grad_context, Tensor? grad_row_entropy, Tensor query, Tensor key, "
        "Tensor value, Tensor weight1, Tensor bias1, Tensor weight2, Tensor? key_mask, Tensor? attn_mask, "
        "Tensor context, Tensor statistics, float temperature, bool gelu, bool tf32) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight1, Tensor grad_bias1, "
        "Tensor grad_weight2)");
}

#ifndef XLAYER_EMULATED
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, CPU, m) {
    m.impl("hdim_attention", TORCH_BOX(&hdim_attention_cpu));
    m.impl("hdim_attention_backward", TORCH_BOX(&hdim_attention_backward_cpu));
}
#endif

}  // namespace xlayer
