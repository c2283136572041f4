// The steps of hdim's backward, each in its own file, and the partial sums between them. Partial sums of several warps
// are stored side by side and added in order afterwards (finish.cu): no atomics, always the same bits.
#pragma once

#include "cuda/hdim/pack.cuh"
#include "cuda/hdim/pair_tiling.cuh"

namespace xlayer::cuda::hdim {

// Split of the pairs. grad_keys: a warp takes 16·R keys and a slice of queries. grad_weights: a warp takes
// 16 hidden units, a block a chunk of keys and a slice of queries.
struct GradPlan {
    PairTiling keys;                      // of grad_keys
    int64_t weight_chunks, weight_chunk;  // of keys
    int64_t weight_slices, weight_slice, weight_tiles;
};

template <class T>
struct GradPartials {
    using A = Accumulator<T>;
    A* query_of_pairs;    // [B][tiles][Sq][8G]
    A* query_of_weights;  // [B][weight_chunks][weight_tiles][Sq][8G]
    A* key;               // [B][slices][Sk][8G]
    A* weight;            // [B][weight_chunks][weight_slices][M][4][8G]: Σ G times q, k, q∘k, |q−k|, without w2
    A* hidden;            // [B][weight_chunks][weight_slices][M][2]: Σ G, and Σ ∂L/∂logit · act
};

// Tiles of 16 keys in a warp of grad_keys: as many as leave no register to spill.
template <class T, class Activation, int G>
constexpr int kGradTiles = !is_half<T> || G == 8 ? 1
                           : G == 4              ? 2
                                                 : (G == 2 ? 4 : 3) - (std::is_same_v<Activation, Gelu> ? 1 : 0);

// Groups of columns whose gradients fit in registers at a time; for the others the loop over the pairs is repeated.
template <class T, int G>
constexpr int kGradGroups = sizeof(T) == 8 ? 2 : G;

// ∂L/∂P to ∂L/∂logit in args.logits, P in its place.
template <class T>
void softmax_backward(const HdimGradPairs& args, const PairSizes& sizes, void* stream);

// ∂L/∂k, and what reaches q through |q−k|.
template <class T, class Activation, int G>
void grad_keys(const HdimGradPairs& args, const Packed<T>& packed, const PairSizes& sizes, const GradPlan& plan,
               const GradPartials<T>& to, void* stream);

// ∂L/∂W1, ∂L/∂b1, ∂L/∂w2, and what reaches q in every other way.
template <class T, class Activation, int G>
void grad_weights(const HdimGradPairs& args, const Packed<T>& packed, const PairSizes& sizes, const GradPlan& plan,
                  const GradPartials<T>& to, void* stream);

// Adds up the partial sums.
template <class T>
void finish(const HdimGradPairs& args, const Packed<T>& packed, const PairSizes& sizes, const GradPlan& plan,
            const GradPartials<T>& from, void* stream);

}  // namespace xlayer::cuda::hdim

// Every combination that dispatch_pair_types() may ask for; expands XLAYER_HDIM_INSTANCE(T, Activation, G).
#define XLAYER_HDIM_ACTIVATIONS(T, G) XLAYER_HDIM_INSTANCE(T, Relu, G) XLAYER_HDIM_INSTANCE(T, Gelu, G)
#define XLAYER_HDIM_INSTANCES            \
    XLAYER_HDIM_ACTIVATIONS(double, 4)   \
    XLAYER_HDIM_ACTIVATIONS(double, 8)   \
    XLAYER_HDIM_ACTIVATIONS(float, 4)    \
    XLAYER_HDIM_ACTIVATIONS(float, 8)    \
    XLAYER_HDIM_ACTIVATIONS(tf32, 4)     \
    XLAYER_HDIM_ACTIVATIONS(tf32, 8)     \
    XLAYER_HDIM_ACTIVATIONS(bfloat16, 2) \
    XLAYER_HDIM_ACTIVATIONS(bfloat16, 3) \
    XLAYER_HDIM_ACTIVATIONS(bfloat16, 4) \
    XLAYER_HDIM_ACTIVATIONS(bfloat16, 8) \
    XLAYER_HDIM_ACTIVATIONS(float16, 2)  \
    XLAYER_HDIM_ACTIVATIONS(float16, 3)  \
    XLAYER_HDIM_ACTIVATIONS(float16, 4)  \
    XLAYER_HDIM_ACTIVATIONS(float16, 8)
