// Tiling of the pairs in the score and key-gradient kernels: a warp keeps a tile of 16·R keys and loops over a slice of
// the queries; the hidden units' weights pass through the block's shared memory, a chunk of them at a time.
#pragma once

#include "cuda/hdim/pairs.cuh"

namespace xlayer::cuda::hdim {

struct PairTiling {
    int64_t key_tiles, query_slices;
    int64_t slice_queries;
    int hidden_chunk;  // hidden units in shared memory at a time
};

// One warp's tile of keys and slice of queries; empty (begin == end, valid_keys == 0) past the end of the batch.
struct WarpTile {
    int64_t b, key_tile, query_slice;
    int64_t first, begin, end;  // first key; queries [begin, end)
    int valid_keys;             // keys of the tile that exist

    // Neighbouring warps take the same queries.
    __device__ __forceinline__ WarpTile(const PairTiling& tiling, const PairSizes& s, int keys) {
        const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
        key_tile = item % tiling.key_tiles, query_slice = item / tiling.key_tiles % tiling.query_slices;
        b = item / tiling.key_tiles / tiling.query_slices;
        first = key_tile * keys, begin = query_slice * tiling.slice_queries;
        const bool real = b < s.batch;
        end = !real ? begin : begin + tiling.slice_queries < s.queries ? begin + tiling.slice_queries : s.queries;
        valid_keys = !real ? 0 : static_cast<int>(s.keys - first < keys ? s.keys - first : keys);
    }
};

// The block's shared memory: weights and w2 of a chunk of hidden units, and the keys of each warp.
template <class T, int G, int R>
struct TilingSmem {
    using A = Accumulator<T>;
    static constexpr int kPitch = tile_pitch(3 * G), kKeyPitch = tile_pitch(G);

    T* weights;
    A* weight2;
    T* keys;  // of this warp

    static constexpr size_t weight_bytes(int chunk) { return chunk * (kPitch * sizeof(T) + sizeof(A)); }
    static constexpr size_t bytes(int chunk) {
        return weight_bytes(chunk) + size_t{kWarps} * 16 * R * kKeyPitch * sizeof(T);
    }

    __device__ __forceinline__ explicit TilingSmem(int chunk)
        : weights(shared_memory<T>()),
          weight2(reinterpret_cast<A*>(weights + chunk * kPitch)),
          keys(reinterpret_cast<T*>(weight2 + chunk) + threadIdx.x / kWarpSize * 16 * R * kKeyPitch) {}

    __device__ __forceinline__ void load_keys(const Packed<T>& p, const PairSizes& s, const WarpTile& tile) const {
        copy_rows(keys, kKeyPitch, p.key + (tile.b * s.keys + tile.first) * 8 * G, 8 * G, 16 * R, tile.valid_keys,
                  8 * G, lane_id(), kWarpSize);
        wait_copies<0>();
        sync_warp();
    }

    // By the whole block, between two barriers.
    __device__ __forceinline__ void load_weights(const Packed<T>& p, int first, int count) const {
        sync_block();  // the last weights are no longer needed
        copy_rows(weights, kPitch, p.weight + static_cast<int64_t>(first) * kWeightBlocks * 8 * G,
                  kWeightBlocks * 8 * G, count, count, 3 * 8 * G, static_cast<int>(threadIdx.x), kThreads);
        for (int m = static_cast<int>(threadIdx.x); m < count; m += kThreads) weight2[m] = p.weight2[first + m];
        wait_copies<0>();
        sync_block();
    }
};

// A warp's keys, as A fragments: in registers, or read from its shared memory where they are used.
template <class T, int G, int R, bool InRegisters>
class KeyTiles {
  public:
    __device__ __forceinline__ explicit KeyTiles(const TilingSmem<T, G, R>& memory) : from_(memory.keys) {
        if constexpr (InRegisters) {
#pragma unroll
            for (int r = 0; r < R; ++r) load_a(held_[r], from_ + 16 * r * kPitch, kPitch);
        }
    }
    __device__ __forceinline__ FragmentA<T> operator()(int r, int g) const {
        if constexpr (InRegisters) return held_[r][g];
        FragmentA<T> group[1];
        load_a(group, from_ + 16 * r * kPitch + 8 * g, kPitch);
        return group[0];
    }

  private:
    static constexpr int kPitch = tile_pitch(G);
    const T* from_;
    FragmentA<T> held_[InRegisters ? R : 1][InRegisters ? G : 1];
};

template <class T, int G, int R>
PairTiling make_pair_tiling(const PairSizes& s, int64_t target_warps) {
    constexpr int kMaxChunk = static_cast<int>(kWeightBytes / TilingSmem<T, G, R>::weight_bytes(1) / 16 * 16);
    PairTiling tiling;
    tiling.key_tiles = ceil_div(s.keys, 16 * R);
    tiling.slice_queries = slice_length(s.queries, s.batch * tiling.key_tiles, target_warps);
    tiling.query_slices = ceil_div(s.queries, tiling.slice_queries);
    tiling.hidden_chunk = kMaxChunk < s.hidden ? kMaxChunk : s.hidden;
    return tiling;
}

template <class T, int G, int R>
Launch pair_tiling_launch(const PairSizes& s, const PairTiling& tiling, void* stream) {
    return {ceil_div(s.batch * tiling.key_tiles * tiling.query_slices, kWarps), kThreads, stream,
            TilingSmem<T, G, R>::bytes(tiling.hidden_chunk)};
}

}  // namespace xlayer::cuda::hdim
