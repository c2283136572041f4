// hdim: token-pair messaging. The contract that csrc/cpu and csrc/cuda implement.
//
//   pre_ijm = W1[m] · [q_i; k_j; q_i∘k_j; |q_i−k_j|] + b1[m]
//   logit_ij = w2 · act(pre_ij) / temperature,   P_i = softmax_j(logit_i),   context_i = Σ_j P_ij v_j
//
// over the allowed pairs only; a row without one gets context 0, entropy 0 and no gradient.
// A pair that is not allowed is never computed with, so NaN and inf in its key or value stay there.
//
// Shapes: q [B,Sq,D], k [B,Sk,D], v [B,Sk,H], W1 [M,4D], b1 [M], w2 [M], key_mask [B,Sk], attn_mask [B,Sq,Sk].
// Strides count elements. "Accumulation type" is double for float64 and float for every other dtype.
#pragma once

#include "xlayer/types.h"

namespace xlayer {

// Statistics of a row of logits that forward saves for backward: the largest, M; Σ_j exp(logit_j − M), which is 0 where
// no pair is allowed and else at least 1; and the mean of logit − M under P. Apart from each other, because their sum,
// the logsumexp, rounded to one number, would put all of a row's probabilities off by the rounding of the largest
// logit. With them P_j = exp(logit_j − M) / Σ, and the entropy's derivative P_j·(mean − (logit_j − M)) cancels nothing.
constexpr int64_t kHdimStatistics = 3;

struct HdimInputs {
    DType dtype;
    bool gelu;  // act: exact GELU, else ReLU
    bool tf32;  // CUDA may round factors of float32 to tf32 in the products per pair
    double temperature;
    int64_t batch, queries, keys, proj_dim, mlp_dim, value_dim;  // B, Sq, Sk, D, M, H
    const void* query;
    const void* key;
    const void* value;
    int64_t query_stride[3], key_stride[3], value_stride[3];
    const void* weight1;  // contiguous, like bias1 and weight2
    const void* bias1;
    const void* weight2;
    const uint8_t* key_mask;   // any byte but 0: may be used; null: every key may be
    const uint8_t* attn_mask;  // the same of pairs
    int64_t key_mask_stride[2], attn_mask_stride[3];
};

struct HdimForward {
    HdimInputs in;
    void* context;      // [B,Sq,H], contiguous, dtype
    void* statistics;   // [B,Sq,kHdimStatistics], contiguous, accumulation type
    void* row_entropy;  // [B,Sq], contiguous, accumulation type
    void* workspace;    // forward_workspace() bytes, aligned to 64
    ThreadPool pool;
};

struct HdimBackward {
    HdimInputs in;
    const void* grad_context;      // [B,Sq,H], contiguous, dtype
    const void* grad_row_entropy;  // [B,Sq], contiguous, accumulation type; null: zero
    const void* context;           // the forward's outputs
    const void* statistics;
    void* grad_query;  // all contiguous, dtype
    void* grad_key;
    void* grad_value;
    void* grad_weight1;
    void* grad_bias1;
    void* grad_weight2;
    void* workspace;  // backward_workspace() bytes, aligned to 64
    ThreadPool pool;
};

namespace cpu::hdim {

// Bytes of scratch that the kernel needs for these sizes, dtype and number of threads.
int64_t forward_workspace(const HdimForward& args);
int64_t backward_workspace(const HdimBackward& args);

void forward(const HdimForward& args);
void backward(const HdimBackward& args);

}  // namespace cpu::hdim

// The CUDA kernels do what is done per pair; the caller multiplies matrices between them:
//
//   forward   score → softmax → context = P · value
//   backward  score → ∂L/∂P = grad_context · valueᵀ → grad_pairs → grad_value = Pᵀ · grad_context
//
// `stream` is a cudaStream_t of the current device. All throw std::runtime_error if a launch fails.
//
// Two things differ from the formula, both for the sake of the tensor cores, which mix what they are given: an allowed
// pair whose query or key holds NaN or inf has the logit NaN, and with a pair mask so has one whose value does.
namespace cuda::hdim {

constexpr int64_t kHdimMaxProjDim = 64;  // the largest D

// Rows of logits lie this many elements apart: vectors of them are aligned, and tiles of 16 never run past a row.
inline int64_t logits_pitch(int64_t keys) { return (keys + 15) / 16 * 16; }

struct HdimScore {
    HdimInputs in;
    void* value;  // [B,Sk,H], contiguous, dtype: out, in.value with zeros for what must not be used; null without masks
    void* logits;     // [B,Sq,pitch], accumulation type: out, −inf where a pair is not allowed or beyond the keys
    void* workspace;  // score_workspace() bytes, aligned to 64
};

struct HdimSoftmax {
    HdimInputs in;
    const void* logits;
    void* probability;  // [B,Sq,pitch], dtype: out; may be the logits' own memory if the types are the same
    void* statistics;   // [B,Sq,kHdimStatistics], accumulation type: out
    void* row_entropy;  // [B,Sq], accumulation type: out
};

struct HdimGradPairs {
    HdimInputs in;
    void* logits;                  // in: of score; scratch afterwards
    void* probability;             // [B,Sq,Sk], contiguous, dtype: in ∂L/∂P, out P
    const void* grad_row_entropy;  // [B,Sq], accumulation type; null: zero
    void* grad_query;              // out: all contiguous, dtype
    void* grad_key;
    void* grad_weight1;
    void* grad_bias1;
    void* grad_weight2;
    void* workspace;  // grad_pairs_workspace() bytes, aligned to 64; begins with what score left in its own
};

int64_t score_workspace(const HdimInputs& in);
int64_t grad_pairs_workspace(const HdimInputs& in);  // at least score_workspace()

void score(const HdimScore& args, void* stream);
void softmax(const HdimSoftmax& args, void* stream);
void grad_pairs(const HdimGradPairs& args, void* stream);

}  // namespace cuda::hdim
}  // namespace xlayer
