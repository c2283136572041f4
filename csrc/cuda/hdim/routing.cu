// masked_mean (xlayer/routing.h) and its backward, deterministic: every sum has one fixed order, no atomics. A block
// takes one sequence and a tile of kWarpSize·N columns; its warps take every kWarps-th token.
#include "cuda/common/device.cuh"
#include "xlayer/routing.h"

namespace xlayer::cuda::hdim {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlocksPerMultiprocessor = 4;

// One block's tile: sequence b and columns [column, column + kWarpSize·N).
struct Tile {
    int64_t b, column;
};

template <int N>
__host__ __device__ int64_t tiles_of(int64_t width) {
    return (width + kWarpSize * N - 1) / (kWarpSize * N);
}

template <int N>
__device__ Tile tile_of(int64_t index, int64_t width) {
    const int64_t tiles = tiles_of<N>(width);
    return {index / tiles, index % tiles * kWarpSize * N};
}

__device__ bool allowed(const TokenMask& mask, int64_t b, int64_t s, int64_t tokens) {
    return s < tokens && (mask.data == nullptr || mask.data[b * mask.batch_stride + s * mask.token_stride] != 0);
}

// Shared memory of the forward; the backward has the counts alone.
template <class A, int N>
struct Shared {
    int64_t counts[kWarps];
    A partial[kWarps][kWarpSize * N];
};

// FragmentC of `value` over the block's warps, equal in all threads; `value` is the same in all lanes of a warp.
__device__ int64_t sum_over_warps(int64_t value, int64_t* shared) {
    sync_block();  // the last use of `shared` is over
    if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
    sync_block();
    int64_t sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
    return sum;
}

// resources: masked_mean_kernel threads 256, registers 64, shared 8256, occupancy 0.5
// sass: masked_mean_kernel<*, [!1]> LDG.128
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) masked_mean_kernel(MaskedMeanForward args) {
    using A = Accumulator<T>;
    Shared<A, N>& shared = *shared_memory<Shared<A, N>>();
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int64_t tiles = args.batch * tiles_of<N>(args.width);

    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = tile_of<N>(index, args.width);
        const int64_t column = tile.column + lane * N;
        const bool inside = column < args.width;
        const T* x = static_cast<const T*>(args.x) + tile.b * args.x_batch_stride + column;

        // A warp takes tokens warp, warp + kWarps, …, 32 of them per step: each lane looks at the mask of one. Sums of
        // 32 are added to a sum of sums, so that rounding does not grow with the number of tokens in one chain.
        A sum[N] = {};
        int64_t count = 0;
        for (int64_t first = warp; first < args.tokens; first += kWarps * kWarpSize) {
            const unsigned bits = ballot(allowed(args.mask, tile.b, first + lane * kWarps, args.tokens));
            count += popcount(bits);
            A step[N] = {};
#pragma unroll 4
            for (int i = 0; i < kWarpSize; ++i) {
                if (!inside || !(bits >> i & 1)) continue;
                const Vector<T, N> row = load_vec<N>(x + (first + i * kWarps) * args.x_token_stride);
#pragma unroll
                for (int n = 0; n < N; ++n) step[n] += widen(row.at[n]);
            }
#pragma unroll
            for (int n = 0; n < N; ++n) sum[n] += step[n];
        }

#pragma unroll
        for (int n = 0; n < N; ++n) shared.partial[warp][lane * N + n] = sum[n];
        const int64_t total = sum_over_warps(count, shared.counts);  // its barrier also completes `partial`
        for (int c = threadIdx.x; c < kWarpSize * N && tile.column + c < args.width; c += kThreads) {
            A mean = 0;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) mean += shared.partial[w][c];
            static_cast<T*>(args.out)[tile.b * args.width + tile.column + c] =
                narrow<T>(total ? mean / static_cast<A>(total) : A(0));
        }
        sync_block();  // `partial` is free again
    }
}

// resources: masked_mean_backward_kernel threads 256, registers 64, shared 64, occupancy 0.5
// sass: masked_mean_backward_kernel<*, [!1]> LDG.128, only STG.128
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    masked_mean_backward_kernel(MaskedMeanBackward args) {
    using A = Accumulator<T>;
    int64_t* counts = shared_memory<int64_t>();
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int64_t tiles = args.batch * tiles_of<N>(args.width);

    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = tile_of<N>(index, args.width);
        const int64_t column = tile.column + lane * N;
        int64_t count = 0;
        for (int64_t first = warp * kWarpSize; first < args.tokens; first += kThreads) {
            count += popcount(ballot(allowed(args.mask, tile.b, first + lane, args.tokens)));
        }
        const A total = static_cast<A>(sum_over_warps(count, counts));
        if (column >= args.width) continue;  // all barriers of this tile are behind

        const Vector<T, N> grad =
            load_vec<N>(static_cast<const T*>(args.grad) + tile.b * args.grad_batch_stride + column);
        Vector<T, N> scaled;
#pragma unroll
        for (int n = 0; n < N; ++n) scaled.at[n] = narrow<T>(widen(grad.at[n]) / total);
        Vector<T, N> zero;
#pragma unroll
        for (int n = 0; n < N; ++n) zero.at[n] = narrow<T>(A(0));

        T* row = static_cast<T*>(args.grad_x) + tile.b * args.tokens * args.width + column;
        for (int64_t s = warp; s < args.tokens; s += kWarps) {
            store_vec(row + s * args.width, allowed(args.mask, tile.b, s, args.tokens) ? scaled : zero);
        }
    }
}

template <class T, int N>
void forward(const MaskedMeanForward& args, void* stream) {
    const size_t shared = sizeof(Shared<Accumulator<T>, N>);
    launch("masked_mean", masked_mean_kernel<T, N>, {args.batch * tiles_of<N>(args.width), kThreads, stream, shared},
           args);
}

template <class T, int N>
void backward(const MaskedMeanBackward& args, void* stream) {
    const size_t shared = sizeof(int64_t) * kWarps;
    launch("masked_mean_backward", masked_mean_backward_kernel<T, N>,
           {args.batch * tiles_of<N>(args.width), kThreads, stream, shared}, args);
}

}  // namespace

void masked_mean_forward(const MaskedMeanForward& args, void* stream) {
    dispatch_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        const int length = vector_length<T>(args.x, args.x_batch_stride, args.x_token_stride, args.width);
        return length > 1 ? forward<T, 16 / sizeof(T)>(args, stream) : forward<T, 1>(args, stream);
    });
}

void masked_mean_backward(const MaskedMeanBackward& args, void* stream) {
    dispatch_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        const int length = vector_length<T>(args.grad, args.grad_batch_stride, args.width);
        return length > 1 ? backward<T, 16 / sizeof(T)>(args, stream) : backward<T, 1>(args, stream);
    });
}

}  // namespace xlayer::cuda::hdim
