// vq_nearest (xlayer/quantize.h), deterministic: every score has one order of summation wherever its row and code
// stand, and the rest is exact comparisons, so nothing depends on how the work is split.
//
// score(n, k) = bias_k − scale_k·(x_n·c_k), the least wins: euclidean bias ½|c|², scale 1; cosine bias 0, scale 1/|c|.
// Three kernels: bias and scale, a warp per code; the search (search.cuh); the merge of the splits and the distances, a
// warp per row.
#include "cuda/quantize/search.cuh"

namespace xlayer::cuda::quantize {
namespace {

// --- Bias and scale of codes ---------------------------------------------------------------------------------------

template <class A>
struct CodeTerms {
    VqRows codebook;
    bool cosine;
    int64_t num_codebooks, codes;
    int64_t padded;  // codes of a codebook in `terms`; those past `codes` are never chosen
    int64_t width;
    Terms<A>* terms;
};

constexpr int kRowThreads = 256;  // of the kernels with a warp to a row
constexpr int kRowWarps = kRowThreads / kWarpSize;

// Calls f(columns) for the vectors of a row that are this lane's.
template <int N, class T, class F>
__device__ __forceinline__ void for_lane_columns(const T* row, int64_t width, const F& f) {
    for (int64_t d = static_cast<int64_t>(lane_id()) * N; d < width; d += kWarpSize * N) f(d, load_vec<N>(row + d));
}

// resources: vq_terms_kernel threads 256, registers 40, shared 0, occupancy 0.75
// sass: vq_terms_kernel<*, [!1]> LDG.128
template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) vq_terms_kernel(CodeTerms<Accumulator<T>> args) {
    using A = Accumulator<T>;
    const int64_t count = args.num_codebooks * args.padded, step = static_cast<int64_t>(gridDim.x) * kRowWarps;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize; at < count; at += step) {
        const int64_t h = at / args.padded, code = at % args.padded;
        A square = 0, poison = 0;  // poison: 0, or NaN
        if (code < args.codes) {
            const T* const row = static_cast<const T*>(args.codebook.data) + h * args.codebook.codebook_stride +
                                 code * args.codebook.row_stride;
            for_lane_columns<N>(row, args.width, [&](int64_t, const Vector<T, N>& c) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const A value = widen(c.at[n]);
                    square += value * value;
                    poison += value - value;
                }
            });
        } else {
            poison = A(NAN);
        }
        square = add_over_warp(square);
        poison = add_over_warp(poison);
        if (lane_id() != 0) continue;
        const A scale = !args.cosine ? A(1) : square > 0 ? 1 / sqrt(square) : A(0);
        args.terms[at] = {{(args.cosine ? A(0) : square / 2) + poison, scale}};
    }
}

// --- The merge -----------------------------------------------------------------------------------------------------

template <class A>
struct Merge {
    VqRows x, codebook;
    bool cosine;
    int64_t num_codebooks, rows, width, splits;
    const A* scores;
    const int* found;
    int64_t* indices;
    A* distance;
};

// resources: vq_merge_kernel threads 256, registers 48, shared 0, occupancy 0.625
// sass: vq_merge_kernel<*, [!1]> LDG.128
template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) vq_merge_kernel(Merge<Accumulator<T>> args) {
    using A = Accumulator<T>;
    const int64_t count = args.num_codebooks * args.rows, step = static_cast<int64_t>(gridDim.x) * kRowWarps;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize; at < count; at += step) {
        const int64_t h = at / args.rows, n = at % args.rows;
        Best<A> best{A(INFINITY), 0};
        for (int64_t split = lane_id(); split < args.splits; split += kWarpSize)
            best = better(best, {args.scores[split * count + at], args.found[split * count + at]});
#pragma unroll
        for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
            best = better(best, {shuffle_xor(best.score, mask), shuffle_xor(best.code, mask)});

        const T* const x = static_cast<const T*>(args.x.data) + h * args.x.codebook_stride + n * args.x.row_stride;
        const T* const codes = static_cast<const T*>(args.codebook.data) + h * args.codebook.codebook_stride;
        // Euclidean: `first` is the sum of (x − c)². Cosine: x·x, x·c, c·c.
        A first, cross, last;
        bool finite;
        for (;; best.code = 0) {
            const T* const c = codes + best.code * args.codebook.row_stride;
            A poison = 0;  // NaN where x is not finite
            first = cross = last = 0;
            for_lane_columns<N>(x, args.width, [&](int64_t d, const Vector<T, N>& left) {
                const Vector<T, N> right = load_vec<N>(c + d);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const A a = widen(left.at[i]), b = widen(right.at[i]);
                    poison += a - a;
                    if (args.cosine) {
                        first += a * a, cross += a * b, last += b * b;
                    } else {
                        first += (a - b) * (a - b);
                    }
                }
            });
            finite = is_finite(add_over_warp(poison));
            if (finite || best.code == 0) break;
        }
        first = add_over_warp(first), cross = add_over_warp(cross), last = add_over_warp(last);
        A distance = first;
        if (args.cosine) {
            const A x_scale = first > 0 ? 1 / sqrt(first) : A(0), c_scale = last > 0 ? 1 / sqrt(last) : A(0);
            distance = finite ? clamp_min_zero(1 - cross * x_scale * c_scale) : A(NAN);
        }
        if (lane_id() != 0) continue;
        args.indices[at] = best.code;
        args.distance[at] = distance;
    }
}

// --- Launches ------------------------------------------------------------------------------------------------------

// Sizes of the search, and its arrays. T: the element type of the search.
template <class T>
struct Plan {
    using A = Accumulator<T>;
    using S = Shape<T>;
    int64_t row_blocks, tiles, padded, span, splits;
    bool resident;
    size_t shared;
    Terms<A>* terms;
    A* scores;
    int* found;

    Plan(const VqNearest& args, void* workspace)
        : row_blocks(ceil_div(args.rows, S::kBlockRows)),
          tiles(ceil_div(args.codes, S::kBlockCodes)),
          padded(tiles * S::kBlockCodes) {
        const int64_t blocks = args.num_codebooks * row_blocks,
                      wanted = ceil_div(kTargetBlocks, blocks > 0 ? blocks : 1);
        span = ceil_div(tiles, wanted < tiles ? wanted : tiles);
        splits = ceil_div(tiles, span);

        const int64_t slices = ceil_div(args.width, S::kDepth), row_tile = S::kBlockRows * kRowBytes;
        const int64_t staged =
            S::kBlockCodes * static_cast<int64_t>(kStages * kRowBytes + kTermStages * sizeof(Terms<A>));
        const int64_t device_bytes = max_shared_bytes("vq_nearest");
        resident = staged + slices * row_tile <= (device_bytes < kMaxSharedBytes ? device_bytes : kMaxSharedBytes);
        int64_t bytes = staged + (resident ? slices : kStages) * row_tile;
        const int64_t last = kCodeGroups * S::kBlockRows * static_cast<int64_t>(sizeof(Best<A>));
        shared = static_cast<size_t>(bytes > last ? bytes : last);

        Workspace space(workspace);
        terms = space.take<Terms<A>>(args.num_codebooks, padded);
        scores = space.take<A>(splits, args.num_codebooks, args.rows);
        found = space.take<int>(splits, args.num_codebooks, args.rows);
        bytes_ = space.bytes;
    }
    int64_t bytes() const { return bytes_; }

  private:
    int64_t bytes_;
};

template <class F>
void dispatch_search_type(const VqNearest& args, const F& f) {
    if (args.x.dtype == DType::float32 && args.tf32) return f(tf32{});
    dispatch_dtype(args.x.dtype, f);
}

template <class T, bool kVectors>
void nearest(const VqNearest& args, void* stream) {
    using A = Accumulator<T>;
    using Stored = typename std::conditional<std::is_same_v<T, tf32>, float, T>::type;
    constexpr int N = kVectors ? kChunk / sizeof(T) : 1;
    const Plan<T> plan(args, args.workspace);
    const bool cosine = args.metric == VqMetric::cosine;
    const auto blocks_of = [](int64_t rows) {
        const int64_t blocks = ceil_div(rows, kRowWarps);
        return blocks < kMaxBlocks ? blocks : kMaxBlocks;
    };
    launch("vq_terms", vq_terms_kernel<Stored, N>, {blocks_of(args.num_codebooks * plan.padded), kRowThreads, stream},
           CodeTerms<A>{args.codebook, cosine, args.num_codebooks, args.codes, plan.padded, args.width, plan.terms});
    launch("vq_search", vq_search_kernel<T, kVectors>,
           {args.num_codebooks * plan.row_blocks, kThreads, stream, plan.shared, plan.splits},
           Search<A>{args.x, args.codebook, args.rows, args.codes, args.width, plan.padded, plan.row_blocks, plan.tiles,
                     plan.span, plan.resident, plan.terms, plan.scores, plan.found});
    launch("vq_merge", vq_merge_kernel<Stored, N>, {blocks_of(args.num_codebooks * args.rows), kRowThreads, stream},
           Merge<A>{args.x, args.codebook, cosine, args.num_codebooks, args.rows, args.width, plan.splits, plan.scores,
                    plan.found, args.indices, static_cast<A*>(args.distance)});
}

}  // namespace

int64_t vq_nearest_workspace(const VqNearest& args) {
    int64_t bytes = 0;
    dispatch_search_type(args, [&](auto element) { bytes = Plan<decltype(element)>(args, nullptr).bytes(); });
    return bytes;
}

void vq_nearest(const VqNearest& args, void* stream) {
    if (args.codes >= int64_t{1} << 31) throw std::runtime_error("vq_nearest: 2^31 codes or more");
    dispatch_search_type(args, [&](auto element) {
        using T = decltype(element);
        const VqRows &x = args.x, &codebook = args.codebook;
        const bool one = args.num_codebooks == 1;  // then its stride says nothing
        const int length = vector_length<T>(x.data, one ? 0 : x.codebook_stride, x.row_stride,
                                            one ? 0 : codebook.codebook_stride, codebook.row_stride, args.width);
        const bool vectors = length > 1 && reinterpret_cast<uintptr_t>(codebook.data) % kChunk == 0;
        return vectors ? nearest<T, true>(args, stream) : nearest<T, false>(args, stream);
    });
}

}  // namespace xlayer::cuda::quantize
