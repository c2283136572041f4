// xlayer::ema_scan, depth_gru and depth_attention on CUDA. ema_scan is kernels alone. Of the others the products of
// matrices are torch's own, and follow its settings (tf32 where the user allowed it): those of all layers together
// where no state stands in the way, else layer by layer with a kernel between them.
#include <array>

#include "aggregate_arguments.h"

#ifdef XLAYER_HAS_CUDA_KERNELS

namespace xlayer {
namespace {

using torch::stable::select;
using torch::stable::transpose;
using torch::stable::view;

// out = a · b. With `out` given, autocast keeps its hands off: it would change the dtype of what a kernel reads.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
    using torch::stable::detail::from, torch::stable::detail::to;
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    call_torch("aten::mm", "out", stack.data(),
               "a product of states or taps and a weight, or of their gradients, failed in aten::mm (out of memory, or "
               "deterministic algorithms without CUBLAS_WORKSPACE_CONFIG=:4096:8)");
    to<Tensor>(stack[0]);  // the result's handle is ours to release
}

// torch::stable::narrow() takes no constant and no temporary.
Tensor part_of(Tensor tensor, int64_t dim, int64_t start, int64_t length) {
    return torch::stable::narrow(tensor, dim, start, length);
}

Tensor transposed(const Tensor& matrix) { return transpose(matrix, 0, 1); }

// The rows of layers [first, last) of a tensor [layers·tokens, …].
Tensor layers_of(const Tensor& rows, int64_t tokens, int64_t first, int64_t last) {
    return part_of(rows, 0, first * tokens, (last - first) * tokens);
}
Tensor layer_of(const Tensor& rows, int64_t tokens, int64_t layer) { return layers_of(rows, tokens, layer, layer + 1); }

// The state before `layer`; none before the first if it starts from zeros.
OptionalTensor state_before(const Tensor& states, const OptionalTensor& initial_state, int64_t layer) {
    if (layer == 0) return initial_state;
    return select(states, 0, layer - 1);
}
const void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// out = first + second + third, rows [tokens, width]; all but the first contiguous, all but the first optional.
void add(const Tensor& first, const OptionalTensor& second, const OptionalTensor& third, const Tensor& out,
         void* stream) {
    cuda::aggregate::add_rows({kernel_dtype(out, "out"), out.size(0), out.size(1), first.const_data_ptr(),
                               first.stride(0), data_of(second), data_of(third), out.mutable_data_ptr()},
                              stream);
}

// Σ_l grads_lᵀ · S_{l−1}, the gradient of a weight that states were multiplied with. grads: [layers·tokens, …].
void state_weight_gradient(const Tensor& grads, const Tensor& states, const OptionalTensor& initial_state,
                           const Tensor& out, void* stream) {
    const int64_t layers = states.size(0), tokens = states.size(1), width = states.size(2);
    const Tensor rows = view(states, {layers * tokens, width});
    if (layers > 1)
        multiply(transposed(layers_of(grads, tokens, 1, layers)), layers_of(rows, tokens, 0, layers - 1), out);
    if (!initial_state) {
        if (layers == 1) zero_all({out});
        return;
    }
    const Tensor part = layers > 1 ? allocate(out, {out.size(0), out.size(1)}, "part of a gradient") : out;
    multiply(transposed(layer_of(grads, tokens, 0)), *initial_state, part);
    if (layers > 1) add(part, out, std::nullopt, out, stream);
}

// --- ema_scan --------------------------------------------------------------------------------------------------------

Tensor ema_scan_cuda(const Tensor& x, const Tensor& gate_logits, const OptionalTensor& initial_state,
                     const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps, bool last_only) {
    const CudaScope scope(x);
    EmaArguments given(x, gate_logits, initial_state, norm_weight, norm_bias, eps, last_only);
    EmaScanForward args{};
    args.scan = given.args;
    Tensor states = given.new_states("states");
    args.states = states.mutable_data_ptr();
    if (states.numel() == 0) return states;
    scope.run(x, args, cuda::aggregate::ema_scan_forward_workspace, cuda::aggregate::ema_scan_forward);
    return states;
}

Five ema_scan_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& gate_logits,
                            const OptionalTensor& initial_state, const OptionalTensor& norm_weight,
                            const OptionalTensor& norm_bias, double eps, bool last_only) {
    const CudaScope scope(x);
    EmaArguments given(x, gate_logits, initial_state, norm_weight, norm_bias, eps, last_only);
    STD_TORCH_CHECK(given.args.layers <= cuda::aggregate::kEmaMaxLayers,
                    "the CUDA kernels of ema_scan's backward take at most ", cuda::aggregate::kEmaMaxLayers,
                    " layers, got ", given.args.layers);
    EmaScanBackward args{};
    args.scan = given.args;
    const Tensor grads = given.checked_grad(grad);
    args.grad = given.grad_rows(grads);
    Five out = given.new_grads();
    auto& [grad_x, grad_gates, grad_initial_state, grad_weight, grad_bias] = out;
    if (x.numel() == 0) {
        given.write_empty_grads(out, grads);
        return out;
    }
    args.grad_x = grad_x.mutable_data_ptr();
    args.grad_gate_logits = grad_gates.mutable_data_ptr();
    args.grad_initial_state = initial_state ? grad_initial_state.mutable_data_ptr() : nullptr;
    args.grad_norm_weight = norm_weight ? grad_weight.mutable_data_ptr() : nullptr;
    args.grad_norm_bias = norm_bias ? grad_bias.mutable_data_ptr() : nullptr;
    scope.run(x, args, cuda::aggregate::ema_scan_backward_workspace, cuda::aggregate::ema_scan_backward);
    return out;
}

// --- depth_gru -------------------------------------------------------------------------------------------------------

// Beside the outputs: W_h h of one layer, [N, 3d], and of all layers W_i x, [L, N, 3d], which lies where the gates will
// be if they are kept.
Two depth_gru_cuda(const Tensor& x, const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& bias_ih,
                   const Tensor& bias_hh, const OptionalTensor& initial_state, bool keep) {
    const CudaScope scope(x);
    GruArguments given(x, weight_ih, weight_hh, initial_state);
    const Tensor input_bias = given.checked_bias(bias_ih, "bias_ih"),
                 state_bias = given.checked_bias(bias_hh, "bias_hh");
    Two out = given.new_states(keep);
    auto& [states, gates] = out;
    if (states.numel() == 0) return out;
    const int64_t L = given.args.layers, N = given.args.tokens, d = given.args.width;

    const Tensor from_input =
        keep ? part_of(view(gates, {L * N, 4 * d}), 1, 0, 3 * d) : allocate(x, {L * N, 3 * d}, "W_i x");
    multiply(view(as_contiguous(given.x()), {L * N, given.args.input}), transposed(given.weight_ih()), from_input);
    const Tensor from_state = allocate(x, {N, 3 * d}, "W_h h");
    cuda::aggregate::GruStep step{};
    step.dtype = given.args.dtype, step.tokens = N, step.width = d;
    step.input_stride = from_input.stride(0);
    step.bias_ih = kernel_input(input_bias, "bias_ih"), step.bias_hh = kernel_input(state_bias, "bias_hh");
    for (int64_t layer = 0; layer < L; ++layer) {
        const OptionalTensor previous = state_before(states, given.initial_state(), layer);
        if (previous) multiply(*previous, transposed(given.weight_hh()), from_state);
        step.from_input = layer_of(from_input, N, layer).const_data_ptr();
        step.from_state = previous ? from_state.const_data_ptr() : nullptr;
        step.previous = data_of(previous);
        step.state = select(states, 0, layer).mutable_data_ptr();
        step.gates = keep ? select(gates, 0, layer).mutable_data_ptr() : nullptr;
        cuda::aggregate::gru_step(step, scope.stream());
    }
    return out;
}

// Beside the outputs: the gradients inside the gates, [L, N, 4, d] in the order n, r, z, m, so that what goes through
// W_i (n, r, z) and what goes through W_h (r, z, m) both are matrices; 2·[N, d]; and W_i in that order, [3d, i].
Six depth_gru_backward_cuda(const Tensor& grad, const Tensor& states_, const Tensor& gates_, const Tensor& x,
                            const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& initial_state) {
    const CudaScope scope(x);
    GruArguments given(x, weight_ih, weight_hh, initial_state);
    const Tensor grads = given.checked_grad(grad), states = given.checked_states(states_),
                 gates = given.checked_gates(gates_);
    Six out = given.new_grads();
    auto& [grad_x, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_initial_state] = out;
    if (states.numel() == 0) {
        zero_all({grad_x, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_initial_state});
        return out;
    }
    const int64_t L = given.args.layers, N = given.args.tokens, d = given.args.width, i = given.args.input;
    kernel_input(states, "states"), kernel_input(gates, "gates"), kernel_input(grads, "grad");

    const Tensor inside = allocate(x, {L * N, 4 * d}, "inside the gates");
    const Tensor direct = allocate(x, {N, d}, "direct"), product = allocate(x, {N, d}, "product");
    const Tensor through_state = part_of(inside, 1, d, 3 * d);
    cuda::aggregate::GruStepBackward step{};
    step.dtype = given.args.dtype, step.tokens = N, step.width = d;
    step.grad_stride = grads.stride(1);
    step.direct = direct.mutable_data_ptr();
    for (int64_t layer = L - 1; layer >= 0; --layer) {
        step.grad = select(grads, 0, layer).const_data_ptr();
        step.product = layer < L - 1 ? product.const_data_ptr() : nullptr;
        step.gates = select(gates, 0, layer).const_data_ptr();
        step.previous = data_of(state_before(states, given.initial_state(), layer));
        step.inside = layer_of(inside, N, layer).mutable_data_ptr();
        cuda::aggregate::gru_step_backward(step, scope.stream());
        if (layer > 0 || initial_state) multiply(layer_of(through_state, N, layer), given.weight_hh(), product);
    }
    if (initial_state) add(direct, product, std::nullopt, grad_initial_state, scope.stream());

    Tensor permuted_weight = allocate(x, {3 * d, i}, "W_i");
    Tensor of_n = part_of(permuted_weight, 0, 0, d), of_rest = part_of(permuted_weight, 0, d, 2 * d);
    torch::stable::copy_(of_n, part_of(given.weight_ih(), 0, 2 * d, d));
    torch::stable::copy_(of_rest, part_of(given.weight_ih(), 0, 0, 2 * d));
    const Tensor rows = view(as_contiguous(given.x()), {L * N, i});
    multiply(part_of(inside, 1, 0, 3 * d), permuted_weight, view(grad_x, {L * N, i}));
    multiply(transposed(part_of(inside, 1, 0, d)), rows, part_of(grad_ih, 0, 2 * d, d));
    multiply(transposed(part_of(inside, 1, d, 2 * d)), rows, part_of(grad_ih, 0, 0, 2 * d));
    state_weight_gradient(through_state, states, given.initial_state(), grad_hh, scope.stream());

    cuda::aggregate::SumColumns sums{given.args.dtype, inside.const_data_ptr(), L * N, 4 * d, {}, nullptr};
    sums.parts[0] = {d, 3 * d, grad_bias_hh.mutable_data_ptr()};
    sums.parts[1] = {d, 2 * d, grad_bias_ih.mutable_data_ptr()};
    sums.parts[2] = {0, d, part_of(grad_bias_ih, 0, 2 * d, d).mutable_data_ptr()};
    scope.run(x, sums, cuda::aggregate::sum_columns_workspace, cuda::aggregate::sum_columns);
    return out;
}

// --- depth_attention -------------------------------------------------------------------------------------------------

cuda::aggregate::AttentionStep attention_step_of(const DepthAttention& of) {
    const int64_t window = of.window < of.layers ? of.window : of.layers;
    STD_TORCH_CHECK(window <= cuda::aggregate::kDepthAttentionMaxWindow,
                    "the CUDA kernels of depth_attention attend to at most ", cuda::aggregate::kDepthAttentionMaxWindow,
                    " taps, got ", window);
    cuda::aggregate::AttentionStep step{};
    step.dtype = of.dtype, step.layers = of.layers, step.tokens = of.tokens;
    step.num_heads = of.num_heads, step.head_width = of.head_width;
    step.window = window, step.scale = of.scale;
    step.keys = of.keys, step.values = of.values;
    return step;
}

// Beside the outputs: the query of one layer, [N, e], and what it attended to, if that is not kept.
Two depth_attention_cuda(const Tensor& keys, const Tensor& values, const Tensor& weight_query, const Tensor& weight_out,
                         const OptionalTensor& initial_state, int64_t num_heads, int64_t window, double scale,
                         bool keep) {
    const CudaScope scope(keys);
    AttentionArguments given(keys, values, weight_query, weight_out, initial_state, num_heads, window, scale);
    Two out = given.new_states(keep);
    auto& [states, kept] = out;
    if (states.numel() == 0 && kept.numel() == 0) return out;
    const int64_t L = given.args.layers, N = given.args.tokens, e = given.inner();

    const Tensor query = allocate(keys, {N, e}, "query");
    const Tensor one = keep ? kept : allocate(keys, {N, e}, "attended");  // of a layer
    cuda::aggregate::AttentionStep step = attention_step_of(given.args);
    for (step.layer = 0; step.layer < L; ++step.layer) {
        const OptionalTensor previous = state_before(states, given.initial_state(), step.layer);
        const Tensor attended = keep ? select(kept, 0, step.layer) : one, state = select(states, 0, step.layer);
        if (previous) multiply(*previous, transposed(given.weight_query()), query);
        step.query = previous ? query.const_data_ptr() : nullptr;
        step.attended = attended.mutable_data_ptr();
        cuda::aggregate::attention_step(step, scope.stream());
        multiply(attended, transposed(given.weight_out()), state);
        if (previous) add(state, previous, std::nullopt, state, scope.stream());
    }
    return out;
}

// Beside the outputs: ∂L/∂S with all of its ways, [L, N, d]; queries, their gradients and those of what was attended
// to, 3·[L, N, e]; weights and their logits' gradients, 2·[L, N, num_heads, window] in float32; and [N, d].
Five depth_attention_backward_cuda(const Tensor& grad, const Tensor& states_, const Tensor& attended_,
                                   const Tensor& keys, const Tensor& values, const Tensor& weight_query,
                                   const Tensor& weight_out, const OptionalTensor& initial_state, int64_t num_heads,
                                   int64_t window, double scale) {
    const CudaScope scope(keys);
    AttentionArguments given(keys, values, weight_query, weight_out, initial_state, num_heads, window, scale);
    const Tensor grads = given.checked_grad(grad), states = given.checked_states(states_),
                 attended = given.checked_attended(attended_);
    Five out = given.new_grads();
    auto& [grad_keys, grad_values, grad_query_weight, grad_out_weight, grad_initial_state] = out;
    if (states.numel() == 0) {
        zero_all({grad_keys, grad_values, grad_query_weight, grad_out_weight, grad_initial_state});
        return out;
    }
    const int64_t L = given.args.layers, N = given.args.tokens, d = given.args.width, e = given.inner();
    kernel_input(states, "states"), kernel_input(grads, "grad");

    cuda::aggregate::AttentionStepBackward backward{};
    cuda::aggregate::AttentionStep& step = backward.step = attention_step_of(given.args);
    const auto wide = keys.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    Tensor query = allocate(keys, {L * N, e}, "queries");
    const Tensor grad_query = allocate(keys, {L * N, e}, "grad of queries");
    const Tensor grad_attended = allocate(keys, {L * N, e}, "grad of what was attended to");
    const Tensor grad_states = allocate(keys, {L * N, d}, "grad of states");
    const Tensor product = allocate(keys, {N, d}, "product");
    const Tensor weights = allocate(keys, {L, N, num_heads, step.window}, wide, "weights");
    const Tensor grad_logits = allocate(keys, {L, N, num_heads, step.window}, wide, "grad of logits");
    backward.weights = weights.mutable_data_ptr(), backward.grad_logits = grad_logits.mutable_data_ptr();

    const Tensor by_query = transposed(given.weight_query());
    if (L > 1) multiply(part_of(view(states, {L * N, d}), 0, 0, (L - 1) * N), by_query, layers_of(query, N, 1, L));
    if (initial_state) {
        multiply(*given.initial_state(), by_query, layer_of(query, N, 0));
    } else {
        zero_all({layer_of(query, N, 0)});
    }
    for (int64_t layer = step.layer = L - 1; layer >= 0; step.layer = --layer) {
        const Tensor own = layer_of(grad_states, N, layer);
        const bool above = layer < L - 1;
        add(select(grads, 0, layer), above ? OptionalTensor(layer_of(grad_states, N, layer + 1)) : std::nullopt,
            above ? OptionalTensor(product) : std::nullopt, own, scope.stream());
        multiply(own, given.weight_out(), layer_of(grad_attended, N, layer));
        step.query = layer_of(query, N, layer).const_data_ptr();
        backward.grad_attended = layer_of(grad_attended, N, layer).const_data_ptr();
        backward.grad_query = layer_of(grad_query, N, layer).mutable_data_ptr();
        cuda::aggregate::attention_step_backward(backward, scope.stream());
        if (layer > 0 || initial_state) multiply(layer_of(grad_query, N, layer), given.weight_query(), product);
    }
    if (initial_state) add(layer_of(grad_states, N, 0), product, std::nullopt, grad_initial_state, scope.stream());

    cuda::aggregate::attention_gradients(
        {step, query.const_data_ptr(), grad_attended.const_data_ptr(), weights.const_data_ptr(),
         grad_logits.const_data_ptr(), grad_keys.mutable_data_ptr(), grad_values.mutable_data_ptr()},
        scope.stream());
    state_weight_gradient(grad_query, states, given.initial_state(), grad_query_weight, scope.stream());
    multiply(transposed(grad_states), view(attended, {L * N, e}), grad_out_weight);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, XLAYER_CUDA_KEY, m) {
    m.impl("ema_scan", TORCH_BOX(&ema_scan_cuda));
    m.impl("ema_scan_backward", TORCH_BOX(&ema_scan_backward_cuda));
    m.impl("depth_gru", TORCH_BOX(&depth_gru_cuda));
    m.impl("depth_gru_backward", TORCH_BOX(&depth_gru_backward_cuda));
    m.impl("depth_attention", TORCH_BOX(&depth_attention_cuda));
    m.impl("depth_attention_backward", TORCH_BOX(&depth_attention_backward_cuda));
}

}  // namespace xlayer

#endif  // XLAYER_HAS_CUDA_KERNELS
