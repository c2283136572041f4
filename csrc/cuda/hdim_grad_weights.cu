// ∂L/∂W1, ∂L/∂b1, ∂L/∂w2, and the part of ∂L/∂q that does not come through min(q, k).
//
// A warp owns 16 hidden units. Per query it makes its weights once, then walks over the keys in shared memory, scoring
// them with hidden units along the rows: so the gradient G = ∂L/∂logit · act'(pre), rounded, is a left operand whose
// columns are keys, and two products with keys and minima give, for this query,
//
//   X = Σ_j G_j k_j      Y += Σ_j G_j min(q, k_j)      S = Σ_j G_j
//
// from which everything follows, w2 being a factor of whole rows:
//
//   ∂Wa = S qᵀ    ∂Wb = X    ∂Wc = X∘q    ∂Wd = ∂Wa + ∂Wb − 2·Y    ∂q = w2·(Wc∘X + (Wa + Wd)·S), summed over hidden
//   units
//
// S sums the rounded G, so that what cancels in ∂Wd cancels exactly. Per pair 2·2D·M tensor flops twice, some 5·M +
// 2·D·M/16 other operations. D = 24, M = 96 on an H200: tensor cores 31 ps, other units 23 ps, shared memory 36 ps a
// pair: bound by shared memory, which every warp reads whole for its 16 hidden units.
#include "hdim_backward.cuh"

namespace xlayer::cuda {
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
struct Own {
    static constexpr int kPitch = tile_pitch(kWeightBlocks * G);
    alignas(16) T weight[16 * kPitch];
    alignas(16) Accumulator<T> sum[3][16][8 * G];
};

template <class T, int G>
constexpr int kOwners = sizeof(Own<T, G>) <= 16 * 1024   ? 4
                        : sizeof(Own<T, G>) <= 32 * 1024 ? 2
                                                         : 1;  // warps of a block

// Whether a warp's weights and the query stay in registers; else they are read again where they are used.
template <class T, int G>
constexpr bool kHoldsWeights = G * sizeof(T) <= 16;

// What a warp knows of the query at hand, and its weights for it.
template <class T, int G>
class QueryWeights {
  public:
    __device__ __forceinline__ QueryWeights(const Own<T, G>& own, const T* query) : own_(own), query_(query) {
        if constexpr (kHoldsWeights<T, G>) {
#pragma unroll
            for (int g = 0; g < G; ++g) {
                along_[g] = load_pair(query + 8 * g + lane_column());
                across_[g] = load_twice(query + 8 * g + lane_row());
                linear_[g] = make_linear(g, along_[g]);
            }
        }
    }
    // Columns 2t and 2t+1 of group g; column g twice; Wc∘q + Wb + Wd.
    __device__ __forceinline__ Pair<T> along(int g) const {
        if constexpr (kHoldsWeights<T, G>) return along_[g];
        return load_pair(query_ + 8 * g + lane_column());
    }
    __device__ __forceinline__ Pair<T> across(int g) const {
        if constexpr (kHoldsWeights<T, G>) return across_[g];
        return load_twice(query_ + 8 * g + lane_row());
    }
    __device__ __forceinline__ Left<T> linear(int g) const {
        if constexpr (kHoldsWeights<T, G>) return linear_[g];
        return make_linear(g, along(g));
    }

  private:
    __device__ __forceinline__ Left<T> make_linear(int g, const Pair<T>& query) const {
        Left<T> hadamard[1], rest[1];
        load_left(hadamard, own_.weight + 8 * g, Own<T, G>::kPitch);
        load_left(rest, own_.weight + 8 * (G + g), Own<T, G>::kPitch);
        return {{multiply_add<T>(hadamard[0].row[0], query, rest[0].row[0]),
                 multiply_add<T>(hadamard[0].row[1], query, rest[0].row[1])}};
    }

    static constexpr int kHeld = kHoldsWeights<T, G> ? G : 1;
    const Own<T, G>& own_;
    const T* query_;
    Pair<T> along_[kHeld], across_[kHeld];
    Left<T> linear_[kHeld];
};

// pre += weights · [k | min(q, k)]ᵀ for 8 keys, whose tile begins at `keys`. minimum(g) is group g of −2·Wd.
template <class T, int G, class Minimum>
__device__ __forceinline__ void score_keys(Sum<T>& pre, const QueryWeights<T, G>& query, const Minimum& minimum,
                                           const T* keys) {
    if constexpr (is_half<T>) {
        Left<T> weights[2 * G];
        Right<T> key[G], features[2 * G];
        load_right_from_rows(key, keys, tile_pitch(G));
#pragma unroll
        for (int g = 0; g < G; ++g) {
            weights[g] = query.linear(g);
            weights[G + g] = minimum(g);
            features[g] = key[g];
            features[G + g] = {smaller<T>(key[g].at, query.along(g))};
        }
        multiply(pre, weights, features);
    } else {
#pragma unroll(sizeof(T) == 8 ? 1 : G)
        for (int g = 0; g < G; ++g) {
            Right<T> key[1];
            load_right_from_rows(key, keys + 8 * g, tile_pitch(G));
            multiply_group(pre, query.linear(g), key[0]);
            multiply_group(pre, minimum(g), {smaller<T>(key[0].at, query.along(g))});
        }
    }
}

template <class A>
__device__ __forceinline__ void add_pair(A* to, A first, A second) {
    const Vector<A, 2> before = load<2>(to);
    store(to, Vector<A, 2>{{before.at[0] + first, before.at[1] + second}});
}

// resources: hdim_grad_weights_kernel<*float16, *, [23]> threads 128, registers 168, shared 64512, occupancy 0.125
// resources: hdim_grad_weights_kernel<*float16, *, 4> threads 128, registers 168, shared 74752, occupancy 0.125
// resources: hdim_grad_weights_kernel<float, *, 4> threads 128, registers 255, shared 92160, occupancy 0.0625
// resources: hdim_grad_weights_kernel<double, *, 8> threads 32, registers 255, shared 92160, occupancy 0.015625
// resources: hdim_grad_weights_kernel threads 64, registers 255, shared 92160, occupancy 0.03125
// sass: hdim_grad_weights_kernel<*float16, *> HMMA.16816, LDSM, LDGSTS.128
// sass: hdim_grad_weights_kernel<float, *> HMMA.1688, LDGSTS.128
// sass: hdim_grad_weights_kernel<double, *> DMMA, LDGSTS.128
template <class T, class Activation, int G>
__global__ void __launch_bounds__(kOwners<T, G>* kWarp, kGradBlocks * 4 / kOwners<T, G>)
    hdim_grad_weights_kernel(GradWeights<T> args) {
    using A = Accumulator<T>;
    constexpr int kKeyPitch = tile_pitch(G), kOwnPitch = Own<T, G>::kPitch, kBlock = kOwners<T, G> * kWarp;
    constexpr int kGroups = kGradGroups<T, G>;
    const Packed<T>& p = args.packed;
    const PairSizes& s = args.sizes;
    const GradPlan& plan = args.plan;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    Own<T, G>& own = shared_memory<Own<T, G>>()[warp];
    T* const keys = reinterpret_cast<T*>(shared_memory<Own<T, G>>() + kOwners<T, G>);

    const int64_t item = blockIdx.x, part = item % plan.weight_slices;
    const int64_t chunk = item / plan.weight_slices % plan.weight_chunks;
    const int64_t b = item / plan.weight_slices / plan.weight_chunks;
    const int64_t first = chunk * plan.weight_chunk, begin = part * plan.weight_slice;
    const int64_t end = begin + plan.weight_slice < s.queries ? begin + plan.weight_slice : s.queries;
    const int present = static_cast<int>(s.keys - first < plan.weight_chunk ? s.keys - first : plan.weight_chunk);
    const int count = static_cast<int>(round_up(present, 16));
    const int64_t tile = static_cast<int64_t>(blockIdx.y) * kOwners<T, G> + warp, unit = 16 * tile;

    copy_rows(keys, kKeyPitch, p.key + (b * s.keys + first) * 8 * G, 8 * G, count, present, 8 * G,
              static_cast<int>(threadIdx.x), kBlock);
    if (unit < s.hidden)
        copy_rows(own.weight, kOwnPitch, p.weight + unit * kWeightBlocks * 8 * G, kWeightBlocks * 8 * G, 16, 16,
                  kWeightBlocks * 8 * G, lane_id(), kWarp);
    wait_copies<0>();
    sync_block();
    if (unit >= s.hidden) return;

    Left<T> held[kHoldsWeights<T, G> ? G : 1];
    if constexpr (kHoldsWeights<T, G>) load_left(held, own.weight + 2 * 8 * G, kOwnPitch);
    auto minimum = [&](int g) {
        if constexpr (kHoldsWeights<T, G>) return held[g];
        Left<T> group[1];
        load_left(group, own.weight + 8 * (2 * G + g), kOwnPitch);
        return group[0];
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int g = 0; g < G; ++g) {
#pragma unroll
            for (int which = 0; which < 3; ++which)
                store(&own.sum[which][lane_row() + 8 * h][8 * g + lane_column()], Vector<A, 2>{});
        }
    }
    const A weight2[2] = {p.weight2[unit + lane_row()], p.weight2[unit + lane_row() + 8]};
    for (int walk = 0; walk < G; walk += kGroups) {
        Sum<T> of_min[kGroups] = {};
        A of_hidden[2] = {}, of_weight2[2] = {};

        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = b * s.queries + i;
            const QueryWeights<T, G> query(own, p.query + row * 8 * G);
            const A* const grad_row = args.grad_logits + row * s.pitch + first + lane_column();
            const A u[2] = {p.query_hidden[row * s.hidden + unit + lane_row()],
                            p.query_hidden[row * s.hidden + unit + lane_row() + 8]};
            Sum<T> of_key[kGroups] = {};
            A of_query[2] = {};
#pragma unroll 1
            for (int j = 0; j < count; j += 16) {
                const Vector<A, 2> grad_logit[2] = {load<2>(grad_row + j), load<2>(grad_row + j + 8)};
                const bool any = grad_logit[0].at[0] != 0 || grad_logit[0].at[1] != 0 || grad_logit[1].at[0] != 0 ||
                                 grad_logit[1].at[1] != 0;
                if (ballot(any) == 0) continue;                   // masked, all of them
                if constexpr (!kHoldsWeights<T, G>) sync_warp();  // else the compiler moves the weights out of the loop
                const T* const tile_of_keys = keys + j * kKeyPitch;
                Left<T> grad_hidden[2];
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    Sum<T> pre{{u[0], u[0], u[1], u[1]}};
                    score_keys(pre, query, minimum, tile_of_keys + 8 * n * kKeyPitch);
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const A grad = grad_logit[n].at[e % 2];
                        of_weight2[e / 2] += grad * Activation::value(pre.at[e]);
                        pre.at[e] = grad * Activation::slope(pre.at[e]);
                    }
                    grad_hidden[n] = round_to_left<T>(pre);
#pragma unroll
                    for (int e = 0; e < 4; ++e) of_query[e / 2] += element<T>(grad_hidden[n].row[e / 2], e % 2);
                }
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    Right<T> key[2];
                    load_right(key, tile_of_keys + 8 * (walk + g), kKeyPitch);
                    multiply(of_key[g], grad_hidden, key);
#pragma unroll
                    for (int n = 0; n < 2; ++n) key[n] = {smaller<T>(key[n].at, query.across(walk + g))};
                    multiply(of_min[g], grad_hidden, key);
                }
            }

#pragma unroll
            for (int h = 0; h < 2; ++h) {
                of_query[h] = add_over_columns(of_query[h]);
                of_hidden[h] += of_query[h];
            }
            A* const to = args.to.query_of_weights +
                          (((b * plan.weight_chunks + chunk) * plan.weight_tiles + tile) * s.queries + i) * 8 * G +
                          8 * walk + lane_column();
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                Left<T> hadamard[1], direct[1];
                load_left(hadamard, own.weight + 8 * (walk + g), kOwnPitch);
                load_left(direct, own.weight + 8 * (3 * G + walk + g), kOwnPitch);
                const A q[2] = {element<T>(query.along(walk + g), 0), element<T>(query.along(walk + g), 1)};
                A grad_query[2] = {};
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const A x[2] = {of_key[g].at[2 * h], of_key[g].at[2 * h + 1]};
                    A* const place = &own.sum[0][lane_row() + 8 * h][8 * (walk + g) + lane_column()];
                    add_pair(place, of_query[h] * q[0], of_query[h] * q[1]);
                    add_pair(place + 16 * 8 * G, x[0], x[1]);
                    add_pair(place + 2 * 16 * 8 * G, x[0] * q[0], x[1] * q[1]);
#pragma unroll
                    for (int c = 0; c < 2; ++c)
                        grad_query[c] += weight2[h] * (element<T>(hadamard[0].row[h], c) * x[c] +
                                                       element<T>(direct[0].row[h], c) * of_query[h]);
                }
                const Vector<A, 2> sum{{add_over_rows(grad_query[0]), add_over_rows(grad_query[1])}};
                if (lane_row() == 0) store(to + 8 * g, sum);
                sync_warp();  // matrix instructions want the warp back together
            }
        }

#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t m = unit + lane_row() + 8 * h;
            A* const weight = args.to.weight + (item * s.hidden + m) * 4 * 8 * G + 8 * walk + lane_column();
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
#pragma unroll
                for (int which = 0; which < 3; ++which)
                    store(weight + which * 8 * G + 8 * g,
                          load<2>(&own.sum[which][lane_row() + 8 * h][8 * (walk + g) + lane_column()]));
                store(weight + 3 * 8 * G + 8 * g, Vector<A, 2>{{of_min[g].at[2 * h], of_min[g].at[2 * h + 1]}});
            }
            const A slope = add_over_columns(of_weight2[h]);
            if (lane_column() == 0)
                store(args.to.hidden + (item * s.hidden + m) * 2, Vector<A, 2>{{of_hidden[h], slope}});
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
           {s.batch * plan.weight_chunks * plan.weight_slices, kOwners<T, G> * kWarp, stream,
            kOwners<T, G> * sizeof(Own<T, G>) + keys, ceil_div(plan.weight_tiles, kOwners<T, G>)},
           pairs);
}

#define XLAYER_HDIM_INSTANCE(T, Activation, G)                                                             \
    template void grad_weights<T, Activation, G>(const HdimGradPairs&, const Packed<T>&, const PairSizes&, \
                                                 const GradPlan&, const GradPartials<T>&, void*);
XLAYER_HDIM_INSTANCES
#undef XLAYER_HDIM_INSTANCE

}  // namespace xlayer::cuda
