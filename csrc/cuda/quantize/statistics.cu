// vq_statistics (xlayer/quantize.h), deterministic: no atomics, and the sum of a code has an order of its own, that of
// its rows, whatever else there is.
//
// The row numbers are sorted by code (sort.cuh). Then a warp per code and tile of columns adds its rows: the first
// kPartialRows itself, the others from partial sums of kPartialRows rows by a kernel before, so that a code with all
// rows does not leave the GPU to one warp.
#include "cuda/quantize/sort.cuh"

namespace xlayer::cuda::quantize {
namespace {

constexpr int kPartialRows = 128;  // rows of a piece of a sum

// --- Sums ----------------------------------------------------------------------------------------------------------

template <class A>
struct Sums {
    int64_t num_codebooks, rows, codes, width, windows;  // windows of kPartialRows sorted rows
    VqRows x;
    const Entry* sorted;  // [num_codebooks][rows]
    uint32_t* offsets;    // [num_codebooks][codes + 1]: where the rows of a code begin
    A* partials;          // [num_codebooks][windows][width]
    A* counts;
    A* sums;
};

// A thread per code and one for the end: the first sorted row whose code is not below it.
// resources: vq_offsets_kernel threads 256, registers 32, shared 0, occupancy 1
// sass: vq_offsets_kernel LDG
template <class A>
__global__ void __launch_bounds__(kThreads) vq_offsets_kernel(Sums<A> args) {
    const int64_t count = args.num_codebooks * (args.codes + 1), step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count; at += step) {
        const int64_t h = at / (args.codes + 1);
        const uint32_t code = static_cast<uint32_t>(at % (args.codes + 1));
        const Entry* const sorted = args.sorted + h * args.rows;
        int64_t low = 0, high = args.rows;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (sorted[middle].code < code) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        args.offsets[at] = static_cast<uint32_t>(low);
    }
}

// Adds numbers in one order, in sums of 8, of 128 and of all, so that rounding grows little with their count.
template <class A, int N>
struct Cascade {
    static constexpr int kFirst = 8, kSecond = 16;
    A second[N] = {}, third[N] = {};
    int count = 0;

    __device__ __forceinline__ void add(const A (&first)[N]) {
#pragma unroll
        for (int n = 0; n < N; ++n) second[n] += first[n];
        if (++count % kSecond == 0) flush();
    }
    __device__ __forceinline__ void flush() {
#pragma unroll
        for (int n = 0; n < N; ++n) third[n] += second[n], second[n] = 0;
    }
};

// Tiles of columns that warps take; one for rows of no columns, whose counts are wanted too.
template <int N>
__host__ __device__ int64_t tiles_of(int64_t width) {
    return width > 0 ? ceil_div(width, kWarpSize * N) : 1;
}

// Calls f(h, item, tile of columns) for what is this warp's: items along x of the grid, the others along y, whose
// division is one of 32 bits; one of 64 is a call, around which registers spill.
template <int N, class F>
__device__ __forceinline__ void for_warps(int64_t num_codebooks, int64_t items, int64_t width, const F& f) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
    const auto tiles = static_cast<unsigned>(tiles_of<N>(width));
    for (unsigned y = blockIdx.y; y < num_codebooks * tiles; y += gridDim.y) {
        for (int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; item < items;
             item += step)
            f(y / tiles, item, y % tiles);
    }
}

// A warp's columns: kWarpSize · N of them, this lane's from `column` on.
template <class T, int N>
struct Columns {
    using A = Accumulator<T>;
    int64_t column;
    bool inside;

    __device__ __forceinline__ Columns(int64_t tile, int64_t width)
        : column((tile * kWarpSize + threadIdx.x % kWarpSize) * N), inside(column < width) {}

    // Rows sorted[0 … count) of x, a codebook's; all lanes together.
    __device__ __forceinline__ void add_rows(Cascade<A, N>& to, const VqRows& rows, int64_t h, const Entry* sorted,
                                             int count) const {
        const T* const x = static_cast<const T*>(rows.data) + h * rows.codebook_stride + column;
        const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
        for (int base = 0; base < count; base += kWarpSize) {
            const unsigned row = base + lane < count ? sorted[base + lane].row : 0;
            for (int first = base; first < base + kWarpSize && first < count; first += Cascade<A, N>::kFirst) {
                A sum[N] = {};
#pragma unroll
                for (int i = 0; i < Cascade<A, N>::kFirst; ++i) {
                    const int64_t from = shuffle(row, first - base + i);
                    if (!inside || first + i >= count) continue;
                    const Vector<T, N> value = load_vec<N>(x + from * rows.row_stride);
#pragma unroll
                    for (int n = 0; n < N; ++n) sum[n] += widen(value.at[n]);
                }
                to.add(sum);
            }
        }
    }
};

// The first position of a piece other than a code's first in window `window` of sorted rows, and where the code's rows
// end; there is one at most. `end` 0: none.
template <class A>
__device__ __forceinline__ void find_partial(const Sums<A>& args, int64_t h, int64_t window, int64_t& begin,
                                             int64_t& end) {
    const int64_t first = window * kPartialRows;
    const uint32_t code = args.sorted[h * args.rows + first].code;
    end = 0;
    if (code >= args.codes) return;
    const uint32_t* const offsets = args.offsets + h * (args.codes + 1) + code;
    const int64_t start = offsets[0];
    begin = start + round_up(first - start, kPartialRows);
    if (begin == start || begin >= offsets[1]) return;
    end = begin + kPartialRows < offsets[1] ? begin + kPartialRows : offsets[1];
}

// A warp per window and tile of columns: the piece that begins there.
// resources: vq_partial_sums_kernel threads 256, registers 72, shared 0, occupancy 0.375
// sass: vq_partial_sums_kernel<*, [!1]> LDG.128
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 3) vq_partial_sums_kernel(Sums<Accumulator<T>> args) {
    using A = Accumulator<T>;
    for_warps<N>(args.num_codebooks, args.windows, args.width, [&](int64_t h, int64_t window, int64_t tile) {
        int64_t begin = 0, end;
        find_partial(args, h, window, begin, end);
        if (end == 0) return;
        const Columns<T, N> columns(tile, args.width);
        Cascade<A, N> sum;
        columns.add_rows(sum, args.x, h, args.sorted + h * args.rows + begin, static_cast<int>(end - begin));
        sum.flush();
        if (!columns.inside) return;
        A* const to = args.partials + (h * args.windows + window) * args.width + columns.column;
#pragma unroll
        for (int n = 0; n < N; ++n) to[n] = sum.third[n];
    });
}

// A warp per code and tile of columns.
// resources: vq_sums_kernel threads 256, registers 80, shared 0, occupancy 0.375
// sass: vq_sums_kernel<*, [!1]> LDG.128
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 3) vq_sums_kernel(Sums<Accumulator<T>> args) {
    using A = Accumulator<T>;
    for_warps<N>(args.num_codebooks, args.codes, args.width, [&](int64_t h, int64_t code, int64_t tile) {
        const uint32_t* const offsets = args.offsets + h * (args.codes + 1) + code;
        const int64_t start = offsets[0], rows = offsets[1] - start;
        const Columns<T, N> columns(tile, args.width);
        Cascade<A, N> sum;
        columns.add_rows(sum, args.x, h, args.sorted + h * args.rows + start,
                         static_cast<int>(rows < kPartialRows ? rows : kPartialRows));
        sum.flush();
        if (columns.inside) {
            // The other pieces, each in the window in which it begins.
            const int64_t partials = rows > 0 ? (rows - 1) / kPartialRows : 0, first = start / kPartialRows + 1;
            const A* const from = args.partials + (h * args.windows + first) * args.width + columns.column;
            Cascade<A, N> others;
            for (int64_t partial = 0; partial < partials; partial += Cascade<A, N>::kFirst) {
                A some[N] = {};
#pragma unroll
                for (int i = 0; i < Cascade<A, N>::kFirst; ++i) {
                    if (partial + i >= partials) break;
#pragma unroll
                    for (int n = 0; n < N; ++n) some[n] += from[(partial + i) * args.width + n];
                }
                others.add(some);
            }
            others.flush();
            A* const to = args.sums + (h * args.codes + code) * args.width + columns.column;
#pragma unroll
            for (int n = 0; n < N; ++n) to[n] = sum.third[n] + others.third[n];
        }
        if (tile == 0 && threadIdx.x % kWarpSize == 0) args.counts[h * args.codes + code] = static_cast<A>(rows);
    });
}

// --- Launches ------------------------------------------------------------------------------------------------------

template <class A>
struct Plan {
    int64_t chunks, windows;
    Entry* entries[2];
    uint32_t *counts, *totals, *offsets;
    A* partials;
    int64_t bytes;

    explicit Plan(const VqStatistics& args)
        : chunks(ceil_div(args.rows, kChunkRows)), windows(ceil_div(args.rows, kPartialRows)) {
        Workspace space(args.workspace);
        for (Entry*& some : entries) some = space.take<Entry>(args.num_codebooks, args.rows);
        counts = space.take<uint32_t>(args.num_codebooks, kDigits, chunks);
        totals = space.take<uint32_t>(args.num_codebooks, kDigits);
        offsets = space.take<uint32_t>(args.num_codebooks, args.codes + 1);
        partials = space.take<A>(args.num_codebooks, windows, args.width);
        bytes = space.bytes;
    }
};

int64_t blocks_of(int64_t count, int64_t each) {
    const int64_t blocks = ceil_div(count, each);
    return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

// Sorts, and returns where the sorted entries are.
template <class A>
const Entry* sort(const VqStatistics& args, const Plan<A>& plan, void* stream) {
    Pass pass{args.num_codebooks,
              args.rows,
              args.codes,
              plan.chunks,
              0,
              args.indices,
              args.index_codebook_stride,
              args.index_row_stride,
              plan.entries[1],
              plan.entries[0],
              plan.counts,
              plan.totals};
    constexpr size_t shared = kWarps * kDigits * sizeof(uint32_t), sums = kWarps * sizeof(uint32_t);
    for (; pass.shift == 0 || args.codes >> pass.shift != 0; pass.shift += kBits) {
        const int64_t blocks = blocks_of(args.num_codebooks * plan.chunks, 1);
        launch("vq_count", vq_count_kernel, {blocks, kThreads, stream, shared}, pass);
        pass.indices = nullptr;
        launch("vq_scan", vq_scan_kernel, {blocks_of(args.num_codebooks * kDigits, 1), kThreads, stream, sums}, pass);
        launch("vq_scatter", vq_scatter_kernel, {blocks, kThreads, stream, shared + sums}, pass);
        pass.from = pass.to;
        pass.to = plan.entries[pass.from == plan.entries[0]];
    }
    return pass.from;
}

template <class T, int N>
void add_up(const Sums<Accumulator<T>>& sums, void* stream) {
    const int64_t across = blocks_of(sums.num_codebooks * tiles_of<N>(sums.width), 1);
    launch("vq_partial_sums", vq_partial_sums_kernel<T, N>,
           {blocks_of(sums.windows, kWarps), kThreads, stream, 0, across}, sums);
    launch("vq_sums", vq_sums_kernel<T, N>, {blocks_of(sums.codes, kWarps), kThreads, stream, 0, across}, sums);
}

}  // namespace

int64_t vq_statistics_workspace(const VqStatistics& args) {
    VqStatistics empty = args;
    empty.workspace = nullptr;
    return args.x.dtype == DType::float64 ? Plan<double>(empty).bytes : Plan<float>(empty).bytes;
}

void vq_statistics(const VqStatistics& args, void* stream) {
    constexpr int64_t limit = (int64_t{1} << 32) - 2;
    if (args.rows > limit || args.codes > limit) throw std::runtime_error("vq_statistics: 2^32 rows or codes, or more");
    dispatch_dtype(args.x.dtype, [&](auto element) {
        using T = decltype(element);
        using A = Accumulator<T>;
        constexpr int full = 16 / sizeof(T);
        const Plan<A> plan(args);
        const Entry* const sorted = sort(args, plan, stream);
        const Sums<A> sums{args.num_codebooks,
                           args.rows,
                           args.codes,
                           args.width,
                           plan.windows,
                           args.x,
                           sorted,
                           plan.offsets,
                           plan.partials,
                           static_cast<A*>(args.counts),
                           static_cast<A*>(args.sums)};
        launch("vq_offsets", vq_offsets_kernel<A>,
               {blocks_of(args.num_codebooks * (args.codes + 1), kThreads), kThreads, stream}, sums);
        // Narrow rows would leave most lanes without a vector.
        const int64_t codebook_stride = args.num_codebooks == 1 ? 0 : args.x.codebook_stride;
        const bool vectors =
            args.width >= 8 * full && vector_length<T>(args.x.data, codebook_stride, args.x.row_stride, args.width) > 1;
        return vectors ? add_up<T, full>(sums, stream) : add_up<T, 1>(sums, stream);
    });
}

}  // namespace xlayer::cuda::quantize
