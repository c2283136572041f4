// Shared parts of the aggregate kernels.
#pragma once

#include <cmath>

#include "cuda/common/device.cuh"
#include "xlayer/aggregate.h"
#include "xlayer/workspace.h"

namespace xlayer::cuda::aggregate {

constexpr int64_t kMaxBlocks = 65535;  // of kernels that loop over the rest

inline int64_t min_size(int64_t count, int64_t limit) { return count < limit ? count : limit; }

// --- Numbers ---------------------------------------------------------------------------------------------------------

template <class A>
__device__ __forceinline__ A sigmoid(A x) {
    return 1 / (1 + exp(-x));
}

// 1 − σ(a) and σ(a): each with a small error of its own, however far from zero a is.
template <class A>
struct alignas(2 * sizeof(A)) Gate {
    A keep, take;
};
template <class A>
__device__ __forceinline__ Gate<A> gate_of(const void* logits, int64_t layer) {
    const A logit = static_cast<const A*>(logits)[layer];
    return {sigmoid(-logit), sigmoid(logit)};
}

// The gates of all layers, in shared memory.
template <class A>
__device__ __forceinline__ void stage_gates(const EmaScan& scan, Gate<A>* to) {
    for (int64_t layer = threadIdx.x; layer < scan.layers; layer += blockDim.x)
        to[layer] = gate_of<A>(scan.gate_logits, layer);
}

// Vectors of T, widened and narrowed.
template <class T, int V>
__device__ __forceinline__ void widen_all(const Vector<T, V>& from, Accumulator<T> (&to)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = widen(from.at[v]);
}
template <class T, int V>
__device__ __forceinline__ void store_narrow(T* to, const Accumulator<T> (&from)[V]) {
    Vector<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.at[v] = narrow<T>(from[v]);
    store_vec(to, out);
}
// Loads a vector, widened; zeros unless `there`.
template <class T, int V>
__device__ __forceinline__ void load_wide(const T* from, bool there, Accumulator<T> (&to)[V]) {
    Vector<T, V> some{};
    if (there) some = load_vec<V>(from);
    widen_all<T, V>(some, to);
}

// V numbers of the accumulation type, in pieces of at most 16 bytes; `apart` is the distance of the pieces.
template <class A, int V>
constexpr int kSplit = V * sizeof(A) > 16 ? 16 / sizeof(A) : V;
template <int V, class A>
__device__ __forceinline__ void load_split(const A* from, int split_stride, A (&to)[V]) {
#pragma unroll
    for (int v = 0; v < V; v += kSplit<A, V>) {
        const Vector<A, kSplit<A, V>> some = load_vec<kSplit<A, V>>(from + v / kSplit<A, V> * split_stride);
#pragma unroll
        for (int i = 0; i < kSplit<A, V>; ++i) to[v + i] = some.at[i];
    }
}
template <int V, class A>
__device__ __forceinline__ void store_split(A* to, int split_stride, const A (&from)[V]) {
#pragma unroll
    for (int v = 0; v < V; v += kSplit<A, V>) {
        Vector<A, kSplit<A, V>> some;
#pragma unroll
        for (int i = 0; i < kSplit<A, V>; ++i) some.at[i] = from[v + i];
        store_vec<Space::generic>(to + v / kSplit<A, V> * split_stride, some);
    }
}

// A row of numbers in shared memory, so that lanes which take neighbouring vectors of V meet different banks: first the
// first 16 bytes of every vector, then the second.
template <int V, class A>
__device__ __forceinline__ void stage_row(const A* from, int64_t width, A* to) {
    constexpr int P = kSplit<A, V>;
    for (int64_t e = threadIdx.x; e < width; e += blockDim.x)
        to[e % V / P * (width / V * P) + e / V * P + e % P] = from == nullptr ? A(0) : from[e];
}
template <int V, class A>
__device__ __forceinline__ void load_staged(const A* staged, int64_t width, int64_t column, A (&to)[V]) {
    constexpr int P = kSplit<A, V>;
    load_split<V>(staged + column / V * P, static_cast<int>(width / V * P), to);
}

// --- Teams: the threads that have a row together, a power of two of them ---------------------------------------------

constexpr int kMaxTeamSums = 12;  // the most numbers that are summed together

// Lanes of a team, a power of two up to `limit`, for rows of `width` numbers with `numbers` in a lane.
inline int team_lanes(int64_t width, int64_t numbers, int limit) {
    int lanes = 1;
    while (lanes < limit && lanes * numbers < width) lanes *= 2;
    return lanes;
}
// Numbers in shared memory that the sums of a block take.
__host__ __device__ constexpr int team_elements(int threads) { return 2 * threads / kWarpSize * kMaxTeamSums; }

template <class A>
class Team {
  public:
    const int lanes, lane, index;  // index: which team of the block

    __device__ __forceinline__ Team(int lanes_, A* shared)
        : lanes(lanes_),
          lane(static_cast<int>(threadIdx.x) % lanes_),
          index(static_cast<int>(threadIdx.x) / lanes_),
          shared_(shared) {}

    // Sums over the team, in a fixed order and equal in all its lanes. The whole block calls it.
    template <int Count>
    __device__ __forceinline__ void add(A (&x)[Count]) {
        static_assert(Count <= kMaxTeamSums);
        for (int mask = (lanes < kWarpSize ? lanes : kWarpSize) / 2; mask > 0; mask /= 2) {
#pragma unroll
            for (int c = 0; c < Count; ++c) x[c] += shuffle_xor(x[c], mask);
        }
        if (lanes <= kWarpSize) return;
        // Double buffered: who writes to one buffer has passed the barrier that followed all reading from it.
        A* const place = shared_ + buffer_ * static_cast<int>(blockDim.x) / kWarpSize * kMaxTeamSums;
        buffer_ ^= 1;
        const int warp = static_cast<int>(threadIdx.x) / kWarpSize, warps = lanes / kWarpSize;
        if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
            for (int c = 0; c < Count; ++c) place[warp * kMaxTeamSums + c] = x[c];
        }
        sync_block();
#pragma unroll
        for (int c = 0; c < Count; ++c) x[c] = 0;
        for (int w = warp / warps * warps, end = w + warps; w < end; ++w) {
#pragma unroll
            for (int c = 0; c < Count; ++c) x[c] += place[w * kMaxTeamSums + c];
        }
    }

  private:
    A* const shared_;
    int buffer_ = 0;
};

// From a first mean, which rounding may have put off by more than it seems where it is large, and the sums of what is
// left of a row and of its squares: the normalized number is (x − first)·inverse + shift.
template <class A>
struct Norm {
    A inverse, shift;
};
template <class A>
__device__ __forceinline__ Norm<A> norm_of(A sum, A squares, int64_t width, double eps) {
    const A rest = sum / static_cast<A>(width);
    const A inverse = 1 / sqrt(clamp_min_zero(squares / static_cast<A>(width) - rest * rest) + static_cast<A>(eps));
    return {inverse, -rest * inverse};
}

// A row's norm as stored in memory: (x − first)·inverse + shift.
constexpr int64_t kStatistics = 4;  // numbers of a row, of which three are used: pairs are loaded
template <class A>
struct RowNorm {
    A first, inverse, shift;

    __device__ __forceinline__ static RowNorm load_of(const void* statistics, int64_t row) {
        const A* const from = static_cast<const A*>(statistics) + row * kStatistics;
        const Vector<A, 2> pair = load_vec<2>(from);
        return {pair.at[0], pair.at[1], from[2]};
    }
    __device__ __forceinline__ A operator()(A x) const { return fma(x - first, inverse, shift); }
};

// --- Kernels of several operators (sums.cu) ----------------------------------------------------------------

// out[c] = Σ_r partials[r·pitch + c], of the accumulation type of `dtype`, in which `out` is; times σ'(logits[c]) where
// logits are not null.
struct ColumnSums {
    DType dtype;
    const void* partials;
    int64_t rows, columns, pitch;
    const void* logits;
    void* out;
};
void finish_columns(const ColumnSums& args, void* stream);

// --- Parts of ema_scan's backward ----------------------------------------------------------------------------------

// The arguments in the sizes that a kernel sees, the split of the work, and the arrays in the workspace.
struct EmaBackwardPlan {
    EmaScanBackward args;
    int64_t blocks;  // of which each has a partial sum of the gates' gradients
    int64_t runs;    // of tokens, of which each has partial sums of the norm's gradients; 1 without norm
    int64_t run_tokens;
    void* gate_partials;  // [blocks, layers]
    void* norm_partials;  // [runs, 2, width]: weight, bias
    void* statistics;     // [layers, tokens, kStatistics]
    void* row_means;      // [layers, tokens, 2]: of w·∂L/∂n and of the same times the normalized row
    void* adjoints;       // null: in shared memory; else ∂L/∂S, [blocks, layers, numbers of a block]
    size_t shared_bytes;
    bool whole_rows;  // ema_norm_backward.cu has them
    int lanes;        // of a row there
};

// Mean and 1/deviation of every row of x, [layers, tokens, 2].
void ema_statistics(const EmaScan& scan, void* statistics, void* stream);
void ema_row_means(const EmaBackwardPlan& plan, void* stream);
// Whether the rows of a token, of all layers, find room in shared memory; fills in what a launch then takes.
bool ema_norm_backward_fits(EmaBackwardPlan* plan);
void ema_norm_backward(const EmaBackwardPlan& plan, void* stream);

}  // namespace xlayer::cuda::aggregate
