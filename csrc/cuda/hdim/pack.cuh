// Packs the inputs of hdim into the layout that the pair kernels read: see pairs.cuh.
#pragma once

#include "cuda/hdim/pairs.cuh"

namespace xlayer::cuda::hdim {

// Queues the kernels that fill `packed`, and args.value unless it is null.
template <class T>
void pack_inputs(const HdimScore& args, const Packed<T>& packed, const PairSizes& sizes, void* stream);

}  // namespace xlayer::cuda::hdim
