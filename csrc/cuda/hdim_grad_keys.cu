// ∂L/∂k, and the part of ∂L/∂q that comes through |q−k|.
//
// A warp keeps 16·R keys and their gradients in registers and walks over a slice of the queries. Per query and 16
// hidden units it scores the pairs again, turns the sum into the gradient G = ∂L/∂logit · w2 · act'(pre), which rounded
// is already a left operand, and multiplies that with the weights:
//
//   ∂L/∂k_j      = Σ_i G_ij · (Wc∘q_i + Wb)   accumulates over all queries in the tensor cores
//   ∂L/∂|q−k|    = G_ij · Wd                  goes to q and k with the sign of q − k, which is 0 where they are equal
//
// Per pair 2·3D·M and 2·2D·M tensor flops, some 5·M + 9·D other operations, 4 bytes read. D = 24, M = 96 on an H200,
// where mma.sync may reach 600 TFLOP/s: tensor cores 38 ps, other units 21 ps, shared memory 16 ps: bound by the tensor
// cores.
#include "hdim_backward.cuh"

namespace xlayer::cuda {
namespace {

template <class T>
struct GradKeys {
    using A = Accumulator<T>;
    Packed<T> packed;
    PairSizes sizes;
    const A* grad_logits;
    A *grad_query, *grad_key;
    int64_t tiles, slices, slice;
    int chunk;  // hidden units in shared memory at a time
};

// Whether the keys, and the query at hand, stay in registers; else they are read again from shared memory where they
// are used.
template <class T, int G>
constexpr bool kHoldsKeys = is_half<T>;

template <class T, int G>
constexpr size_t grad_weight_bytes(int chunk) {
    return chunk * (tile_pitch(3 * G) * sizeof(T) + sizeof(Accumulator<T>));
}

// Adds the gradient of |q−k| to both.
template <class A>
__device__ __forceinline__ void split_distance(A grad, A query, A key, A& grad_query, A& grad_key) {
    const A signed_grad = query > key ? grad : query < key ? -grad : A(0);
    grad_query += signed_grad;
    grad_key -= signed_grad;
}

// resources: hdim_grad_keys_kernel threads 128, registers 255, shared 67584, occupancy 0.125
// sass: hdim_grad_keys_kernel<*float16, *> HMMA.16816, LDSM, LDGSTS.128
// sass: hdim_grad_keys_kernel<float, *> HMMA.1688, LDGSTS.128
// sass: hdim_grad_keys_kernel<tf32, *> HMMA.1688, LDGSTS.128
// sass: hdim_grad_keys_kernel<double, *> DMMA, LDGSTS.128
template <class T, class Activation, int G>
__global__ void __launch_bounds__(kThreads, kPairBlocks) hdim_grad_keys_kernel(GradKeys<T> args) {
    using A = Accumulator<T>;
    constexpr int kTiles = kGradTiles<T, Activation, G>, kKeys = 16 * kTiles, kGroups = kGradGroups<T, G>;
    constexpr int kPitch = tile_pitch(3 * G), kKeyPitch = tile_pitch(G);
    const Packed<T>& p = args.packed;
    const PairSizes& s = args.sizes;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    T* const weights = shared_memory<T>();
    A* const weight2 = reinterpret_cast<A*>(weights + args.chunk * kPitch);
    T* const key_tile = reinterpret_cast<T*>(weight2 + args.chunk) + warp * kKeys * kKeyPitch;

    const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
    const int64_t tile = item % args.tiles, part = item / args.tiles % args.slices, b = item / args.tiles / args.slices;
    const int64_t begin = part * args.slice, first = tile * kKeys;
    const int64_t end = b >= s.batch ? begin : begin + args.slice < s.queries ? begin + args.slice : s.queries;
    const int present = b < s.batch ? static_cast<int>(s.keys - first < kKeys ? s.keys - first : kKeys) : 0;

    copy_rows(key_tile, kKeyPitch, p.key + (b * s.keys + first) * 8 * G, 8 * G, kKeys, present, 8 * G, lane_id(),
              kWarp);
    wait_copies<0>();
    sync_warp();
    Left<T> held[kTiles][G];
    if constexpr (kHoldsKeys<T, G>) {
#pragma unroll
        for (int r = 0; r < kTiles; ++r) load_left(held[r], key_tile + 16 * r * kKeyPitch, kKeyPitch);
    }
    auto keys = [&](int r, int g) {
        if constexpr (kHoldsKeys<T, G>) return held[r][g];
        Left<T> group[1];
        load_left(group, key_tile + 16 * r * kKeyPitch + 8 * g, kKeyPitch);
        return group[0];
    };

    for (int walk = 0; walk < G; walk += kGroups) {
        Sum<T> grad_key[kTiles][kGroups] = {};
        for (int chunk = 0; chunk < s.hidden; chunk += args.chunk) {
            const int count = s.hidden - chunk < args.chunk ? s.hidden - chunk : args.chunk;
            if (walk + chunk > 0) sync_block();  // the last weights are no longer needed
            copy_rows(weights, kPitch, p.weight + static_cast<int64_t>(chunk) * kWeightBlocks * 8 * G,
                      kWeightBlocks * 8 * G, count, count, 3 * 8 * G, static_cast<int>(threadIdx.x), kThreads);
            for (int m = static_cast<int>(threadIdx.x); m < count; m += kThreads) weight2[m] = p.weight2[chunk + m];
            wait_copies<0>();
            sync_block();

            for (int64_t i = begin; i < end; ++i) {
                const int64_t row = b * s.queries + i;
                A grad_logit[kTiles][2];
                bool any = false;
#pragma unroll
                for (int r = 0; r < kTiles; ++r) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int64_t j = first + 16 * r + lane_row() + 8 * h;
                        grad_logit[r][h] = j < s.pitch ? args.grad_logits[row * s.pitch + j] : A(0);
                        any = any || grad_logit[r][h] != 0;
                    }
                }

                A grad_query[kGroups][2] = {};
                if (ballot(any) != 0) {  // else masked, all of them
                    const T* const query_row = p.query + row * 8 * G;
                    const QueryRow<T, G, kHoldsKeys<T, G>> query(query_row);
                    const PairFeatures<T, G, kTiles> features(keys, query);

                    Sum<T> grad_distance[kTiles][kGroups] = {};
                    const A* const hidden = p.query_hidden + row * s.hidden + chunk + lane_column();
#pragma unroll 1
                    for (int m = 0; m < count; m += 16) {
                        const T* const slab = weights + m * kPitch;
                        if constexpr (!kHoldsKeys<T, G>)
                            sync_warp();  // else the compiler moves the keys out of the loop
                        Left<T> grad_hidden[kTiles][2];
#pragma unroll
                        for (int n = 0; n < 2; ++n) {
                            const Vector<A, 2> u = load<2>(hidden + m + 8 * n);
                            const Vector<A, 2> w2 = load<2>(weight2 + m + 8 * n + lane_column());
                            Sum<T> pre[kTiles];
#pragma unroll
                            for (int r = 0; r < kTiles; ++r) pre[r] = {{u.at[0], u.at[1], u.at[0], u.at[1]}};
                            add_scores(pre, keys, features, slab + 8 * n * kPitch, kPitch, query);
#pragma unroll
                            for (int r = 0; r < kTiles; ++r) {
#pragma unroll
                                for (int e = 0; e < 4; ++e)
                                    pre[r].at[e] =
                                        grad_logit[r][e / 2] * w2.at[e % 2] * Activation::slope(pre[r].at[e]);
                                grad_hidden[r][n] = round_to_left<T>(pre[r]);
                            }
                        }
#pragma unroll
                        for (int g = 0; g < kGroups; ++g) {
                            const Pair<T> here = load_twice(query_row + 8 * (walk + g) + lane_row());
                            Right<T> linear[2], hadamard[2], difference[2];
                            load_right(linear, slab + 8 * (walk + g), kPitch);
                            load_right(hadamard, slab + 8 * (G + walk + g), kPitch);
                            load_right(difference, slab + 8 * (2 * G + walk + g), kPitch);
#pragma unroll
                            for (int n = 0; n < 2; ++n)
                                linear[n] = {multiply_add<T>(hadamard[n].at, here, linear[n].at)};
#pragma unroll
                            for (int r = 0; r < kTiles; ++r) {
                                multiply(grad_key[r][g], grad_hidden[r], linear);
                                multiply(grad_distance[r][g], grad_hidden[r], difference);
                            }
                        }
                    }
#pragma unroll
                    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
                        for (int g = 0; g < kGroups; ++g) {
                            const Left<T> key = keys(r, walk + g);
                            const Pair<T> other = query(walk + g);
#pragma unroll
                            for (int e = 0; e < 4; ++e)
                                split_distance(grad_distance[r][g].at[e], element<T>(other, e % 2),
                                               element<T>(key.row[e / 2], e % 2), grad_query[g][e % 2],
                                               grad_key[r][g].at[e]);
                        }
                    }
                }

                A* const to =
                    args.grad_query + ((b * args.tiles + tile) * s.queries + i) * 8 * G + 8 * walk + lane_column();
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    Vector<A, 2> sum{{add_over_rows(grad_query[g][0]), add_over_rows(grad_query[g][1])}};
                    if (lane_row() == 0) {
                        if (chunk > 0) {
                            const Vector<A, 2> before = load<2>(to + 8 * g);
                            sum = {{before.at[0] + sum.at[0], before.at[1] + sum.at[1]}};
                        }
                        store(to + 8 * g, sum);
                    }
                }
                sync_warp();  // matrix instructions want the warp back together
            }
        }

        if (b >= s.batch) continue;
        A* const to = args.grad_key + (b * args.slices + part) * s.keys * 8 * G + 8 * walk + lane_column();
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int64_t j = first + 16 * r + lane_row() + 8 * h;
                if (j >= s.keys) continue;
#pragma unroll
                for (int g = 0; g < kGroups; ++g)
                    store(to + j * 8 * G + 8 * g,
                          Vector<A, 2>{{grad_key[r][g].at[2 * h], grad_key[r][g].at[2 * h + 1]}});
            }
        }
    }
}

}  // namespace

template <class T, class Activation, int G>
void grad_keys(const HdimGradPairs& args, const Packed<T>& packed, const PairSizes& s, const GradPlan& plan,
               const GradPartials<T>& to, void* stream) {
    const int most = static_cast<int>(kWeightBytes / grad_weight_bytes<T, G>(1) / 16 * 16);
    const GradKeys<T> pairs{packed,
                            s,
                            static_cast<const Accumulator<T>*>(args.logits),
                            to.query_of_pairs,
                            to.key,
                            plan.key_tiles,
                            plan.key_slices,
                            plan.key_slice,
                            most < s.hidden ? most : s.hidden};
    const size_t keys = size_t{16} * kGradTiles<T, Activation, G> * tile_pitch(G) * sizeof(T);
    launch("hdim_grad_keys", hdim_grad_keys_kernel<T, Activation, G>,
           {ceil_div(s.batch * plan.key_tiles * plan.key_slices, kWarps), kThreads, stream,
            grad_weight_bytes<T, G>(pairs.chunk) + kWarps * keys},
           pairs);
}

#define XLAYER_HDIM_INSTANCE(T, Activation, G)                                                          \
    template void grad_keys<T, Activation, G>(const HdimGradPairs&, const Packed<T>&, const PairSizes&, \
                                              const GradPlan&, const GradPartials<T>&, void*);
XLAYER_HDIM_INSTANCES
#undef XLAYER_HDIM_INSTANCE

}  // namespace xlayer::cuda
