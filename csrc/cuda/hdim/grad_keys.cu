// ∂L/∂k, and the part of ∂L/∂q that comes through |q−k|.
//
// A warp keeps 16·R keys and their gradients in registers and loops over a slice of the queries. Per query and 16
// hidden units it recomputes pre, turns it into the gradient G = ∂L/∂logit · w2 · act'(pre), which rounded is already
// an A fragment, and multiplies that with the weights:
//
//   ∂L/∂k_j      = Σ_i G_ij · (Wc∘q_i + Wb)   accumulates over all queries in the tensor cores
//   ∂L/∂|q−k|    = G_ij · Wd                  goes to q and k with the sign of q − k, which is 0 where they are equal
#include "cuda/hdim/backward.cuh"

namespace xlayer::cuda::hdim {
namespace {

template <class T>
struct GradKeys {
    using A = Accumulator<T>;
    Packed<T> packed;
    PairSizes sizes;
    const A* grad_logits;
    A *grad_query, *grad_key;
    PairTiling tiling;
};

// Whether the keys, and the query at hand, stay in registers; else they are read again from shared memory where they
// are used.
template <class T, int G>
constexpr bool kKeysInRegisters = is_half<T>;

// Adds the gradient of |q−k| to both.
template <class A>
__device__ __forceinline__ void split_distance(A grad, A query, A key, A& grad_query, A& grad_key) {
    const A signed_grad = query > key ? grad : query < key ? -grad : A(0);
    grad_query += signed_grad;
    grad_key -= signed_grad;
}

// Stores a sum or adds it to that of the chunks of hidden units before.
template <class A>
__device__ __forceinline__ void add_or_store(A* to, const Vector<A, 2>& sum, bool add) {
    Vector<A, 2> before{};
    if (add) before = load_vec<2>(to);
    store_vec(to, Vector<A, 2>{{before.at[0] + sum.at[0], before.at[1] + sum.at[1]}});
}

// ∂L/∂logit of a warp's keys with one query; true if any is not 0.
template <class A, int R>
__device__ __forceinline__ bool load_grad_logits(A (&to)[R][2], const A* row, int64_t first, int64_t pitch) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t j = first + 16 * r + lane_row() + 8 * h;
            to[r][h] = j < pitch ? row[j] : A(0);
            any = any || to[r][h] != 0;
        }
    }
    return ballot(any) != 0;
}

// A warp's operands for the current query.
template <class T, class Activation, int G>
struct QueryTile {
    using A = Accumulator<T>;
    static constexpr int kTiles = kGradTiles<T, Activation, G>, kGroups = kGradGroups<T, G>;
    using Memory = TilingSmem<T, G, kTiles>;
    using Keys = KeyTiles<T, G, kTiles, kKeysInRegisters<T, G>>;

    const Memory& memory;
    const Keys& keys;
    const T* row;
    QueryRow<T, G, kKeysInRegisters<T, G>> query;
    PairFeatures<T, G, kTiles> features;

    __device__ __forceinline__ QueryTile(const Memory& memory_, const Keys& keys_, const T* row_)
        : memory(memory_), keys(keys_), row(row_), query(row_), features(keys_, query) {}

    // G of 16 hidden units from `m` of the chunk on; `u` is the query's own part of them.
    __device__ __forceinline__ void grad_hidden(FragmentA<T> (&to)[kTiles][2], const A (&grad_logit)[kTiles][2],
                                                const A* u, int m) const {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int unit = m + 8 * n;
            const Vector<A, 2> start = load_vec<2>(u + unit + lane_column());
            const Vector<A, 2> w2 = load_vec<2>(memory.weight2 + unit + lane_column());
            FragmentC<T> pre[kTiles];
#pragma unroll
            for (int r = 0; r < kTiles; ++r) pre[r] = {{start.at[0], start.at[1], start.at[0], start.at[1]}};
            add_scores(pre, keys, features, memory.weights + unit * memory.kPitch, memory.kPitch, query);
#pragma unroll
            for (int r = 0; r < kTiles; ++r) {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    pre[r].at[e] = grad_logit[r][e / 2] * w2.at[e % 2] * Activation::slope(pre[r].at[e]);
                to[r][n] = round_to_a<T>(pre[r]);
            }
        }
    }

    // G times the weights of these hidden units, for the columns from group `first_group` on.
    __device__ __forceinline__ void add_products(FragmentC<T> (&grad_key)[kTiles][kGroups],
                                                 FragmentC<T> (&grad_distance)[kTiles][kGroups],
                                                 const FragmentA<T> (&grad_hidden)[kTiles][2], int m,
                                                 int first_group) const {
        const T* const weights = memory.weights + m * memory.kPitch + 8 * first_group;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            const Pair<T> here = load_twice(row + 8 * (first_group + g) + lane_row());
            FragmentB<T> linear[2], hadamard[2], difference[2];
            load_b(linear, weights + 8 * g, memory.kPitch);
            load_b(hadamard, weights + 8 * (G + g), memory.kPitch);
            load_b(difference, weights + 8 * (2 * G + g), memory.kPitch);
#pragma unroll
            for (int n = 0; n < 2; ++n) linear[n] = {multiply_add<T>(hadamard[n].at, here, linear[n].at)};
#pragma unroll
            for (int r = 0; r < kTiles; ++r) {
                multiply(grad_key[r][g], grad_hidden[r], linear);
                multiply(grad_distance[r][g], grad_hidden[r], difference);
            }
        }
    }

    __device__ __forceinline__ void split_distances(const FragmentC<T> (&grad_distance)[kTiles][kGroups],
                                                    A (&grad_query)[kGroups][2],
                                                    FragmentC<T> (&grad_key)[kTiles][kGroups], int first_group) const {
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                const FragmentA<T> key = keys(r, first_group + g);
                const Pair<T> q = query(first_group + g);
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    split_distance(grad_distance[r][g].at[e], element<T>(q, e % 2), element<T>(key.row[e / 2], e % 2),
                                   grad_query[g][e % 2], grad_key[r][g].at[e]);
            }
        }
    }
};

// resources: hdim_grad_keys_kernel threads 128, registers 255, shared 67584, occupancy 0.125
// sass: hdim_grad_keys_kernel<*float16, *> HMMA.16816, LDSM, LDGSTS.128
// sass: hdim_grad_keys_kernel<float, *> HMMA.1688, LDGSTS.128
// sass: hdim_grad_keys_kernel<tf32, *> HMMA.1688, LDGSTS.128
// sass: hdim_grad_keys_kernel<double, *> DMMA, LDGSTS.128
template <class T, class Activation, int G>
__global__ void __launch_bounds__(kThreads, kPairBlocks) hdim_grad_keys_kernel(GradKeys<T> args) {
    using A = Accumulator<T>;
    using Query = QueryTile<T, Activation, G>;
    constexpr int kTiles = Query::kTiles, kGroups = Query::kGroups;
    const Packed<T>& p = args.packed;
    const PairSizes& s = args.sizes;
    const WarpTile tile(args.tiling, s, 16 * kTiles);
    const typename Query::Memory memory(args.tiling.hidden_chunk);
    memory.load_keys(p, s, tile);
    const typename Query::Keys keys(memory);

    for (int first_group = 0; first_group < G; first_group += kGroups) {
        FragmentC<T> grad_key[kTiles][kGroups] = {};
        for (int chunk = 0; chunk < s.hidden; chunk += args.tiling.hidden_chunk) {
            const int count = s.hidden - chunk < args.tiling.hidden_chunk ? s.hidden - chunk : args.tiling.hidden_chunk;
            memory.load_weights(p, chunk, count);

            for (int64_t i = tile.begin; i < tile.end; ++i) {
                const int64_t row = tile.b * s.queries + i;
                A grad_logit[kTiles][2], grad_query[kGroups][2] = {};
                if (load_grad_logits(grad_logit, args.grad_logits + row * s.pitch, tile.first, s.pitch)) {
                    const Query at(memory, keys, p.query + row * 8 * G);
                    FragmentC<T> grad_distance[kTiles][kGroups] = {};
#pragma unroll 1
                    for (int m = 0; m < count; m += 16) {
                        if constexpr (!kKeysInRegisters<T, G>)
                            sync_warp();  // else the compiler moves the keys out of the loop
                        FragmentA<T> grad_hidden[kTiles][2];
                        at.grad_hidden(grad_hidden, grad_logit, p.query_hidden + row * s.hidden + chunk, m);
                        at.add_products(grad_key, grad_distance, grad_hidden, m, first_group);
                    }
                    at.split_distances(grad_distance, grad_query, grad_key, first_group);
                }

                A* const to = args.grad_query +
                              ((tile.b * args.tiling.key_tiles + tile.key_tile) * s.queries + i) * 8 * G +
                              8 * first_group + lane_column();
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    const Vector<A, 2> sum{{add_over_rows(grad_query[g][0]), add_over_rows(grad_query[g][1])}};
                    if (lane_row() == 0) add_or_store(to + 8 * g, sum, chunk > 0);
                }
                sync_warp();  // matrix instructions want the warp back together
            }
        }

        A* const to =
            args.grad_key + (tile.b * args.tiling.query_slices + tile.query_slice) * s.keys * 8 * G + 8 * first_group;
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int j = 16 * r + lane_row() + 8 * h;
                if (j >= tile.valid_keys) continue;
#pragma unroll
                for (int g = 0; g < kGroups; ++g)
                    store_vec(to + (tile.first + j) * 8 * G + 8 * g + lane_column(),
                              Vector<A, 2>{{grad_key[r][g].at[2 * h], grad_key[r][g].at[2 * h + 1]}});
            }
        }
    }
}

}  // namespace

template <class T, class Activation, int G>
void grad_keys(const HdimGradPairs& args, const Packed<T>& packed, const PairSizes& s, const GradPlan& plan,
               const GradPartials<T>& to, void* stream) {
    constexpr int kTiles = kGradTiles<T, Activation, G>;
    const GradKeys<T> pairs{packed, s,        static_cast<const Accumulator<T>*>(args.logits), to.query_of_pairs,
                            to.key, plan.keys};
    launch("hdim_grad_keys", hdim_grad_keys_kernel<T, Activation, G>,
           pair_tiling_launch<T, G, kTiles>(s, plan.keys, stream), pairs);
}

#define XLAYER_HDIM_INSTANCE(T, Activation, G)                                                          \
    template void grad_keys<T, Activation, G>(const HdimGradPairs&, const Packed<T>&, const PairSizes&, \
                                              const GradPlan&, const GradPartials<T>&, void*);
XLAYER_HDIM_INSTANCES
#undef XLAYER_HDIM_INSTANCE

}  // namespace xlayer::cuda::hdim
