// hyper: n residual streams around a sublayer. The contract that csrc/cpu and csrc/cuda implement.
//
// A token has n streams h_1 … h_n of width d, and the coefficients c [n, n+2] of one sublayer T:
//
//   x = Σ_j c[j, 0] h_j                                    pre:  what the sublayer reads, y = T(x)
//   h'_k = c[k, n+1] y + Σ_j c[j, k] h_j,  k = 1 … n       post: what becomes of the streams
//
// Row j of c is (α_j0, α_j1 … α_jn, β_j) of hyper-connections, and (pre_j, M_1j … M_nj, post_j) of manifold-constrained
// ones. The kernel does post of one sublayer, pre of the next, or both in one pass over the streams (the boundary).
// Pre makes its coefficients from the streams h' that it reads, as stored in their dtype:
//
//   z_jm = ⟨norm(h'_j), weight_m⟩                          layer, rms: one weight [n+2, d] for all streams
//   z = ⟨norm([h'_1; …; h'_n]), weight⟩                    rms_all: weight [n·(n+2), n·d], row j·(n+2) + m for z_jm
//
//   identity, tanh   c_jm = base_jm + scale_m · act(z_jm + bias_m)
//   sinkhorn_*       a_jm = base_jm + scale_m · z_jm;  c_j0 = σ(a_j0),  c_j,n+1 = 2σ(a_j,n+1), and c_j,1+i = M_ij where
//                    M = exp(a_·,1…n), its two axes normalized in turn `iterations` times. sinkhorn_rows ends with the
//                    rows: Σ_j M_ij = 1; sinkhorn_columns with the columns: Σ_i M_ij = 1. Row j of a is column j of M.
//   norm = none      c = base, the same for all tokens; nothing is computed from the streams
//
// Tokens are counted by two indices, outer and inner, so that n may lie between them in memory. Strides count elements;
// neighbours along d are neighbours in memory. "Accumulation type" is double for float64, float for all others; tensors
// without a stride here are contiguous and, where not said otherwise, of that type.
#pragma once

#include "xlayer/types.h"

namespace xlayer {

constexpr int64_t kHyperMaxStreams = 16;       // the largest n
constexpr int64_t kHyperMaxIterations = 1000;  // of Sinkhorn's algorithm

// Numbers that pre keeps of a row for the backward: a number near its mean, the mean less that number, and 1 / root of
// variance + eps. In two parts, because where a mean is large beside the deviations, what one number would round away
// is not small beside them. 0, 0 for rms and rms_all.
constexpr int64_t kHyperStatistics = 3;

enum class HyperNorm : int64_t { none, layer, rms, rms_all };
enum class HyperForm : int64_t { identity, tanh, sinkhorn_rows, sinkhorn_columns };

struct HyperSizes {
    DType dtype;         // of streams, x, and their gradients
    DType branch_dtype;  // of y and its gradient
    int64_t outer, inner, streams, width;

    int64_t tokens() const { return outer * inner; }
    int64_t columns() const { return streams + 2; }               // of c
    int64_t coefficients() const { return streams * columns(); }  // elements of c, per token
};

template <class Pointer>
struct HyperStreams {  // [outer, inner, n, d]
    Pointer data;
    int64_t stride[3];  // of outer, inner, n
};
template <class Pointer>
struct HyperRows {  // [outer, inner, d]
    Pointer data;
    int64_t stride[2];
};

// Parameters of pre's coefficients. Null: weight, bias, scale where norm is none; bias also means 0.
struct HyperConnection {
    HyperNorm norm;
    HyperForm form;
    int64_t iterations;
    double eps;          // added to the variance, or to the mean square
    const void* base;    // [n, n+2]
    const void* weight;  // see above
    const void* bias;    // [n+2]
    const void* scale;   // [n+2]

    // Elements of weight.
    int64_t weights(const HyperSizes& size) const {
        if (norm == HyperNorm::none) return 0;
        const int64_t shared = size.columns() * size.width;
        return norm == HyperNorm::rms_all ? shared * size.streams * size.streams : shared;
    }
};

// The inputs of post, forward and backward. branch.data == nullptr: there is no post, and h' is h.
struct HyperPost {
    HyperRows<const void*> branch;  // y, branch_dtype
    const void* coefficients;       // [tokens, n, n+2], or [n, n+2] if shared
    bool shared;                    // by all tokens
};

struct HyperForward {
    HyperSizes size;
    HyperStreams<const void*> in;  // h
    HyperPost post;
    HyperStreams<void*> out;  // h', written where there is a post
    bool pre;                 // whether there is a pre; what follows is for it
    HyperConnection connection;
    void* branch_input;  // x [tokens, d], dtype
    void* coefficients;  // c [tokens, n, n+2]; null, like the next two, where norm is none
    void* logits;        // z [tokens, n, n+2]: kept for the backward
    void* statistics;    // [tokens, n, kHyperStatistics]; rms_all writes the same for all n
    void* workspace;     // forward_workspace() bytes, aligned to 64
    ThreadPool pool;
};

struct HyperBackward {
    HyperSizes size;
    HyperStreams<const void*> in;  // h
    HyperPost post;
    HyperStreams<const void*> grad_out;  // ∂L/∂h'; null: zero. Where there is no post, null
    bool pre;
    HyperConnection connection;
    HyperRows<const void*> grad_branch_input;  // ∂L/∂x, dtype
    const void* grad_coefficients;             // ∂L/∂c [tokens, n, n+2]; null: zero, as where norm is none
    const void* coefficients;                  // of the forward; null, like the next two, where norm is none
    const void* logits;
    const void* statistics;

    HyperStreams<void*> grad_in;   // out: ∂L/∂h
    void* grad_branch;             // out: ∂L/∂y [tokens, d], branch_dtype, where there is a post
    void* grad_post_coefficients;  // out: like post.coefficients
    void* grad_base;               // out where there is a pre: [n, n+2]
    void* grad_weight;             // out where norm is not none, like the next two
    void* grad_bias;               // [n+2], whether or not there is a bias
    void* grad_scale;              // [n+2]
    void* workspace;               // backward_workspace() bytes, aligned to 64
    ThreadPool pool;
};

namespace cpu::hyper {
int64_t forward_workspace(const HyperForward& args);
int64_t backward_workspace(const HyperBackward& args);
void forward(const HyperForward& args);
void backward(const HyperBackward& args);
}  // namespace cpu::hyper

// `stream` is a cudaStream_t of the current device; the pool is not used. Throw std::runtime_error if a launch fails.
namespace cuda::hyper {
int64_t forward_workspace(const HyperForward& args);
int64_t backward_workspace(const HyperBackward& args);
void forward(const HyperForward& args, void* stream);
void backward(const HyperBackward& args, void* stream);
}  // namespace cuda::hyper

}  // namespace xlayer
