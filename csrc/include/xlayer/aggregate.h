// The contract of the aggregation kernels: a state that is carried across the layers of a model, token by token.
// Implemented by csrc/cpu/aggregate and csrc/cuda/aggregate, called by csrc/torch/aggregate*.cpp.
#pragma once

#include "xlayer/types.h"

namespace xlayer {

// Taps [layers, tokens, width]: unit stride along the width, the other strides in elements.
struct LayerRows {
    const void* data;
    int64_t layer_stride, token_stride;
};

// S_l = (1 − σ(a_l))·S_{l−1} + σ(a_l)·n_l, where n_l is x_l or its LayerNorm over the width, (x − mean)·rstd·weight +
// bias with the biased variance. Arithmetic and the carried state in float32, in float64 for float64.
struct EmaScan {
    DType dtype;  // of x, initial_state and states, and of their gradients
    int64_t layers, tokens, width;
    LayerRows x;
    const void* gate_logits;    // [layers], float32; float64 for float64, as are norm_weight and norm_bias
    const void* initial_state;  // null: zeros; else contiguous [tokens, width]
    bool normalize;
    const void* norm_weight;  // null unless `normalize`; contiguous [width]
    const void* norm_bias;    // null: zeros; contiguous [width]
    double eps;
    bool last_only;
    ThreadPool pool;
};

struct EmaScanForward {
    EmaScan scan;
    void* states;     // contiguous [layers, tokens, width], or [tokens, width] where last_only
    void* workspace;  // ema_scan_forward_workspace() bytes, aligned to 64
};

// From grad = ∂L/∂states to the gradients of everything that was given; reads x once and keeps nothing else.
struct EmaScanBackward {
    EmaScan scan;
    LayerRows grad;            // [layers, tokens, width]; where last_only [tokens, width] with layer_stride 0
    void* grad_x;              // contiguous [layers, tokens, width]
    void* grad_gate_logits;    // [layers], the accumulation type, as are the norm's
    void* grad_initial_state;  // null where `initial_state` is
    void* grad_norm_weight;    // null where `norm_weight` is
    void* grad_norm_bias;      // null where `norm_bias` is
    void* workspace;           // ema_scan_backward_workspace() bytes, aligned to 64
};

// The gated recurrent unit over depth, gates in the order of torch.nn.GRUCell, from h_{−1} = initial_state:
//   r = σ(W_ir x_l + b_ir + W_hr h + b_hr), z = σ(W_iz x_l + b_iz + W_hz h + b_hz)
//   m = W_hn h + b_hn, n = tanh(W_in x_l + b_in + r·m), h_l = (1 − z)·n + z·h, where h = h_{l−1}
struct DepthGru {
    DType dtype;                           // of all tensors
    int64_t layers, tokens, input, width;  // x is [layers, tokens, input]
    LayerRows x;
    const void* weight_ih;      // contiguous [3·width, input]
    const void* weight_hh;      // contiguous [3·width, width]
    const void* initial_state;  // null: zeros; else contiguous [tokens, width]
    ThreadPool pool;
};

struct DepthGruForward {
    DepthGru gru;
    const void* bias_ih;  // contiguous [3·width]
    const void* bias_hh;
    void* states;     // contiguous [layers, tokens, width]
    void* gates;      // null, or contiguous [layers, tokens, 4, width]: r, z, n, m
    void* workspace;  // depth_gru_forward_workspace() bytes, aligned to 64
};

struct DepthGruBackward {
    DepthGru gru;
    LayerRows grad;      // ∂L/∂states
    const void* states;  // as the forward wrote them
    const void* gates;
    void* grad_x;          // contiguous [layers, tokens, input]
    void* grad_weight_ih;  // as the weights
    void* grad_weight_hh;
    void* grad_bias_ih;  // contiguous [3·width]
    void* grad_bias_hh;
    void* grad_initial_state;  // null where `initial_state` is
    void* workspace;           // depth_gru_backward_workspace() bytes, aligned to 64
};

// A state that attends, layer by layer, to the last `window` taps, with q = W_q S_{l−1} cut into heads:
//   S_l = S_{l−1} + W_o a_l,  a_l = Σ_j softmax_j(scale · q·k_j) v_j over max(0, l − window + 1) ≤ j ≤ l, in every head
struct DepthAttention {
    DType dtype;                                           // of all tensors
    int64_t layers, tokens, width, num_heads, head_width;  // keys and values are [layers, tokens, num_heads·head_width]
    int64_t window;                                        // at least 1
    double scale;
    LayerRows keys, values;
    const void* weight_query;   // contiguous [num_heads·head_width, width]
    const void* weight_out;     // contiguous [width, num_heads·head_width]
    const void* initial_state;  // null: zeros; else contiguous [tokens, width]
    ThreadPool pool;
};

struct DepthAttentionForward {
    DepthAttention attention;
    void* states;     // contiguous [layers, tokens, width]
    void* attended;   // null, or contiguous [layers, tokens, num_heads·head_width]: a
    void* workspace;  // depth_attention_forward_workspace() bytes, aligned to 64
};

struct DepthAttentionBackward {
    DepthAttention attention;
    LayerRows grad;  // ∂L/∂states
    const void* states;
    const void* attended;
    void* grad_keys;  // contiguous [layers, tokens, num_heads·head_width]
    void* grad_values;
    void* grad_weight_query;
    void* grad_weight_out;
    void* grad_initial_state;  // null where `initial_state` is
    void* workspace;           // depth_attention_backward_workspace() bytes, aligned to 64
};

namespace cpu::aggregate {
int64_t ema_scan_forward_workspace(const EmaScanForward& args);
void ema_scan_forward(const EmaScanForward& args);
int64_t ema_scan_backward_workspace(const EmaScanBackward& args);
void ema_scan_backward(const EmaScanBackward& args);
int64_t depth_gru_forward_workspace(const DepthGruForward& args);
void depth_gru_forward(const DepthGruForward& args);
int64_t depth_gru_backward_workspace(const DepthGruBackward& args);
void depth_gru_backward(const DepthGruBackward& args);
int64_t depth_attention_forward_workspace(const DepthAttentionForward& args);
void depth_attention_forward(const DepthAttentionForward& args);
int64_t depth_attention_backward_workspace(const DepthAttentionBackward& args);
void depth_attention_backward(const DepthAttentionBackward& args);
}  // namespace cpu::aggregate

// `stream` is a cudaStream_t of the current device; the pool is not used. Throws std::runtime_error if a launch fails.
namespace cuda::aggregate {
constexpr int64_t kEmaMaxLayers = 512;             // of ema_scan's backward
constexpr int64_t kDepthAttentionMaxWindow = 256;  // the most taps that a state may attend to

int64_t ema_scan_forward_workspace(const EmaScanForward& args);
void ema_scan_forward(const EmaScanForward& args, void* stream);
int64_t ema_scan_backward_workspace(const EmaScanBackward& args);
void ema_scan_backward(const EmaScanBackward& args, void* stream);

// depth_gru, one layer, between the products of matrices.
struct GruStep {
    DType dtype;  // of all tensors
    int64_t tokens, width;
    const void* from_input;  // W_i x_l: [tokens, 3·width], input_stride elements from row to row
    int64_t input_stride;
    const void* from_state;  // W_h h, contiguous [tokens, 3·width]; null: zeros
    const void* bias_ih;     // contiguous [3·width]
    const void* bias_hh;
    const void* previous;  // h, contiguous [tokens, width]; null: zeros
    void* state;           // h_l
    void* gates;           // null, or contiguous [tokens, 4, width]: r, z, n, m; may lie over `from_input`
};
void gru_step(const GruStep& args, void* stream);

// From ∂L/∂h_l, which is grad + direct + product, to the gradients of what is inside the gates' functions.
struct GruStepBackward {
    DType dtype;
    int64_t tokens, width;
    const void* grad;  // [tokens, width], grad_stride elements from row to row
    int64_t grad_stride;
    void* direct;  // contiguous [tokens, width]: in z·∂L/∂h_{l+1}, out z·∂L/∂h_l
    const void*
        product;        // contiguous [tokens, width]: what comes back through W_h; null, in the last layer: both are 0
    const void* gates;  // contiguous [tokens, 4, width]: r, z, n, m
    const void* previous;
    void* inside;  // contiguous [tokens, 4, width]: of n's sum, of r's, of z's, of m
};
void gru_step_backward(const GruStepBackward& args, void* stream);

// depth_attention, one layer, between the products of matrices.
struct AttentionStep {
    DType dtype;
    int64_t layers, tokens, num_heads, head_width;
    int64_t window;  // at most kDepthAttentionMaxWindow
    double scale;
    int64_t layer;
    LayerRows keys, values;  // of all layers
    const void* query;       // contiguous [tokens, num_heads·head_width]; null: zeros
    void* attended;          // the same shape
};
void attention_step(const AttentionStep& args, void* stream);

// Writes of the layer ∂L/∂query, and for all heads the weights and the gradients of their logits that
// attention_gradients() makes those of keys and values from.
struct AttentionStepBackward {
    AttentionStep step;         // attended is not used
    const void* grad_attended;  // contiguous [tokens, num_heads·head_width]
    void* grad_query;
    void* weights;      // the accumulation type, [layers, tokens, num_heads, window]: of the tap i layers back at i
    void* grad_logits;  // the same, times scale
};
void attention_step_backward(const AttentionStepBackward& args, void* stream);

struct AttentionGradients {
    AttentionStep step;         // neither layer, keys, values, query nor attended are used
    const void* query;          // contiguous [layers, tokens, num_heads·head_width]
    const void* grad_attended;  // as query
    const void* weights;
    const void* grad_logits;
    void* grad_keys;  // as query
    void* grad_values;
};
void attention_gradients(const AttentionGradients& args, void* stream);

// Sums over the rows of x, contiguous [rows, columns], columns first … first + count of them to `out`.
struct SumColumns {
    struct Part {
        int64_t first, count;
        void* out;
    };
    DType dtype;
    const void* x;
    int64_t rows, columns;
    Part parts[3];
    void* workspace;  // sum_columns_workspace() bytes, aligned to 64
};
int64_t sum_columns_workspace(const SumColumns& args);
void sum_columns(const SumColumns& args, void* stream);

// out = first + second + third; second and third may be null.
struct AddRows {
    DType dtype;
    int64_t tokens, width;
    const void* first;  // [tokens, width], first_stride elements from row to row; the others are contiguous
    int64_t first_stride;
    const void* second;
    const void* third;
    void* out;  // may be any of the others
};
void add_rows(const AddRows& args, void* stream);
}  // namespace cuda::aggregate

}  // namespace xlayer
