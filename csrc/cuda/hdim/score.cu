// Scores of all pairs, logit_ij = w2 · act(pre_ij), for the forward and again for the backward.
//
// A warp keeps 16·R keys in registers and loops over a slice of the queries; the weights of a chunk of hidden units are
// in shared memory, read once for all of a warp's keys. Each 8 hidden units are one tensor core product per key tile.
#include "cuda/hdim/pack.cuh"
#include "cuda/hdim/pair_tiling.cuh"

namespace xlayer::cuda::hdim {
namespace {

// Tiles of 16 keys that a warp holds, for keys and their features with a query to fit in registers.
template <class T, int G>
constexpr int kScoreTiles = is_half<T> ? (G <= 4 ? 4 : 2) : (sizeof(T) == 4 && G == 4 ? 2 : 1);

template <class T>
struct Score {
    Packed<T> packed;
    PairSizes sizes;
    const uint8_t* attn_mask;
    int64_t attn_mask_stride[3];
    Accumulator<T>* logits;
    PairTiling tiling;
};

// Adds the sum over these hidden units to a pair's logit; with the last ones, its tokens' biases and the mask.
template <class T, class A>
__device__ __forceinline__ void write(const Score<T>& args, int64_t b, int64_t i, int64_t j, A sum, A key_bias,
                                      bool first, bool last) {
    const int64_t row = b * args.sizes.queries + i;
    if (j >= args.sizes.pitch) return;
    A* const place = args.logits + row * args.sizes.pitch + j;
    if (!first) sum += *place;
    if (last) {
        const int64_t* const stride = args.attn_mask_stride;
        const bool allowed =
            key_bias != -infinity<A>() &&
            (args.attn_mask == nullptr || args.attn_mask[b * stride[0] + i * stride[1] + j * stride[2]] != 0);
        sum += key_bias + args.packed.query_bias[row];
        sum = !allowed ? -infinity<A>() : sum == -infinity<A>() ? lowest<A>() : sum;
    }
    *place = sum;
}

// resources: hdim_score_kernel threads 128, registers 255, shared 69632, occupancy 0.125
// sass: hdim_score_kernel<*float16, *> HMMA.16816, LDSM, LDGSTS.128
// sass: hdim_score_kernel<tf32, *> HMMA.1688, LDGSTS.128
// sass: hdim_score_kernel<float, *> HMMA.1688, LDGSTS.128
// sass: hdim_score_kernel<double, *> DMMA, LDGSTS.128
template <class T, class Activation, int G>
__global__ void __launch_bounds__(kThreads, kPairBlocks) hdim_score_kernel(Score<T> args) {
    using A = Accumulator<T>;
    constexpr int kTiles = kScoreTiles<T, G>;
    constexpr bool kInRegisters = sizeof(T) < 8;  // keys and query in registers, else read where they are used
    const Packed<T>& p = args.packed;
    const PairSizes& s = args.sizes;
    const WarpTile tile(args.tiling, s, 16 * kTiles);
    const TilingSmem<T, G, kTiles> memory(args.tiling.hidden_chunk);
    memory.load_keys(p, s, tile);
    const KeyTiles<T, G, kTiles, kInRegisters> keys(memory);

    // Lane t of the four lanes that share a row writes tile t.
    const int t = lane_id() % 4;
    const int64_t lane_keys[2] = {tile.first + 16 * t + lane_row(), tile.first + 16 * t + lane_row() + 8};
    A key_bias[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const bool real = t < kTiles && tile.b < s.batch && lane_keys[h] < s.keys;
        key_bias[h] = real ? p.key_bias[tile.b * s.keys + lane_keys[h]] : -infinity<A>();
    }

    for (int chunk = 0; chunk < s.hidden; chunk += args.tiling.hidden_chunk) {
        const int count = s.hidden - chunk < args.tiling.hidden_chunk ? s.hidden - chunk : args.tiling.hidden_chunk;
        memory.load_weights(p, chunk, count);
        for (int64_t i = tile.begin; i < tile.end; ++i) {
            const int64_t row = tile.b * s.queries + i;
            const QueryRow<T, G, kInRegisters> query(p.query + row * 8 * G);
            const PairFeatures<T, G, kTiles> features(keys, query);
            const A* const hidden = p.query_hidden + row * s.hidden + chunk + lane_column();
            A logit[kTiles][2] = {};
#pragma unroll(is_half<T> ? 2 : 1)
            for (int m = 0; m < count; m += 8) {
                const Vector<A, 2> u = load_vec<2>(hidden + m), w2 = load_vec<2>(memory.weight2 + m + lane_column());
                FragmentC<T> pre[kTiles];
#pragma unroll
                for (int r = 0; r < kTiles; ++r) pre[r] = {{u.at[0], u.at[1], u.at[0], u.at[1]}};
                add_scores(pre, keys, features, memory.weights + m * memory.kPitch, memory.kPitch, query);
#pragma unroll
                for (int r = 0; r < kTiles; ++r) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) logit[r][e / 2] += Activation::value(pre[r].at[e]) * w2.at[e % 2];
                }
            }

            A out[2] = {};
#pragma unroll
            for (int r = 0; r < kTiles; ++r) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const A sum = add_over_columns(logit[r][h]);
                    out[h] = t == r ? sum : out[h];
                }
            }
            if (t < kTiles) {
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    write(args, tile.b, i, lane_keys[h], out[h], key_bias[h], chunk == 0, chunk + count == s.hidden);
            }
            sync_warp();  // matrix instructions want the warp back together
        }
    }
}

template <class T, class Activation, int G>
void launch_score(const HdimScore& args, const Packed<T>& packed, const PairSizes& s, void* stream) {
    constexpr int64_t kTargetWarps = 4096;  // warps
    const HdimInputs& in = args.in;
    const Score<T> score{packed,
                         s,
                         in.attn_mask,
                         {in.attn_mask_stride[0], in.attn_mask_stride[1], in.attn_mask_stride[2]},
                         static_cast<Accumulator<T>*>(args.logits),
                         make_pair_tiling<T, G, kScoreTiles<T, G>>(s, kTargetWarps)};
    launch("hdim_score", hdim_score_kernel<T, Activation, G>,
           pair_tiling_launch<T, G, kScoreTiles<T, G>>(s, score.tiling, stream), score);
}

}  // namespace

int64_t score_workspace(const HdimInputs& in) {
    Workspace space(nullptr);
    dispatch_dtype(in.dtype, [&](auto element) { take_packed<decltype(element)>(space, PairSizes(in)); });
    return space.bytes;
}

void score(const HdimScore& args, void* stream) {
    const PairSizes sizes(args.in);
    dispatch_pair_types(args.in, [&](auto element, auto activation, auto groups) {
        using T = decltype(element);
        Workspace space(args.workspace);
        const Packed<T> packed = take_packed<T>(space, sizes);
        pack_inputs<T>(args, packed, sizes, stream);
        launch_score<T, decltype(activation), decltype(groups)::value>(args, packed, sizes, stream);
    });
}

}  // namespace xlayer::cuda::hdim
