// xlayer::ema_scan, depth_gru and depth_attention: schemas, and the CPU's checks and allocation. Shapes and formulas:
// xlayer/aggregate.h.
#include "xlayer/aggregate.h"

#include "aggregate_arguments.h"

namespace xlayer {
namespace {

#ifndef XLAYER_EMULATED
Tensor ema_scan(const Tensor& x, const Tensor& gate_logits, const OptionalTensor& initial_state,
                const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps, bool last_only) {
    EmaArguments given(x, gate_logits, initial_state, norm_weight, norm_bias, eps, last_only);
    EmaScanForward args{};
    args.scan = given.args;
    Tensor states = given.new_states("states");
    args.states = states.mutable_data_ptr();
    if (states.numel() > 0)
        CpuScope(x).run(x, args, cpu::aggregate::ema_scan_forward_workspace, cpu::aggregate::ema_scan_forward);
    return states;
}

Five ema_scan_backward(const Tensor& grad, const Tensor& x, const Tensor& gate_logits,
                       const OptionalTensor& initial_state, const OptionalTensor& norm_weight,
                       const OptionalTensor& norm_bias, double eps, bool last_only) {
    EmaArguments given(x, gate_logits, initial_state, norm_weight, norm_bias, eps, last_only);
    EmaScanBackward args{};
    args.scan = given.args;
    const Tensor grads = given.checked_grad(grad);
    args.grad = given.grad_rows(grads);
    Five out = given.new_grads();
    if (x.numel() == 0) {
        given.write_empty_grads(out, grads);
        return out;
    }
    args.grad_x = std::get<0>(out).mutable_data_ptr();
    args.grad_gate_logits = std::get<1>(out).mutable_data_ptr();
    args.grad_initial_state = initial_state ? std::get<2>(out).mutable_data_ptr() : nullptr;
    args.grad_norm_weight = norm_weight ? std::get<3>(out).mutable_data_ptr() : nullptr;
    args.grad_norm_bias = norm_bias ? std::get<4>(out).mutable_data_ptr() : nullptr;
    CpuScope(x).run(x, args, cpu::aggregate::ema_scan_backward_workspace, cpu::aggregate::ema_scan_backward);
    return out;
}

Two depth_gru(const Tensor& x, const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& bias_ih,
              const Tensor& bias_hh, const OptionalTensor& initial_state, bool keep) {
    GruArguments given(x, weight_ih, weight_hh, initial_state);
    DepthGruForward args{};
    args.gru = given.args;
    const Tensor input_bias = given.checked_bias(bias_ih, "bias_ih"),
                 state_bias = given.checked_bias(bias_hh, "bias_hh");
    args.bias_ih = kernel_input(input_bias, "bias_ih"), args.bias_hh = kernel_input(state_bias, "bias_hh");
    Two out = given.new_states(keep);
    args.states = std::get<0>(out).mutable_data_ptr();
    args.gates = keep ? std::get<1>(out).mutable_data_ptr() : nullptr;
    if (std::get<0>(out).numel() > 0)
        CpuScope(x).run(x, args, cpu::aggregate::depth_gru_forward_workspace, cpu::aggregate::depth_gru_forward);
    return out;
}

Six depth_gru_backward(const Tensor& grad, const Tensor& states, const Tensor& gates, const Tensor& x,
                       const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& initial_state) {
    GruArguments given(x, weight_ih, weight_hh, initial_state);
    DepthGruBackward args{};
    args.gru = given.args;
    const Tensor grads = given.checked_grad(grad);
    args.grad = layer_rows(grads, "grad");
    const Tensor saved_states = given.checked_states(states), saved_gates = given.checked_gates(gates);
    args.states = kernel_input(saved_states, "states"), args.gates = kernel_input(saved_gates, "gates");
    Six out = given.new_grads();
    if (states.numel() == 0) {
        auto& [grad_x, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_initial_state] = out;
        zero_all({grad_x, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_initial_state});
        return out;
    }
    args.grad_x = std::get<0>(out).mutable_data_ptr();
    args.grad_weight_ih = std::get<1>(out).mutable_data_ptr();
    args.grad_weight_hh = std::get<2>(out).mutable_data_ptr();
    args.grad_bias_ih = std::get<3>(out).mutable_data_ptr();
    args.grad_bias_hh = std::get<4>(out).mutable_data_ptr();
    args.grad_initial_state = initial_state ? std::get<5>(out).mutable_data_ptr() : nullptr;
    CpuScope(x).run(x, args, cpu::aggregate::depth_gru_backward_workspace, cpu::aggregate::depth_gru_backward);
    return out;
}

Two depth_attention(const Tensor& keys, const Tensor& values, const Tensor& weight_query, const Tensor& weight_out,
                    const OptionalTensor& initial_state, int64_t num_heads, int64_t window, double scale, bool keep) {
    AttentionArguments given(keys, values, weight_query, weight_out, initial_state, num_heads, window, scale);
    DepthAttentionForward args{};
    args.attention = given.args;
    Two out = given.new_states(keep);
    args.states = std::get<0>(out).mutable_data_ptr();
    args.attended = keep ? std::get<1>(out).mutable_data_ptr() : nullptr;
    // States without a width attend too: to all taps alike.
    if (std::get<0>(out).numel() > 0 || std::get<1>(out).numel() > 0) {
        CpuScope(keys).run(keys, args, cpu::aggregate::depth_attention_forward_workspace,
                           cpu::aggregate::depth_attention_forward);
    }
    return out;
}

Five depth_attention_backward(const Tensor& grad, const Tensor& states, const Tensor& attended, const Tensor& keys,
                              const Tensor& values, const Tensor& weight_query, const Tensor& weight_out,
                              const OptionalTensor& initial_state, int64_t num_heads, int64_t window, double scale) {
    AttentionArguments given(keys, values, weight_query, weight_out, initial_state, num_heads, window, scale);
    DepthAttentionBackward args{};
    args.attention = given.args;
    const Tensor grads = given.checked_grad(grad);
    args.grad = layer_rows(grads, "grad");
    const Tensor saved_states = given.checked_states(states), saved_attended = given.checked_attended(attended);
    args.states = kernel_input(saved_states, "states"), args.attended = kernel_input(saved_attended, "attended");
    Five out = given.new_grads();
    if (states.numel() == 0) {
        auto& [grad_keys, grad_values, grad_weight_query, grad_weight_out, grad_initial_state] = out;
        zero_all({grad_keys, grad_values, grad_weight_query, grad_weight_out, grad_initial_state});
        return out;
    }
    args.grad_keys = std::get<0>(out).mutable_data_ptr();
    args.grad_values = std::get<1>(out).mutable_data_ptr();
    args.grad_weight_query = std::get<2>(out).mutable_data_ptr();
    args.grad_weight_out = std::get<3>(out).mutable_data_ptr();
    args.grad_initial_state = initial_state ? std::get<4>(out).mutable_data_ptr() : nullptr;
    CpuScope(keys).run(keys, args, cpu::aggregate::depth_attention_backward_workspace,
                       cpu::aggregate::depth_attention_backward);
    return out;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(XLAYER_OPS, m) {
    m.def(
        "ema_scan(Tensor x, Tensor gate_logits, Tensor? initial_state, Tensor? norm_weight, Tensor? norm_bias, "
        "float eps, bool last_only) -> Tensor");
    m.def(
        "ema_scan_backward(Tensor grad, Tensor x, Tensor gate_logits, Tensor? initial_state, Tensor? norm_weight, "
        "Tensor? norm_bias, float eps, bool last_only) -> (Tensor x, Tensor gate_logits, Tensor initial_state, "
        "Tensor norm_weight, Tensor norm_bias)");
    m.def(
        "depth_gru(Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh, "
        "Tensor? initial_state, bool keep) -> (Tensor states, Tensor gates)");
    m.def(
        "depth_gru_backward(Tensor grad, Tensor states, Tensor gates, Tensor x, Tensor weight_ih, Tensor weight_hh, "
        "Tensor? initial_state) -> (Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh, "
        "Tensor initial_state)");
    m.def(
        "depth_attention(Tensor keys, Tensor values, Tensor weight_query, Tensor weight_out, Tensor? initial_state, "
        "SymInt num_heads, SymInt window, float scale, bool keep) -> (Tensor states, Tensor attended)");
    m.def(
        "depth_attention_backward(Tensor grad, Tensor states, Tensor attended, Tensor keys, Tensor values, "
        "Tensor weight_query, Tensor weight_out, Tensor? initial_state, SymInt num_heads, SymInt window, float scale) "
        "-> (Tensor keys, Tensor values, Tensor weight_query, Tensor weight_out, Tensor initial_state)");
}

#ifndef XLAYER_EMULATED
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, CPU, m) {
    m.impl("ema_scan", TORCH_BOX(&ema_scan));
    m.impl("ema_scan_backward", TORCH_BOX(&ema_scan_backward));
    m.impl("depth_gru", TORCH_BOX(&depth_gru));
    m.impl("depth_gru_backward", TORCH_BOX(&depth_gru_backward));
    m.impl("depth_attention", TORCH_BOX(&depth_attention));
    m.impl("depth_attention_backward", TORCH_BOX(&depth_attention_backward));
}
#endif

}  // namespace xlayer
