// Row statistics for ema_scan with norm where a row is too long for the registers or the shared memory of a block: mean
// and deviation of every row, and the row means of its backward.
#include "cuda/aggregate/common.cuh"

namespace xlayer::cuda::aggregate {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

struct Statistics {
    EmaScan scan;
    void* out;  // [layers, tokens, kStatistics]
};

// A block per row, which it goes over twice: the second time it finds it in the caches.
// resources: ema_statistics_kernel threads 256, registers 64, shared 1536, occupancy 0.5
// sass: ema_statistics_kernel<*, [!1]> LDG.128
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4) ema_statistics_kernel(Statistics args) {
    using A = Accumulator<T>;
    const EmaScan& s = args.scan;
    Team<A> team(kThreads, shared_memory<A>());
    for (int64_t row = blockIdx.x; row < s.layers * s.tokens; row += gridDim.x) {
        const T* const x =
            static_cast<const T*>(s.x.data) + row / s.tokens * s.x.layer_stride + row % s.tokens * s.x.token_stride;
        const auto sums_of = [&](A mean, A(&sums)[2]) {
            sums[0] = sums[1] = 0;
#pragma unroll 2
            for (int64_t e = static_cast<int64_t>(threadIdx.x) * V; e < s.width; e += kThreads * V) {
                const Vector<T, V> some = load_vec<V>(x + e);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const A number = widen(some.at[v]) - mean;
                    sums[0] += number;
                    sums[1] = fma(number, number, sums[1]);
                }
            }
            team.add(sums);
        };
        A sums[2];
        sums_of(0, sums);
        const A mean = sums[0] / static_cast<A>(s.width);
        sums_of(mean, sums);
        if (threadIdx.x > 0) continue;
        const Norm<A> norm = norm_of(sums[0], sums[1], s.width, s.eps);
        A* const out = static_cast<A*>(args.out) + row * kStatistics;
        out[0] = mean, out[1] = norm.inverse, out[2] = norm.shift;
    }
}

// A block per token. It takes as many columns as it has vectors at a time and scans them down all layers; a warp
// accumulates each layer's sums in shared memory of its own.
// resources: ema_row_means_kernel threads 256, registers 64, shared 65536, occupancy 0.25
// sass: ema_row_means_kernel<*, [!1]> LDG.128
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4) ema_row_means_kernel(EmaBackwardPlan plan) {
    using A = Accumulator<T>;
    const EmaScan& s = plan.args.scan;
    const LayerRows &x = s.x, &grad = plan.args.grad;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
    A* const sums = shared_memory<A>();  // [layers][warps][2]
    for (int64_t token = blockIdx.x; token < s.tokens; token += gridDim.x) {
        for (int64_t i = threadIdx.x; i < s.layers * kWarps * 2; i += kThreads) sums[i] = 0;
        sync_block();
        for (int64_t first = 0; first < s.width; first += kThreads * V) {
            const int64_t e = first + static_cast<int64_t>(threadIdx.x) * V;
            const bool inside = e < s.width;
            A adjoint[V] = {}, weight[V] = {};
            if (inside) load_split<V>(static_cast<const A*>(s.norm_weight) + e, kSplit<A, V>, weight);
            A keep = 0;  // of the layer above
            for (int64_t layer = s.layers - 1; layer >= 0; --layer) {
                A incoming[V], tap[V], sum[2] = {};
                load_wide<T, V>(
                    static_cast<const T*>(grad.data) + layer * grad.layer_stride + token * grad.token_stride + e,
                    inside && (!s.last_only || layer == s.layers - 1), incoming);
                load_wide<T, V>(static_cast<const T*>(x.data) + layer * x.layer_stride + token * x.token_stride + e,
                                inside, tap);
                const RowNorm<A> norm = RowNorm<A>::load_of(plan.statistics, layer * s.tokens + token);
                const Gate<A> gate = gate_of<A>(s.gate_logits, layer);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    adjoint[v] = fma(keep, adjoint[v], incoming[v]);
                    const A inner = gate.take * adjoint[v] * weight[v];
                    sum[0] += inner;
                    sum[1] = fma(inner, norm(tap[v]), sum[1]);
                }
                keep = gate.keep;
#pragma unroll
                for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
                    sum[0] += shuffle_xor(sum[0], mask);
                    sum[1] += shuffle_xor(sum[1], mask);
                }
                if (lane > 0) continue;
                sums[(layer * kWarps + warp) * 2] += sum[0];
                sums[(layer * kWarps + warp) * 2 + 1] += sum[1];
            }
        }
        sync_block();
        for (int64_t i = threadIdx.x; i < s.layers * 2; i += kThreads) {
            A sum = 0;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += sums[(i / 2 * kWarps + w) * 2 + i % 2];
            static_cast<A*>(plan.row_means)[(i / 2 * s.tokens + token) * 2 + i % 2] = sum / static_cast<A>(s.width);
        }
        sync_block();
    }
}

}  // namespace

void ema_statistics(const EmaScan& scan, void* statistics, void* stream) {
    dispatch_dtype(scan.dtype, [&](auto element) {
        using T = decltype(element);
        const bool vectors = vector_length<T>(scan.x.data, scan.x.layer_stride, scan.x.token_stride, scan.width) > 1;
        launch("ema_statistics", vectors ? ema_statistics_kernel<T, 16 / sizeof(T)> : ema_statistics_kernel<T, 1>,
               {min_size(scan.layers * scan.tokens, kMaxBlocks), kThreads, stream,
                team_elements(kThreads) * sizeof(Accumulator<T>)},
               Statistics{scan, statistics});
    });
}

void ema_row_means(const EmaBackwardPlan& plan, void* stream) {
    const EmaScan& s = plan.args.scan;
    const LayerRows &x = s.x, &grad = plan.args.grad;
    dispatch_dtype(s.dtype, [&](auto element) {
        using T = decltype(element);
        using A = Accumulator<T>;
        const bool vectors = vector_length<T>(x.data, x.layer_stride, x.token_stride, s.width) > 1 &&
                             vector_length<T>(grad.data, grad.layer_stride, grad.token_stride) > 1 &&
                             vector_length<A>(s.norm_weight) > 1;
        launch(
            "ema_row_means", vectors ? ema_row_means_kernel<T, 16 / sizeof(T)> : ema_row_means_kernel<T, 1>,
            {min_size(s.tokens, kMaxBlocks), kThreads, stream, static_cast<size_t>(s.layers) * kWarps * 2 * sizeof(A)},
            plan);
    });
}

}  // namespace xlayer::cuda::aggregate
