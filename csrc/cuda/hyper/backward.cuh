// The steps of hyper's backward and the workspace that passes their results on.
//
//   dots          (backward_coefficients.cu)   ⟨h'_j, ∂L/∂x⟩ of every token
//   coefficients  (backward_coefficients.cu)   from them and ∂L/∂c to ∂L/∂z: a token's record, of which ∂L/∂h' is made,
//                                              and partial sums of the gradients of base, scale and bias
//   streams       (backward_streams.cu)        ∂L/∂h, ∂L/∂y, partial sums of the gradients of post's coefficients and
//                                              of the weight
//   weight        (backward_weight.cu)         for rms_all, partial sums of the gradient of its large weight
//   finish        (backward_finish.cu)         adds the partial sums, in order
//
// Tokens are split into runs, whose number depends on the sizes alone; a run's sums are made by one block in order.
#pragma once

#include "cuda/hyper/common.cuh"

namespace xlayer::cuda::hyper {

constexpr int kCoefficientWarps = 4;  // of a block that goes from ∂L/∂c to ∂L/∂z

// Lanes that have a token together, one for each of its streams.
template <int N>
constexpr int kTokenLanes = kMaxStreamsOf<N>;
template <int N>
constexpr int kCoefficientTokens = kCoefficientWarps * kWarpSize / kTokenLanes<N>;  // that a block has at a time

// Their shared memory, beside Sinkhorn's matrices where these fit.
template <class A, int N>
struct CoefficientShared {
    A grad[kCoefficientTokens<N>][kMaxStreamsOf<N> * kMaxStreamsOf<N>];  // of Sinkhorn's matrix
    double partial[kCoefficientWarps][3 * kMaxCoefficientsOf<N>];
};

constexpr int64_t kCoefficientBytes = 92 * 1024;

// Elements of d that a thread of the streams' kernel has, and groups of n warps in its block. The block has one warp
// for each stream and group.
template <class T, int N>
constexpr int kStreamElements = N == 0 || sizeof(T) == 8 ? 1 : (N == 8 ? 4 : 8) / sizeof(T);
template <int N>
constexpr int kStreamGroups = N == 0 ? 1 : 8 / N;
template <class T, int N>
constexpr int kStreamTile = kStreamGroups<N> * kWarpSize * kStreamElements<T, N>;  // columns of a block

// Offsets into a token's record, in A: for all j, c_j0, the mean of h'_j in two parts, and the factor of h'_j − mean
// and the constant that the norm adds to its gradient; then ∂L/∂z ÷ root of the variance, the factors of the weight's
// rows.
enum Record { kPre, kMean, kRest, kSlope, kLevel, kLogits };
__host__ __device__ constexpr int64_t record_size(int64_t n) { return 5 * n + n * (n + 2); }

struct BackwardPlan {
    HyperBackward args;
    bool post, dynamic, all;
    int64_t num_coefficients;  // n·(n+2)
    // Runs, and tokens of a run, of the streams', the weight's and the coefficients' kernels; tiles of d of the first.
    int64_t runs, run_tokens, weight_runs, weight_run_tokens, coefficient_runs, coefficient_run_tokens, tiles;
    bool history_shared;               // Sinkhorn's matrices fit into shared memory
    int64_t history, histories_bytes;  // of one token, in elements; of all blocks in the workspace, in bytes
    // In the workspace, of A but for coefficient_partials, which are double:
    void* dots;                  // [tokens, n]
    void* records;               // [tokens, record_size]
    void* weight_sum;            // [n+2]
    void* coefficient_partials;  // [coefficient_runs, 3, n·(n+2)]: base, scale, bias
    void* post_partials;    // [n+1, n] for each run and tile or, where coefficients differ, for each token and tile
    void* weight_partials;  // [weight_runs, weights]
    void* histories;
};

void backward_coefficients(const BackwardPlan& plan, void* stream);
void backward_streams(const BackwardPlan& plan, void* stream);
void backward_weight_of_all(const BackwardPlan& plan, void* stream);
void backward_finish(const BackwardPlan& plan, void* stream);

}  // namespace xlayer::cuda::hyper
