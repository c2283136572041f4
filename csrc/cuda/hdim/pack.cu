// Packs the inputs of hdim (pairs.cuh): a warp per token, and u = b1 + Wa·q with a warp per kQueries queries.
#include "cuda/hdim/pack.cuh"

namespace xlayer::cuda::hdim {
namespace {

constexpr int kPackThreads = 256;
constexpr int kPackWarps = kPackThreads / kWarpSize;
constexpr int kPackBlocks = 4;  // on a multiprocessor

template <class A>
__device__ __forceinline__ bool finite(A x) {
    return x - x == 0;
}

__device__ __forceinline__ int64_t warp_index() {
    return static_cast<int64_t>(blockIdx.x) * kPackWarps + threadIdx.x / kWarpSize;
}
__device__ __forceinline__ int64_t warp_count() { return static_cast<int64_t>(gridDim.x) * kPackWarps; }

// Calls f(b, token) with one warp per token: blocks lie along the tokens in x, along the batch in y.
template <class F>
__device__ __forceinline__ void for_each_token(int64_t batch, int64_t tokens, const F& f) {
    for (int64_t b = blockIdx.y; b < batch; b += gridDim.y)
        for (int64_t s = warp_index(); s < tokens; s += warp_count()) f(b, s);
}
Launch token_launch(int64_t batch, int64_t tokens, void* stream) {
    constexpr int64_t kMaxGridY = 65535;
    return {ceil_div(tokens, kPackWarps), kPackThreads, stream, 0, batch < kMaxGridY ? batch : kMaxGridY};
}

template <class T>
struct PackWeights {
    const T *weight1, *bias1, *weight2;
    double temperature;
    int proj_dim, mlp_dim, groups, hidden;
    Packed<T> to;
};

// One thread per hidden unit and column.
// resources: hdim_pack_weights_kernel threads 256, registers 64, shared 0, occupancy 0.5
// sass: hdim_pack_weights_kernel LDG
template <class T>
__global__ void __launch_bounds__(kPackThreads) hdim_pack_weights_kernel(PackWeights<T> args) {
    using A = Accumulator<T>;
    const int width = 8 * args.groups, D = args.proj_dim;
    const int index = static_cast<int>(blockIdx.x) * kPackThreads + static_cast<int>(threadIdx.x);
    const int m = index / width, d = index % width;
    if (m >= args.hidden) return;

    A columns[4] = {};
    if (m < args.mlp_dim && d < D) {
        for (int block = 0; block < 4; ++block)
            columns[block] = widen(args.weight1[(static_cast<int64_t>(m) * 4 + block) * D + d]);
    }
    T* row = args.to.weight + static_cast<int64_t>(m) * kWeightBlocks * width + d;
#pragma unroll
    for (int block = 0; block < kWeightBlocks; ++block) row[block * width] = narrow<T>(columns[(block + 1) % 4]);
    args.to.query_weight[static_cast<int64_t>(d) * args.hidden + m] = columns[0];
    if (d == 0) {
        const bool real = m < args.mlp_dim;
        args.to.bias1[m] = real ? widen(args.bias1[m]) : A(0);
        args.to.weight2[m] = real ? widen(args.weight2[m]) * static_cast<A>(1 / args.temperature) : A(0);
    }
}

template <class T>
struct PackTokens {
    const T* from;
    int64_t stride[3];
    int64_t batch, tokens;
    int proj_dim, width;
    TokenFlags mask;
    T* to;
    Accumulator<T>* bias;
};

// One warp per token.
// resources: hdim_pack_tokens_kernel threads 256, registers 64, shared 0, occupancy 0.5
// sass: hdim_pack_tokens_kernel LDG
template <class T>
__global__ void __launch_bounds__(kPackThreads, kPackBlocks) hdim_pack_tokens_kernel(PackTokens<T> args) {
    using A = Accumulator<T>;
    for_each_token(args.batch, args.tokens, [&](int64_t b, int64_t s) {
        const int64_t row = b * args.tokens + s;
        const bool masked = !args.mask.allows(b, s);
        const T* from = args.from + b * args.stride[0] + s * args.stride[1];
        bool usable = true;
        for (int d = lane_id(); d < args.proj_dim && !masked; d += kWarpSize)
            usable = usable && finite(widen(from[d * args.stride[2]]));
        usable = ballot(!usable) == 0;
        for (int d = lane_id(); d < args.width; d += kWarpSize) {
            const bool take = usable && !masked && d < args.proj_dim;
            args.to[row * args.width + d] = take ? from[d * args.stride[2]] : narrow<T>(A(0));
        }
        if (lane_id() == 0) args.bias[row] = masked ? -infinity<A>() : usable ? A(0) : not_a_number<A>();
    });
}

template <class T>
struct PackValues {
    const T* from;
    int64_t stride[3];
    int64_t batch, keys, width;
    TokenFlags mask;
    bool mask_nonfinite;  // zero the values of keys that hold NaN or inf: a pair mask may forbid them to some queries
    T* to;
    Accumulator<T>* key_bias;
};

// One warp per key; N elements at a time.
// resources: hdim_pack_values_kernel threads 256, registers 64, shared 0, occupancy 0.5
// sass: hdim_pack_values_kernel<*, [!1]> LDG.128, STG.128
template <class T, int N>
__global__ void __launch_bounds__(kPackThreads, kPackBlocks) hdim_pack_values_kernel(PackValues<T> args) {
    using A = Accumulator<T>;
    Vector<T, N> zero;
#pragma unroll
    for (int n = 0; n < N; ++n) zero.at[n] = narrow<T>(A(0));
    for_each_token(args.batch, args.keys, [&](int64_t b, int64_t j) {
        const int64_t row = b * args.keys + j;
        const bool masked = !args.mask.allows(b, j);
        const T* from = args.from + b * args.stride[0] + j * args.stride[1];
        bool usable = !masked;
        if (args.mask_nonfinite && usable) {
            for (int64_t h = lane_id() * N; h < args.width; h += kWarpSize * N) {
                const Vector<T, N> some = load_vec<N>(from + h * args.stride[2]);
#pragma unroll
                for (int n = 0; n < N; ++n) usable = usable && finite(widen(some.at[n]));
            }
        }
        usable = ballot(!usable) == 0;
        T* const to = args.to + row * args.width;
        for (int64_t h = lane_id() * N; h < args.width; h += kWarpSize * N) {
            Vector<T, N> some = zero;
            if (usable) some = load_vec<N>(from + h * args.stride[2]);
            store_vec(to + h, some);
        }
        if (lane_id() == 0 && !usable && !masked) args.key_bias[row] = not_a_number<A>();
    });
}

template <class T>
struct QueryHidden {
    Packed<T> packed;
    int64_t rows;
    int width, hidden;
};

// One warp per kQueries queries, a lane per hidden unit: the weights are read once for all of them.
constexpr int kQueries = 8;
// resources: hdim_query_hidden_kernel threads 256, registers 64, shared 0, occupancy 0.5
// sass: hdim_query_hidden_kernel LDG
template <class T>
__global__ void __launch_bounds__(kPackThreads) hdim_query_hidden_kernel(QueryHidden<T> args) {
    using A = Accumulator<T>;
    const Packed<T>& p = args.packed;
    for (int64_t first = warp_index() * kQueries; first < args.rows; first += warp_count() * kQueries) {
        const int count = static_cast<int>(args.rows - first < kQueries ? args.rows - first : kQueries);
        for (int m = lane_id(); m < args.hidden; m += kWarpSize) {
            A sum[kQueries];
#pragma unroll
            for (int r = 0; r < kQueries; ++r) sum[r] = p.bias1[m];
            for (int d = 0; d < args.width; ++d) {
                const A w = p.query_weight[static_cast<int64_t>(d) * args.hidden + m];
#pragma unroll
                for (int r = 0; r < kQueries; ++r)
                    if (r < count) sum[r] += w * widen(p.query[(first + r) * args.width + d]);
            }
#pragma unroll
            for (int r = 0; r < kQueries; ++r)
                if (r < count) p.query_hidden[(first + r) * args.hidden + m] = sum[r];
        }
    }
}

template <class T>
void pack_tokens(const char* name, const void* from, const int64_t (&stride)[3], int64_t batch, int64_t tokens,
                 const HdimInputs& in, const PairSizes& s, const TokenFlags& mask, T* to, Accumulator<T>* bias,
                 void* stream) {
    const PackTokens<T> args{static_cast<const T*>(from),
                             {stride[0], stride[1], stride[2]},
                             batch,
                             tokens,
                             static_cast<int>(in.proj_dim),
                             8 * s.groups,
                             mask,
                             to,
                             bias};
    launch(name, hdim_pack_tokens_kernel<T>, token_launch(batch, tokens, stream), args);
}

template <class T, int N>
void pack_values(const PackValues<T>& args, void* stream) {
    launch("hdim_pack_values", hdim_pack_values_kernel<T, N>, token_launch(args.batch, args.keys, stream), args);
}

}  // namespace

template <class T>
void pack_inputs(const HdimScore& score, const Packed<T>& packed, const PairSizes& s, void* stream) {
    const HdimInputs& in = score.in;
    const TokenFlags all{nullptr, {0, 0}}, allowed{in.key_mask, {in.key_mask_stride[0], in.key_mask_stride[1]}};

    const PackWeights<T> weights{static_cast<const T*>(in.weight1),
                                 static_cast<const T*>(in.bias1),
                                 static_cast<const T*>(in.weight2),
                                 in.temperature,
                                 static_cast<int>(in.proj_dim),
                                 static_cast<int>(in.mlp_dim),
                                 s.groups,
                                 s.hidden,
                                 packed};
    launch("hdim_pack_weights", hdim_pack_weights_kernel<T>,
           {ceil_div(s.hidden * 8 * s.groups, kPackThreads), kPackThreads, stream}, weights);
    pack_tokens<T>("hdim_pack_query", in.query, in.query_stride, s.batch, s.queries, in, s, all, packed.query,
                   packed.query_bias, stream);
    pack_tokens<T>("hdim_pack_key", in.key, in.key_stride, s.batch, s.keys, in, s, allowed, packed.key, packed.key_bias,
                   stream);
    const int64_t rows = s.batch * s.queries;
    launch("hdim_query_hidden", hdim_query_hidden_kernel<T>,
           {ceil_div(rows, kQueries * kPackWarps), kPackThreads, stream},
           QueryHidden<T>{packed, rows, 8 * s.groups, s.hidden});
    if (score.value == nullptr) return;

    const PackValues<T> values{static_cast<const T*>(in.value),
                               {in.value_stride[0], in.value_stride[1], in.value_stride[2]},
                               s.batch,
                               s.keys,
                               in.value_dim,
                               allowed,
                               in.attn_mask != nullptr,
                               static_cast<T*>(score.value),
                               packed.key_bias};
    constexpr int kFull = 16 / sizeof(T);
    const bool wide = in.value_stride[2] == 1 &&
                      vector_length<T>(in.value, in.value_stride[0], in.value_stride[1], in.value_dim) == kFull;
    return wide ? pack_values<T, kFull>(values, stream) : pack_values<T, 1>(values, stream);
}

template void pack_inputs<double>(const HdimScore&, const Packed<double>&, const PairSizes&, void*);
template void pack_inputs<float>(const HdimScore&, const Packed<float>&, const PairSizes&, void*);
template void pack_inputs<tf32>(const HdimScore&, const Packed<tf32>&, const PairSizes&, void*);
template void pack_inputs<bfloat16>(const HdimScore&, const Packed<bfloat16>&, const PairSizes&, void*);
template void pack_inputs<float16>(const HdimScore&, const Packed<float16>&, const PairSizes&, void*);

}  // namespace xlayer::cuda::hdim
