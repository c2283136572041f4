// Entry points of logits.cu.
#pragma once

#include "cuda/hyper/common.cuh"

namespace xlayer::cuda::hyper {

// z and statistics of all tokens for norm rms_all, from the streams that pre reads.
struct LogitsOfAll {
    HyperSizes size;
    HyperStreams<const void*> in;
    const void* weight;
    double eps;
    void *logits, *statistics;
};
void logits_of_all(const LogitsOfAll& args, void* stream);

// sums[m] = the sum of row m of a weight [n+2, d]: what a mean of 1 would add to z.
void sum_weights(const HyperSizes& size, const void* weight, void* sums, void* stream);

}  // namespace xlayer::cuda::hyper
