// Reductions of the aggregate operators in a fixed order: column sums, and elementwise sums of a few arrays.
#include "cuda/aggregate/common.cuh"

namespace xlayer::cuda::aggregate {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// Sums lane l's value over the block's warps, for every l.
template <class A>
__device__ __forceinline__ A add_over_warps(A own, A* shared) {
    sync_block();  // the last use of `shared` is over
    shared[threadIdx.x] = own;
    sync_block();
    A sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared[w * kWarpSize + threadIdx.x % kWarpSize];
    return sum;
}

// Σ number(r) over each kWarps-th r of [first, end), in chains side by side: they round less than one, and do not wait.
template <class A, class F>
__device__ __forceinline__ A sum_in_chains(int64_t first, int64_t end, const F& number) {
    constexpr int kChains = 4;
    A sum[kChains] = {};
#pragma unroll 2
    for (int64_t r = first; r < end; r += kChains * kWarps) {
#pragma unroll
        for (int i = 0; i < kChains; ++i)
            if (r + i * kWarps < end) sum[i] += number(r + i * kWarps);
    }
#pragma unroll
    for (int half = kChains / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    }
    return sum[0];
}

// A lane per column; every warp takes each kWarps-th row.
// resources: aggregate_finish_kernel threads 256, registers 64, shared 2048, occupancy 0.5
// sass: aggregate_finish_kernel LDG
template <class T>
__global__ void __launch_bounds__(kThreads, 4) aggregate_finish_kernel(ColumnSums args) {
    using A = Accumulator<T>;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kWarpSize; first < args.columns;
         first += static_cast<int64_t>(gridDim.x) * kWarpSize) {
        const int64_t c = first + lane;
        const A* const from = static_cast<const A*>(args.partials) + c;
        A sum =
            sum_in_chains<A>(warp, c < args.columns ? args.rows : 0, [&](int64_t r) { return from[r * args.pitch]; });
        sum = add_over_warps(sum, shared_memory<A>());
        if (warp > 0 || c >= args.columns) continue;
        if (args.logits != nullptr) {
            const Gate<A> gate = gate_of<A>(args.logits, c);
            sum *= gate.keep * gate.take;
        }
        static_cast<T*>(args.out)[c] = narrow<T>(sum);
    }
}

struct Partials {
    DType dtype;
    const void* x;
    int64_t rows, columns, run;  // run: rows of a partial sum
    void* out;
};

// A lane per column, blocks of y a run each.
// resources: aggregate_column_kernel threads 256, registers 64, shared 2048, occupancy 0.5
// sass: aggregate_column_kernel LDG
template <class T>
__global__ void __launch_bounds__(kThreads, 4) aggregate_column_kernel(Partials args) {
    using A = Accumulator<T>;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t begin = blockIdx.y * args.run, end = begin + args.run < args.rows ? begin + args.run : args.rows;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kWarpSize; first < args.columns;
         first += static_cast<int64_t>(gridDim.x) * kWarpSize) {
        const int64_t c = first + lane;
        const T* const from = static_cast<const T*>(args.x) + c;
        A sum = sum_in_chains<A>(begin + warp, c < args.columns ? end : 0,
                                 [&](int64_t r) { return widen(from[r * args.columns]); });
        sum = add_over_warps(sum, shared_memory<A>());
        if (warp == 0 && c < args.columns) static_cast<A*>(args.out)[blockIdx.y * args.columns + c] = sum;
    }
}

// resources: aggregate_add_kernel threads 256, registers 40, shared 0, occupancy 0.75
// sass: aggregate_add_kernel<*, [!1]> LDG.128, only STG.128
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 6) aggregate_add_kernel(AddRows args) {
    using A = Accumulator<T>;
    const int64_t vectors = args.width / V, step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < args.tokens * vectors;
         at += step) {
        const int64_t token = at / vectors, e = at % vectors * V, place = token * args.width + e;
        A first[V], second[V], third[V];
        load_wide<T, V>(static_cast<const T*>(args.first) + token * args.first_stride + e, true, first);
        load_wide<T, V>(static_cast<const T*>(args.second) + place, args.second != nullptr, second);
        load_wide<T, V>(static_cast<const T*>(args.third) + place, args.third != nullptr, third);
#pragma unroll
        for (int v = 0; v < V; ++v) first[v] += second[v] + third[v];
        store_narrow<T, V>(static_cast<T*>(args.out) + place, first);
    }
}

// Rows of a partial sum: enough runs to fill a GPU, and no more than help.
int64_t run_of(int64_t rows, int64_t columns) {
    constexpr int64_t kTargetBlocks = 1024, kMinRows = 64;
    const int64_t runs = ceil_div(kTargetBlocks, ceil_div(columns, kWarpSize));
    const int64_t run = ceil_div(rows, runs);
    return run > kMinRows ? run : kMinRows;
}

}  // namespace

void finish_columns(const ColumnSums& args, void* stream) {
    dispatch_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        launch("aggregate_finish", aggregate_finish_kernel<T>,
               {min_size(ceil_div(args.columns, kWarpSize), kMaxBlocks), kThreads, stream,
                kThreads * sizeof(Accumulator<T>)},
               args);
    });
}

int64_t sum_columns_workspace(const SumColumns& args) {
    const int64_t runs = ceil_div(args.rows, run_of(args.rows, args.columns));
    return product_of_sizes(runs, args.columns, args.dtype == DType::float64 ? 8 : 4);
}

void sum_columns(const SumColumns& args, void* stream) {
    const int64_t run = run_of(args.rows, args.columns), runs = ceil_div(args.rows, run);
    const Partials partials{args.dtype, args.x, args.rows, args.columns, run, args.workspace};
    dispatch_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        launch("aggregate_column", aggregate_column_kernel<T>,
               {min_size(ceil_div(args.columns, kWarpSize), kMaxBlocks), kThreads, stream,
                kThreads * sizeof(Accumulator<T>), runs},
               partials);
    });
    for (const SumColumns::Part& part : args.parts) {
        const size_t offset = part.first * (args.dtype == DType::float64 ? 8 : 4);
        if (part.count == 0) continue;
        finish_columns({args.dtype, static_cast<const char*>(args.workspace) + offset, runs, part.count, args.columns,
                        nullptr, part.out},
                       stream);
    }
}

void add_rows(const AddRows& args, void* stream) {
    dispatch_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int full = 16 / sizeof(T);
        const bool vectors = vector_length<T>(args.first, args.first_stride, args.width) > 1 &&
                             vector_length<T>(args.second) > 1 && vector_length<T>(args.third) > 1 &&
                             vector_length<T>(args.out) > 1;
        const int64_t count = args.tokens * args.width / (vectors ? full : 1);
        launch("aggregate_add", vectors ? aggregate_add_kernel<T, full> : aggregate_add_kernel<T, 1>,
               {min_size(ceil_div(count, kThreads), kMaxBlocks), kThreads, stream}, args);
    });
}

}  // namespace xlayer::cuda::aggregate
