// How score and grad_keys divide the pairs: a warp keeps a tile of 16·R keys and walks over a slice of the
// queries, past hidden units whose weights lie in the block's shared memory, a chunk of them at a time.
#pragma once

#include "cuda/hdim/pairs.cuh"

namespace xlayer::cuda::hdim {

struct Walk {
    int64_t tiles, slices, slice;  // of keys; of queries; queries in a slice
    int chunk;                     // hidden units in shared memory at a time
};

// A warp's share of a walk; nothing of it (begin == end, present == 0) past the end of the batch.
struct Share {
    int64_t b, tile, part;
    int64_t first, begin, end;  // key; queries
    int present;                // keys of the tile that exist

    // Neighbouring warps take the same queries.
    __device__ __forceinline__ Share(const Walk& walk, const PairSizes& s, int keys) {
        const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
        tile = item % walk.tiles, part = item / walk.tiles % walk.slices, b = item / walk.tiles / walk.slices;
        first = tile * keys, begin = part * walk.slice;
        const bool real = b < s.batch;
        end = !real ? begin : begin + walk.slice < s.queries ? begin + walk.slice : s.queries;
        present = !real ? 0 : static_cast<int>(s.keys - first < keys ? s.keys - first : keys);
    }
};

// The block's shared memory: weights and w2 of a chunk of hidden units, and the keys of each warp.
template <class T, int G, int R>
struct WalkMemory {
    using A = Accumulator<T>;
    static constexpr int kPitch = tile_pitch(3 * G), kKeyPitch = tile_pitch(G);

    T* weights;
    A* weight2;
    T* keys;  // of this warp

    static constexpr size_t weight_bytes(int chunk) { return chunk * (kPitch * sizeof(T) + sizeof(A)); }
    static constexpr size_t bytes(int chunk) {
        return weight_bytes(chunk) + size_t{kWarps} * 16 * R * kKeyPitch * sizeof(T);
    }

    __device__ __forceinline__ explicit WalkMemory(int chunk)
        : weights(shared_memory<T>()),
          weight2(reinterpret_cast<A*>(weights + chunk * kPitch)),
          keys(reinterpret_cast<T*>(weight2 + chunk) + threadIdx.x / kWarp * 16 * R * kKeyPitch) {}

    __device__ __forceinline__ void load_keys(const Packed<T>& p, const PairSizes& s, const Share& share) const {
        copy_rows(keys, kKeyPitch, p.key + (share.b * s.keys + share.first) * 8 * G, 8 * G, 16 * R, share.present,
                  8 * G, lane_id(), kWarp);
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

// A warp's keys, as left operands: in registers, or read from its shared memory where they are used.
template <class T, int G, int R, bool Hold>
class KeyTiles {
  public:
    __device__ __forceinline__ explicit KeyTiles(const WalkMemory<T, G, R>& memory) : from_(memory.keys) {
        if constexpr (Hold) {
#pragma unroll
            for (int r = 0; r < R; ++r) load_left(held_[r], from_ + 16 * r * kPitch, kPitch);
        }
    }
    __device__ __forceinline__ Left<T> operator()(int r, int g) const {
        if constexpr (Hold) return held_[r][g];
        Left<T> group[1];
        load_left(group, from_ + 16 * r * kPitch + 8 * g, kPitch);
        return group[0];
    }

  private:
    static constexpr int kPitch = tile_pitch(G);
    const T* from_;
    Left<T> held_[Hold ? R : 1][Hold ? G : 1];
};

template <class T, int G, int R>
Walk make_walk(const PairSizes& s, int64_t enough) {
    constexpr int kMost = static_cast<int>(kWeightBytes / WalkMemory<T, G, R>::weight_bytes(1) / 16 * 16);
    Walk walk;
    walk.tiles = ceil_div(s.keys, 16 * R);
    walk.slice = slice_length(s.queries, s.batch * walk.tiles, enough);
    walk.slices = ceil_div(s.queries, walk.slice);
    walk.chunk = kMost < s.hidden ? kMost : s.hidden;
    return walk;
}

template <class T, int G, int R>
Launch walk_launch(const PairSizes& s, const Walk& walk, void* stream) {
    return {ceil_div(s.batch * walk.tiles * walk.slices, kWarps), kThreads, stream,
            WalkMemory<T, G, R>::bytes(walk.chunk)};
}

}  // namespace xlayer::cuda::hdim
