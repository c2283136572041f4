// ∂L/∂W1, ∂L/∂b1, ∂L/∂w2, and the part of ∂L/∂q that does not come through |q−k|.
//
// A warp owns 16 hidden units and loops over a slice of the queries and the keys in shared memory, scoring them with
// hidden units along the rows: so the gradient G = ∂L/∂logit · act'(pre), rounded, is an A fragment whose columns are
// keys, and two products with keys and distances give, for a query,
//
//   X = Σ_j G_j k_j      Y = Σ_j G_j |q−k_j|      S = Σ_j G_j
//
// from which everything follows, w2 being a factor of whole rows:
//
//   ∂Wa = S qᵀ    ∂Wb = X    ∂Wc = X∘q    ∂Wd = Y    ∂q = w2·(Wc∘X + Wa·S), summed over hidden units
//
// Y accumulates over all queries in registers.
#include "cuda/hdim/backward.cuh"

namespace xlayer::cuda::hdim {
namespace {

template <class T>
struct GradWeights {
    Packed<T> packed;
    PairSizes sizes;
    GradPlan plan;
    GradPartials<T> to;
    const Accumulator<T>* grad_logits;
};

// A warp's own shared memory: its weights, and the sums for Wa, Wb and Wc.
template <class T, int G>
struct WarpSmem {
    static constexpr int kPitch = tile_pitch(kWeightBlocks * G);
    alignas(16) T weight[16 * kPitch];
    alignas(16) Accumulator<T> sum[3][16][tile_pitch(G)];
};

template <class T, int G>
constexpr int kBlockWarps = sizeof(WarpSmem<T, G>) <= 16 * 1024   ? 4
                            : sizeof(WarpSmem<T, G>) <= 32 * 1024 ? 2
                                                                  : 1;  // warps of a block

// Whether a warp's weights and the query stay in registers; else they are read again where they are used.
template <class T, int G>
constexpr bool kWeightsInRegisters = is_half<T>;

// pre += [Wb | Wc | Wd] · [k | q∘k | |q−k|]ᵀ for 8 keys, whose tile begins at `keys`. weight(g) is group g of the 3G.
template <class T, int G, class Weight, class Query>
__device__ __forceinline__ void score_keys(FragmentC<T>& pre, const Weight& weight, const Query& query, const T* keys) {
    if constexpr (is_half<T>) {
        FragmentA<T> weights[3 * G];
        FragmentB<T> key[G], features[3 * G];
        load_b_from_rows(key, keys, tile_pitch(G));
#pragma unroll
        for (int g = 0; g < 3 * G; ++g) weights[g] = weight(g);
#pragma unroll
        for (int g = 0; g < G; ++g) {
            features[g] = key[g];
            features[G + g] = {product<T>(key[g].at, query(g))};
            features[2 * G + g] = {distance<T>(key[g].at, query(g))};
        }
        multiply(pre, weights, features);
    } else {
#pragma unroll(sizeof(T) == 8 || G == 8 ? 1 : G)
        for (int g = 0; g < G; ++g) {
            const Pair<T> q = query(g);
            FragmentB<T> key[1];
            load_b_from_rows(key, keys + 8 * g, tile_pitch(G));
            multiply_group(pre, weight(g), key[0]);
            multiply_group(pre, weight(G + g), {product<T>(key[0].at, q)});
            multiply_group(pre, weight(2 * G + g), {distance<T>(key[0].at, q)});
        }
    }
}

template <class A>
__device__ __forceinline__ void add_pair(A* to, A first, A second) {
    const Vector<A, 2> before = load_vec<2>(to);
    store_vec<Space::generic>(to, Vector<A, 2>{{before.at[0] + first, before.at[1] + second}});
}

// resources: hdim_grad_weights_kernel<*float16, *, [23]> threads 128, registers 168, shared 64512, occupancy 0.125
// resources: hdim_grad_weights_kernel<*float16, *, 4> threads 128, registers 168, shared 80384, occupancy 0.125
// resources: hdim_grad_weights_kernel<[ft]*, *, 4> threads 128, registers 255, shared 96256, occupancy 0.0625
// resources: hdim_grad_weights_kernel<double, *, 8> threads 32, registers 255, shared 92160, occupancy 0.015625
// resources: hdim_grad_weights_kernel threads 64, registers 255, shared 96256, occupancy 0.03125
// sass: hdim_grad_weights_kernel<*float16, *> HMMA.16816, LDSM, LDGSTS.128
// sass: hdim_grad_weights_kernel<float, *> HMMA.1688, LDGSTS.128
// sass: hdim_grad_weights_kernel<tf32, *> HMMA.1688, LDGSTS.128
// sass: hdim_grad_weights_kernel<double, *> DMMA, LDGSTS.128
template <class T, class Activation, int G>
__global__ void __launch_bounds__(kBlockWarps<T, G>* kWarpSize, kPairBlocks * 4 / kBlockWarps<T, G>)
    hdim_grad_weights_kernel(GradWeights<T> args) {
    using A = Accumulator<T>;
    constexpr int kKeyPitch = tile_pitch(G), kWeightPitch = WarpSmem<T, G>::kPitch,
                  kBlock = kBlockWarps<T, G> * kWarpSize;
    constexpr int kGroups = kGradGroups<T, G>;
    const Packed<T>& p = args.packed;
    const PairSizes& s = args.sizes;
    const GradPlan& plan = args.plan;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    WarpSmem<T, G>& smem = shared_memory<WarpSmem<T, G>>()[warp];
    T* const keys = reinterpret_cast<T*>(shared_memory<WarpSmem<T, G>>() + kBlockWarps<T, G>);

    const int64_t item = blockIdx.x, part = item % plan.weight_slices;
    const int64_t chunk = item / plan.weight_slices % plan.weight_chunks;
    const int64_t b = item / plan.weight_slices / plan.weight_chunks;
    const int64_t first = chunk * plan.weight_chunk, begin = part * plan.weight_slice;
    const int64_t end = begin + plan.weight_slice < s.queries ? begin + plan.weight_slice : s.queries;
    const int present = static_cast<int>(s.keys - first < plan.weight_chunk ? s.keys - first : plan.weight_chunk);
    const int count = static_cast<int>(round_up(present, 16));
    const int64_t tile = static_cast<int64_t>(blockIdx.y) * kBlockWarps<T, G> + warp, unit = 16 * tile;

    copy_rows(keys, kKeyPitch, p.key + (b * s.keys + first) * 8 * G, 8 * G, count, present, 8 * G,
              static_cast<int>(threadIdx.x), kBlock);
    if (unit < s.hidden)
        copy_rows(smem.weight, kWeightPitch, p.weight + unit * kWeightBlocks * 8 * G, kWeightBlocks * 8 * G, 16, 16,
                  kWeightBlocks * 8 * G, lane_id(), kWarpSize);
    wait_copies<0>();
    sync_block();
    if (unit >= s.hidden) return;

    FragmentA<T> held[kWeightsInRegisters<T, G> ? 3 * G : 1];
    if constexpr (kWeightsInRegisters<T, G>) load_a(held, smem.weight, kWeightPitch);
    auto weight = [&](int g) {
        if constexpr (kWeightsInRegisters<T, G>) return held[g];
        FragmentA<T> group[1];
        load_a(group, smem.weight + 8 * g, kWeightPitch);
        return group[0];
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int g = 0; g < G; ++g) {
#pragma unroll
            for (int which = 0; which < 3; ++which)
                store_vec<Space::generic>(&smem.sum[which][lane_row() + 8 * h][8 * g + lane_column()], Vector<A, 2>{});
        }
    }
    const A weight2[2] = {p.weight2[unit + lane_row()], p.weight2[unit + lane_row() + 8]};
    for (int first_group = 0; first_group < G; first_group += kGroups) {
        FragmentC<T> of_distance[kGroups] = {};
        A of_hidden[2] = {}, of_weight2[2] = {};

        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = b * s.queries + i;
            const T* const query_row = p.query + row * 8 * G;
            const QueryRow<T, G, kWeightsInRegisters<T, G>> query(query_row);
            Pair<T> across[kWeightsInRegisters<T, G> ? kGroups : 1];  // columns g, each twice
#pragma unroll
            for (int g = 0; g < kGroups && kWeightsInRegisters<T, G>; ++g)
                across[g] = load_twice(query_row + 8 * g + lane_row());
            const A* const grad_row = args.grad_logits + row * s.pitch + first + lane_column();
            const A u[2] = {p.query_hidden[row * s.hidden + unit + lane_row()],
                            p.query_hidden[row * s.hidden + unit + lane_row() + 8]};
            FragmentC<T> of_key[kGroups] = {};
            A of_query[2] = {};
#pragma unroll 1
            for (int j = 0; j < count; j += 16) {
                const Vector<A, 2> grad_logit[2] = {load_vec<2>(grad_row + j), load_vec<2>(grad_row + j + 8)};
                const bool any = grad_logit[0].at[0] != 0 || grad_logit[0].at[1] != 0 || grad_logit[1].at[0] != 0 ||
                                 grad_logit[1].at[1] != 0;
                if (ballot(any) == 0) continue;  // masked, all of them
                if constexpr (!kWeightsInRegisters<T, G>)
                    sync_warp();  // else the compiler moves the weights out of the loop
                const T* const tile_of_keys = keys + j * kKeyPitch;
                FragmentA<T> grad_hidden[2];
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    FragmentC<T> pre{{u[0], u[0], u[1], u[1]}};
                    score_keys<T, G>(pre, weight, query, tile_of_keys + 8 * n * kKeyPitch);
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const A grad = grad_logit[n].at[e % 2];
                        of_weight2[e / 2] += grad * Activation::value(pre.at[e]);
                        pre.at[e] = grad * Activation::slope(pre.at[e]);
                        of_query[e / 2] += pre.at[e];
                    }
                    grad_hidden[n] = round_to_a<T>(pre);
                }
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    FragmentB<T> key[2];
                    const Pair<T> here = kWeightsInRegisters<T, G>
                                             ? across[kWeightsInRegisters<T, G> ? g : 0]
                                             : load_twice(query_row + 8 * (first_group + g) + lane_row());
                    load_b(key, tile_of_keys + 8 * (first_group + g), kKeyPitch);
                    multiply(of_key[g], grad_hidden, key);
#pragma unroll
                    for (int n = 0; n < 2; ++n) key[n] = {distance<T>(key[n].at, here)};
                    multiply(of_distance[g], grad_hidden, key);
                }
            }

#pragma unroll
            for (int h = 0; h < 2; ++h) {
                of_query[h] = add_over_columns(of_query[h]);
                of_hidden[h] += of_query[h];
            }
            A* const to = args.to.query_of_weights +
                          (((b * plan.weight_chunks + chunk) * plan.weight_tiles + tile) * s.queries + i) * 8 * G +
                          8 * first_group + lane_column();
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                FragmentA<T> hadamard[1], direct[1];
                load_a(hadamard, smem.weight + 8 * (G + first_group + g), kWeightPitch);
                load_a(direct, smem.weight + 8 * (3 * G + first_group + g), kWeightPitch);
                const A q[2] = {element<T>(query(first_group + g), 0), element<T>(query(first_group + g), 1)};
                A grad_query[2] = {};
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const A x[2] = {of_key[g].at[2 * h], of_key[g].at[2 * h + 1]};
                    A* const place = &smem.sum[0][lane_row() + 8 * h][8 * (first_group + g) + lane_column()];
                    add_pair(place, of_query[h] * q[0], of_query[h] * q[1]);
                    add_pair(place + 16 * tile_pitch(G), x[0], x[1]);
                    add_pair(place + 2 * 16 * tile_pitch(G), x[0] * q[0], x[1] * q[1]);
#pragma unroll
                    for (int c = 0; c < 2; ++c)
                        grad_query[c] += weight2[h] * (element<T>(hadamard[0].row[h], c) * x[c] +
                                                       element<T>(direct[0].row[h], c) * of_query[h]);
                }
                const Vector<A, 2> sum{{add_over_rows(grad_query[0]), add_over_rows(grad_query[1])}};
                if (lane_row() == 0) store_vec(to + 8 * g, sum);
                sync_warp();  // matrix instructions want the warp back together
            }
        }

#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t m = unit + lane_row() + 8 * h;
            A* const weight = args.to.weight + (item * s.hidden + m) * 4 * 8 * G + 8 * first_group + lane_column();
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
#pragma unroll
                for (int which = 0; which < 3; ++which)
                    store_vec(weight + which * 8 * G + 8 * g,
                              load_vec<2>(&smem.sum[which][lane_row() + 8 * h][8 * (first_group + g) + lane_column()]));
                store_vec(weight + 3 * 8 * G + 8 * g,
                          Vector<A, 2>{{of_distance[g].at[2 * h], of_distance[g].at[2 * h + 1]}});
            }
            const A slope = add_over_columns(of_weight2[h]);
            if (lane_column() == 0)
                store_vec(args.to.hidden + (item * s.hidden + m) * 2, Vector<A, 2>{{of_hidden[h], slope}});
        }
    }
}

}  // namespace

template <class T, class Activation, int G>
void grad_weights(const HdimGradPairs& args, const Packed<T>& packed, const PairSizes& s, const GradPlan& plan,
                  const GradPartials<T>& to, void* stream) {
    const GradWeights<T> pairs{packed, s, plan, to, static_cast<const Accumulator<T>*>(args.logits)};
    const size_t keys = static_cast<size_t>(plan.weight_chunk) * tile_pitch(G) * sizeof(T);
    launch("hdim_grad_weights", hdim_grad_weights_kernel<T, Activation, G>,
           {s.batch * plan.weight_chunks * plan.weight_slices, kBlockWarps<T, G> * kWarpSize, stream,
            kBlockWarps<T, G> * sizeof(WarpSmem<T, G>) + keys, ceil_div(plan.weight_tiles, kBlockWarps<T, G>)},
           pairs);
}

#define XLAYER_HDIM_INSTANCE(T, Activation, G)                                                             \
    template void grad_weights<T, Activation, G>(const HdimGradPairs&, const Packed<T>&, const PairSizes&, \
                                                 const GradPlan&, const GradPartials<T>&, void*);
XLAYER_HDIM_INSTANCES
#undef XLAYER_HDIM_INSTANCE

}  // namespace xlayer::cuda::hdim
