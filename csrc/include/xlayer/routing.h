// The contract of the routing kernels: the mean of each sequence over the tokens that its mask allows.
// Implemented by csrc/cpu/hdim/routing.cpp and csrc/cuda/hdim/routing.cu, called by csrc/torch/routing.cpp.
#pragma once

#include "xlayer/types.h"

namespace xlayer {

// A mask [batch, tokens], any byte but 0 = may be used: a bool in memory need not be 0 or 1. Strides are in elements
// and may be 0; data == nullptr allows all.
struct TokenMask {
    const uint8_t* data;
    int64_t batch_stride;
    int64_t token_stride;
};

// out[b, h] = mean of x[b, s, h] over the allowed s; 0 where a sequence has no allowed token.
struct MaskedMeanForward {
    DType dtype;  // of x and out; sums are kept in float32, in float64 for float64
    int64_t batch, tokens, width;
    const void* x;  // unit stride along width
    int64_t x_batch_stride, x_token_stride;
    TokenMask mask;
    void* out;  // contiguous [batch, width]
    ThreadPool pool;
};

// grad_x[b, s, h] = grad[b, h] / (number of allowed tokens) where s is allowed, else 0.
struct MaskedMeanBackward {
    DType dtype;  // of grad and grad_x
    int64_t batch, tokens, width;
    const void* grad;  // unit stride along width
    int64_t grad_batch_stride;
    TokenMask mask;
    void* grad_x;  // contiguous [batch, tokens, width]
    ThreadPool pool;
};

namespace cpu::hdim {
void masked_mean_forward(const MaskedMeanForward& args);
void masked_mean_backward(const MaskedMeanBackward& args);
}  // namespace cpu::hdim

namespace cuda::hdim {
// `stream` is a cudaStream_t of the current device; the pool is not used. Throws std::runtime_error if a launch fails.
void masked_mean_forward(const MaskedMeanForward& args, void* stream);
void masked_mean_backward(const MaskedMeanBackward& args, void* stream);
}  // namespace cuda::hdim

}  // namespace xlayer
