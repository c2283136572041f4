// Products of all streams of a token with the large weight of rms_all: see hyper_logits.cu.
#pragma once

#include "hyper.cuh"

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

}  // namespace xlayer::cuda::hyper
