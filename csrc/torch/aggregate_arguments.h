// Arguments of the aggregation operators, shared by the CPU's and the GPU's: checked, in the form of the contract, with
// their outputs allocated.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "xlayer/aggregate.h"

namespace xlayer {

using Two = std::tuple<Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline LayerRows layer_rows(const Tensor& tensor, const char* name) {
    return {kernel_input(tensor, name), tensor.stride(0), tensor.stride(1)};
}

// A gradient with the shape of what was given; empty where nothing was.
inline Tensor new_grad(const Tensor& like, const OptionalTensor& given, const char* name) {
    if (!given) return allocate(like, {0}, like.scalar_type(), name);
    std::vector<int64_t> shape(given->dim());
    for (int64_t d = 0; d < given->dim(); ++d) shape[d] = given->size(d);
    return allocate(like, shape, given->scalar_type(), name);
}

inline void zero_all(std::initializer_list<Tensor> tensors) {
    for (Tensor tensor : tensors) torch::stable::zero_(tensor);
}

inline Tensor checked_like(const Tensor& tensor, const char* name, const Tensor& first, const char* first_name,
                           std::initializer_list<int64_t> shape) {
    check_shape(tensor, name, shape);
    check_dtype(tensor, name, first.scalar_type());
    check_same_device(tensor, name, first, first_name);
    return tensor;
}

// The arguments of ema_scan and of its backward. Holds the copies that `scan` points into.
class EmaArguments {
  public:
    EmaScan args{};

    EmaArguments(const Tensor& x, const Tensor& gate_logits, const OptionalTensor& initial_state,
                 const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps, bool last_only)
        : original_x_(x),
          original_gates_(gate_logits),
          original_initial_(initial_state),
          original_weight_(norm_weight),
          original_bias_(norm_bias) {
        check_shape(x, "x", {-1, -1, -1});
        args.dtype = kernel_dtype(x, "x");
        args.pool = torch_pool();
        args.layers = x.size(0), args.tokens = x.size(1), args.width = x.size(2);
        args.normalize = norm_weight.has_value();
        args.eps = eps, args.last_only = last_only;
        STD_TORCH_CHECK(args.normalize || !norm_bias, "norm_bias needs norm_weight");
        x_ = unit_stride_last(x);
        args.x = layer_rows(x_, "x");
        args.gate_logits = wide_vector(gate_logits, "gate_logits", args.layers, &gates_);
        if (initial_state) {
            initial_state_ =
                as_contiguous(checked_like(*initial_state, "initial_state", x, "x", {args.tokens, args.width}));
            args.initial_state = kernel_input(*initial_state_, "initial_state");
        }
        if (norm_weight) args.norm_weight = wide_vector(*norm_weight, "norm_weight", args.width, &weight_);
        if (norm_bias) args.norm_bias = wide_vector(*norm_bias, "norm_bias", args.width, &bias_);
    }

    Tensor new_states(const char* name) const {
        if (args.last_only) return allocate(original_x_, {args.tokens, args.width}, name);
        return allocate(original_x_, {args.layers, args.tokens, args.width}, name);
    }

    Tensor checked_grad(const Tensor& grad) const {
        if (args.last_only) {
            checked_like(grad, "grad", original_x_, "x", {args.tokens, args.width});
        } else {
            checked_like(grad, "grad", original_x_, "x", {args.layers, args.tokens, args.width});
        }
        return unit_stride_last(grad);
    }
    LayerRows grad_rows(const Tensor& grad) const {
        if (!args.last_only) return layer_rows(grad, "grad");
        return {kernel_input(grad, "grad"), 0, grad.stride(0)};
    }

    // Gradients of x, gate_logits, initial_state, norm_weight and norm_bias.
    Five new_grads() const {
        return {new_grad(original_x_, original_x_, "grad_x"),
                new_grad(original_x_, original_gates_, "grad_gate_logits"),
                new_grad(original_x_, original_initial_, "grad_initial_state"),
                new_grad(original_x_, original_weight_, "grad_norm_weight"),
                new_grad(original_x_, original_bias_, "grad_norm_bias")};
    }
    // Gradients if x has no elements: zeros, but the last state of no layers is `initial_state` itself.
    void write_empty_grads(const Five& out, const Tensor& grad) const {
        auto [x, gates, initial_state, weight, bias] = out;
        zero_all({gates, initial_state, weight, bias});
        if (original_initial_ && args.last_only && args.layers == 0) torch::stable::copy_(initial_state, grad);
    }

  private:
    const void* wide_vector(const Tensor& vector, const char* name, int64_t size, OptionalTensor* kept) {
        check_shape(vector, name, {size});
        check_dtype(vector, name, accumulation_type(args.dtype));
        check_same_device(vector, name, original_x_, "x");
        *kept = as_contiguous(vector);
        return kernel_input(**kept, name);
    }

    const Tensor original_x_, original_gates_;
    const OptionalTensor original_initial_, original_weight_, original_bias_;
    Tensor x_;
    OptionalTensor gates_, initial_state_, weight_, bias_;
};

// The arguments that depth_gru and its backward share.
class GruArguments {
  public:
    DepthGru args{};

    GruArguments(const Tensor& x, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& initial_state)
        : original_x_(x), original_initial_(initial_state) {
        check_shape(x, "x", {-1, -1, -1});
        args.dtype = kernel_dtype(x, "x");
        args.pool = torch_pool();
        args.layers = x.size(0), args.tokens = x.size(1), args.input = x.size(2);
        check_shape(weight_hh, "weight_hh", {-1, -1});  // [3·d, d]
        args.width = weight_hh.size(1);
        weight_hh_ = as_contiguous(checked_like(weight_hh, "weight_hh", x, "x", {3 * args.width, args.width}));
        weight_ih_ = as_contiguous(checked_like(weight_ih, "weight_ih", x, "x", {3 * args.width, args.input}));
        args.weight_ih = kernel_input(weight_ih_, "weight_ih"), args.weight_hh = kernel_input(weight_hh_, "weight_hh");
        if (initial_state) {
            initial_state_ =
                as_contiguous(checked_like(*initial_state, "initial_state", x, "x", {args.tokens, args.width}));
            args.initial_state = kernel_input(*initial_state_, "initial_state");
        }
        x_ = unit_stride_last(x);
        args.x = layer_rows(x_, "x");
    }

    Tensor checked_bias(const Tensor& bias, const char* name) const {
        return as_contiguous(checked_like(bias, name, original_x_, "x", {3 * args.width}));
    }
    Tensor checked_grad(const Tensor& grad) const {
        return unit_stride_last(checked_like(grad, "grad", original_x_, "x", {args.layers, args.tokens, args.width}));
    }
    Tensor checked_states(const Tensor& states) const {
        return as_contiguous(checked_like(states, "states", original_x_, "x", {args.layers, args.tokens, args.width}));
    }
    Tensor checked_gates(const Tensor& gates) const {
        return as_contiguous(checked_like(gates, "gates", original_x_, "x", {args.layers, args.tokens, 4, args.width}));
    }

    // States, and the gates where they are kept.
    Two new_states(bool keep) const {
        Tensor states = allocate(original_x_, {args.layers, args.tokens, args.width}, "states");
        if (!keep) return {states, allocate(original_x_, {0}, "gates")};
        return {states, allocate(original_x_, {args.layers, args.tokens, 4, args.width}, "gates")};
    }

    // Gradients of x, weight_ih, weight_hh, bias_ih, bias_hh and initial_state.
    Six new_grads() const {
        return {new_grad(original_x_, original_x_, "grad_x"),
                new_grad(original_x_, weight_ih_, "grad_weight_ih"),
                new_grad(original_x_, weight_hh_, "grad_weight_hh"),
                allocate(original_x_, {3 * args.width}, "grad_bias_ih"),
                allocate(original_x_, {3 * args.width}, "grad_bias_hh"),
                new_grad(original_x_, original_initial_, "grad_initial_state")};
    }

    const Tensor& x() const { return x_; }
    const Tensor& weight_ih() const { return weight_ih_; }
    const Tensor& weight_hh() const { return weight_hh_; }
    const OptionalTensor& initial_state() const { return initial_state_; }

  private:
    const Tensor original_x_;
    const OptionalTensor original_initial_;
    Tensor x_, weight_ih_, weight_hh_;
    OptionalTensor initial_state_;
};

// The arguments that depth_attention and its backward share.
class AttentionArguments {
  public:
    DepthAttention args{};

    AttentionArguments(const Tensor& keys, const Tensor& values, const Tensor& weight_query, const Tensor& weight_out,
                       const OptionalTensor& initial_state, int64_t num_heads, int64_t window, double scale)
        : original_keys_(keys), original_values_(values), original_initial_(initial_state) {
        check_shape(keys, "keys", {-1, -1, -1});
        args.dtype = kernel_dtype(keys, "keys");
        args.pool = torch_pool();
        args.layers = keys.size(0), args.tokens = keys.size(1);
        const int64_t inner = keys.size(2);
        STD_TORCH_CHECK(num_heads >= 1 && num_heads <= (inner > 1 ? inner : 1) && inner % num_heads == 0,
                        "num_heads must divide the width of the keys, ", inner, ", got ", num_heads);
        STD_TORCH_CHECK(window >= 1, "window must be at least 1, got ", window);
        args.num_heads = num_heads, args.head_width = inner / num_heads;
        args.window = window, args.scale = scale;
        check_shape(weight_out, "weight_out", {-1, inner});
        args.width = weight_out.size(0);
        checked_like(values, "values", keys, "keys", {args.layers, args.tokens, inner});
        weight_query_ = as_contiguous(checked_like(weight_query, "weight_query", keys, "keys", {inner, args.width}));
        weight_out_ = as_contiguous(checked_like(weight_out, "weight_out", keys, "keys", {args.width, inner}));
        args.weight_query = kernel_input(weight_query_, "weight_query");
        args.weight_out = kernel_input(weight_out_, "weight_out");
        if (initial_state) {
            initial_state_ =
                as_contiguous(checked_like(*initial_state, "initial_state", keys, "keys", {args.tokens, args.width}));
            args.initial_state = kernel_input(*initial_state_, "initial_state");
        }
        keys_ = unit_stride_last(keys), values_ = unit_stride_last(values);
        args.keys = layer_rows(keys_, "keys"), args.values = layer_rows(values_, "values");
    }

    Tensor checked_grad(const Tensor& grad) const {
        return unit_stride_last(
            checked_like(grad, "grad", original_keys_, "keys", {args.layers, args.tokens, args.width}));
    }
    Tensor checked_states(const Tensor& states) const {
        return as_contiguous(
            checked_like(states, "states", original_keys_, "keys", {args.layers, args.tokens, args.width}));
    }
    Tensor checked_attended(const Tensor& attended) const {
        return as_contiguous(
            checked_like(attended, "attended", original_keys_, "keys", {args.layers, args.tokens, inner()}));
    }

    // States, and what they attended to where that is kept.
    Two new_states(bool keep) const {
        Tensor states = allocate(original_keys_, {args.layers, args.tokens, args.width}, "states");
        if (!keep) return {states, allocate(original_keys_, {0}, "attended")};
        return {states, allocate(original_keys_, {args.layers, args.tokens, inner()}, "attended")};
    }

    // Gradients of keys, values, weight_query, weight_out and initial_state.
    Five new_grads() const {
        return {new_grad(original_keys_, original_keys_, "grad_keys"),
                new_grad(original_keys_, original_values_, "grad_values"),
                new_grad(original_keys_, weight_query_, "grad_weight_query"),
                new_grad(original_keys_, weight_out_, "grad_weight_out"),
                new_grad(original_keys_, original_initial_, "grad_initial_state")};
    }

    int64_t inner() const { return args.num_heads * args.head_width; }
    const Tensor& weight_query() const { return weight_query_; }
    const Tensor& weight_out() const { return weight_out_; }
    const OptionalTensor& initial_state() const { return initial_state_; }

  private:
    const Tensor original_keys_, original_values_;
    const OptionalTensor original_initial_;
    Tensor keys_, values_, weight_query_, weight_out_;
    OptionalTensor initial_state_;
};

}  // namespace xlayer
