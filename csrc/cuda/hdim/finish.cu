// Sums the partial sums of hdim's backward, always in the same order.
#include "cuda/hdim/backward.cuh"

namespace xlayer::cuda::hdim {
namespace {

constexpr int kFinishThreads = 256;
constexpr int kFinishWarps = kFinishThreads / kWarpSize;
constexpr int kFinishBlocks = 4;  // on a multiprocessor

// `count` arrays lie `stride` elements apart.
template <class A>
struct Partials {
    const A* from;
    int64_t count, stride, batch_stride;
};

template <class T>
struct FinishTokens {
    using A = Accumulator<T>;
    Partials<A> one, other;
    T* to;  // [B][tokens][D]
    int64_t batch, tokens;
    int proj_dim, width;
};

template <class A>
__device__ __forceinline__ A sum_at(const Partials<A>& partials, int64_t b, int64_t at) {
    const A* from = partials.from + b * partials.batch_stride + at;
    A sum = 0;
#pragma unroll 4
    for (int64_t n = 0; n < partials.count; ++n) sum += from[n * partials.stride];
    return sum;
}

// A thread per element; blocks lie along the tokens in x, along the batch in y.
// resources: hdim_finish_tokens_kernel threads 256, registers 64, shared 0, occupancy 0.5
// sass: hdim_finish_tokens_kernel LDG
template <class T>
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks) hdim_finish_tokens_kernel(FinishTokens<T> args) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kFinishThreads, elements = args.tokens * args.width;
    for (int64_t b = blockIdx.y; b < args.batch; b += gridDim.y) {
        for (int64_t at = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x; at < elements; at += step) {
            const int64_t s = at / args.width;
            const int d = static_cast<int>(at % args.width);
            if (d >= args.proj_dim) continue;
            args.to[(b * args.tokens + s) * args.proj_dim + d] =
                narrow<T>(sum_at(args.one, b, at) + sum_at(args.other, b, at));
        }
    }
}

template <class T>
struct FinishWeights {
    using A = Accumulator<T>;
    const A *weight, *hidden, *weight2;
    int64_t count;  // of partial sums
    int proj_dim, width, units;
    A inverse_temperature;
    T *grad_weight1, *grad_bias1, *grad_weight2;
};

// Sums arrays element by element, one element per lane: every warp takes each kFinishWarps-th array.
template <class A>
__device__ __forceinline__ A sum_over_arrays(const A* from, int64_t count, int64_t stride, bool real, A* shared) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    A sum = 0;
#pragma unroll 4
    for (int64_t n = warp; n < count && real; n += kFinishWarps) sum += from[n * stride];
    sync_block();  // the last use of `shared` is over
    shared[threadIdx.x] = sum;
    sync_block();
    sum = 0;
#pragma unroll
    for (int w = 0; w < kFinishWarps; ++w) sum += shared[w * kWarpSize + lane_id()];
    return sum;
}

// A block per 32 columns of a hidden unit.
// resources: hdim_finish_weights_kernel threads 256, registers 64, shared 2048, occupancy 0.5
// sass: hdim_finish_weights_kernel LDG
template <class T>
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks) hdim_finish_weights_kernel(FinishWeights<T> args) {
    using A = Accumulator<T>;
    A* const shared = shared_memory<A>();
    const int m = static_cast<int>(blockIdx.x), d = static_cast<int>(blockIdx.y) * kWarpSize + lane_id();
    const bool real = d < args.proj_dim;
    const int64_t stride = static_cast<int64_t>(args.units) * 4 * args.width;
    A sum[4];
#pragma unroll
    for (int which = 0; which < 4; ++which) {
        const A* from = args.weight + (static_cast<int64_t>(m) * 4 + which) * args.width + d;
        sum[which] = sum_over_arrays(from, args.count, stride, real, shared);
    }
    const A unit =  // lane 0: Σ G, lane 1: Σ ∂L/∂logit · act
        sum_over_arrays(args.hidden + m * 2 + lane_id(), args.count, static_cast<int64_t>(args.units) * 2,
                        lane_id() < 2, shared);
    if (threadIdx.x >= kWarpSize) return;
    const A w2 = args.weight2[m];
    if (real) {
        T* const row = args.grad_weight1 + static_cast<int64_t>(m) * 4 * args.proj_dim + d;
        row[0] = narrow<T>(w2 * sum[0]);
        row[args.proj_dim] = narrow<T>(w2 * sum[1]);
        row[2 * args.proj_dim] = narrow<T>(w2 * sum[2]);
        row[3 * args.proj_dim] = narrow<T>(w2 * sum[3]);
    }
    if (blockIdx.y != 0) return;
    if (lane_id() == 0) args.grad_bias1[m] = narrow<T>(w2 * unit);
    if (lane_id() == 1) args.grad_weight2[m] = narrow<T>(unit * args.inverse_temperature);
}

template <class T>
void finish_tokens(const char* name, const FinishTokens<T>& args, void* stream) {
    constexpr int64_t kMaxGridY = 65535;
    launch(name, hdim_finish_tokens_kernel<T>,
           {ceil_div(args.tokens * args.width, kFinishThreads), kFinishThreads, stream, 0,
            args.batch < kMaxGridY ? args.batch : kMaxGridY},
           args);
}

}  // namespace

template <class T>
void finish(const HdimGradPairs& args, const Packed<T>& packed, const PairSizes& s, const GradPlan& plan,
            const GradPartials<T>& from, void* stream) {
    using A = Accumulator<T>;
    const int width = 8 * s.groups, D = static_cast<int>(args.in.proj_dim);
    const int64_t query = s.queries * width, key = s.keys * width, in_weights = plan.weight_chunks * plan.weight_tiles;
    finish_tokens<T>("hdim_finish_query",
                     {{from.query_of_pairs, plan.keys.key_tiles, query, plan.keys.key_tiles * query},
                      {from.query_of_weights, in_weights, query, in_weights * query},
                      static_cast<T*>(args.grad_query),
                      s.batch,
                      s.queries,
                      D,
                      width},
                     stream);
    finish_tokens<T>("hdim_finish_key",
                     {{from.key, plan.keys.query_slices, key, plan.keys.query_slices * key},
                      {nullptr, 0, 0, 0},
                      static_cast<T*>(args.grad_key),
                      s.batch,
                      s.keys,
                      D,
                      width},
                     stream);
    const FinishWeights<T> weights{from.weight,
                                   from.hidden,
                                   packed.weight2,
                                   s.batch * plan.weight_chunks * plan.weight_slices,
                                   D,
                                   width,
                                   s.hidden,
                                   static_cast<A>(1 / args.in.temperature),
                                   static_cast<T*>(args.grad_weight1),
                                   static_cast<T*>(args.grad_bias1),
                                   static_cast<T*>(args.grad_weight2)};
    launch("hdim_finish_weights", hdim_finish_weights_kernel<T>,
           {args.in.mlp_dim, kFinishThreads, stream, sizeof(A) * kFinishThreads, D > 0 ? ceil_div(D, kWarpSize) : 1},
           weights);
}

template void finish<double>(const HdimGradPairs&, const Packed<double>&, const PairSizes&, const GradPlan&,
                             const GradPartials<double>&, void*);
template void finish<float>(const HdimGradPairs&, const Packed<float>&, const PairSizes&, const GradPlan&,
                            const GradPartials<float>&, void*);
template void finish<tf32>(const HdimGradPairs&, const Packed<tf32>&, const PairSizes&, const GradPlan&,
                           const GradPartials<tf32>&, void*);
template void finish<bfloat16>(const HdimGradPairs&, const Packed<bfloat16>&, const PairSizes&, const GradPlan&,
                               const GradPartials<bfloat16>&, void*);
template void finish<float16>(const HdimGradPairs&, const Packed<float16>&, const PairSizes&, const GradPlan&,
                              const GradPartials<float16>&, void*);

}  // namespace xlayer::cuda::hdim
