// The sort of vq_statistics (statistics.cu): a stable radix sort of the row numbers by code, 8 bits in a pass. A pass
// counts the digits of every kChunkRows rows, scans the counts, and scatters.
//
// Indices are read once, by the first count, which stores entries: a concurrent writer cannot make a pass scatter other
// rows than it counted.
#pragma once

#include "cuda/quantize/common.cuh"

namespace xlayer::cuda::quantize {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBits = 8, kDigits = 1 << kBits;  // of one pass
constexpr int kRounds = 4;                      // rows of a lane
constexpr int kChunkRows = kThreads * kRounds;  // that one block sorts

static_assert(kThreads == kDigits, "a thread per digit");

// A sort entry: the code of a row, `codes` for rows that count nowhere, and the number of the row.
struct Entry {
    uint32_t code, row;
};

struct Pass {
    int64_t num_codebooks, rows, codes, chunks;
    int shift;               // of the digit of this pass
    const int64_t* indices;  // the first count makes entries of these; null: it was done
    int64_t index_codebook_stride, index_row_stride;
    Entry* from;  // [num_codebooks][rows]
    Entry* to;
    uint32_t* counts;  // [num_codebooks][kDigits][chunks]: first how many rows, then how many in the chunks before
    uint32_t* totals;  // [num_codebooks][kDigits]

    __device__ __forceinline__ Entry entry(int64_t h, int64_t at) const {
        if (indices == nullptr) return load_vec<1>(static_cast<const Entry*>(from) + h * rows + at).at[0];
        const int64_t index = indices[h * index_codebook_stride + at * index_row_stride];
        const bool counted = index >= 0 && index < codes;
        return {static_cast<uint32_t>(counted ? index : codes), static_cast<uint32_t>(at)};
    }
    __device__ __forceinline__ int digit(const Entry& entry) const { return entry.code >> shift & (kDigits - 1); }
};

// Which lanes have this lane's digit; lanes that are not `real` are alone with their kind.
__device__ __forceinline__ unsigned same_digit(int digit, bool real) {
    unsigned same = ballot(real);
    if (!real) same = ~same;
#pragma unroll
    for (int bit = 0; bit < kBits; ++bit) {
        const bool set = digit >> bit & 1;
        const unsigned with = ballot(set);
        same &= set ? with : ~with;
    }
    return same;
}

// A warp takes kRounds·32 neighbouring rows, 32 in a round. Calls f(entry, digit, lanes with it) in every round.
template <class F>
__device__ __forceinline__ void for_thread_rows(const Pass& args, int64_t h, int64_t chunk, const F& f) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int64_t first = chunk * kChunkRows + warp * kWarpSize * kRounds + lane;
    for (int round = 0; round < kRounds; ++round) {
        const int64_t at = first + round * kWarpSize;
        const bool real = at < args.rows;
        const Entry entry = real ? args.entry(h, at) : Entry{0, 0};
        const int digit = args.digit(entry);
        const unsigned same = same_digit(digit, real);
        f(entry, digit, same, real);
        sync_warp();
    }
}

__device__ __forceinline__ bool is_first_of(unsigned lanes) {
    return (lanes & ((1u << threadIdx.x % kWarpSize) - 1)) == 0;
}

// resources: vq_count_kernel threads 256, registers 32, shared 8192, occupancy 1
// sass: vq_count_kernel VOTE
__global__ void __launch_bounds__(kThreads) vq_count_kernel(Pass args) {
    uint32_t* const counts = shared_memory<uint32_t>();  // [kWarps][kDigits]
    const int thread = static_cast<int>(threadIdx.x);
    for (int64_t block = blockIdx.x; block < args.num_codebooks * args.chunks; block += gridDim.x) {
        const int64_t h = block / args.chunks, chunk = block % args.chunks;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) counts[warp * kDigits + thread] = 0;
        sync_block();
        uint32_t* const warp_digits = counts + thread / kWarpSize * kDigits;
        for_thread_rows(args, h, chunk, [&](const Entry& entry, int digit, unsigned same, bool real) {
            if (real && is_first_of(same)) warp_digits[digit] += popcount(same);
            if (real && args.indices != nullptr)
                store_vec(args.from + h * args.rows + entry.row, Vector<Entry, 1>{{entry}});
        });
        sync_block();
        uint32_t sum = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) sum += counts[warp * kDigits + thread];
        args.counts[(h * kDigits + thread) * args.chunks + chunk] = sum;
        sync_block();
    }
}

// The sum of `value` over the threads before this one, and over all in `total`. `shared`: kWarps numbers, free again.
__device__ __forceinline__ uint32_t exclusive_sum(uint32_t value, uint32_t* shared, uint32_t& total) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
    uint32_t through = value;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const uint32_t before = shuffle(through, lane >= distance ? lane - distance : lane);
        if (lane >= distance) through += before;
    }
    if (lane == kWarpSize - 1) shared[warp] = through;
    sync_block();
    uint32_t before = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        before += w < warp ? shared[w] : 0;
        total += shared[w];
    }
    sync_block();
    return before + through - value;
}

// A block per digit: its rows in the chunks before each.
// resources: vq_scan_kernel threads 256, registers 32, shared 32, occupancy 1
// sass: vq_scan_kernel SHFL
__global__ void __launch_bounds__(kThreads) vq_scan_kernel(Pass args) {
    uint32_t* const shared = shared_memory<uint32_t>();
    for (int64_t row = blockIdx.x; row < args.num_codebooks * kDigits; row += gridDim.x) {
        uint32_t* const counts = args.counts + row * args.chunks;
        uint32_t sum = 0;
        for (int64_t first = 0; first < args.chunks; first += kThreads) {
            const int64_t chunk = first + threadIdx.x;
            uint32_t total;
            const uint32_t before = exclusive_sum(chunk < args.chunks ? counts[chunk] : 0, shared, total);
            if (chunk < args.chunks) counts[chunk] = sum + before;
            sum += total;
        }
        if (threadIdx.x == 0) args.totals[row] = sum;
    }
}

// resources: vq_scatter_kernel threads 256, registers 32, shared 8224, occupancy 1
// sass: vq_scatter_kernel VOTE, SHFL
__global__ void __launch_bounds__(kThreads) vq_scatter_kernel(Pass args) {
    uint32_t* const places = shared_memory<uint32_t>();  // [kWarps][kDigits]: where the next row with the digit goes
    uint32_t* const sums = places + kWarps * kDigits;
    const int thread = static_cast<int>(threadIdx.x);
    for (int64_t block = blockIdx.x; block < args.num_codebooks * args.chunks; block += gridDim.x) {
        const int64_t h = block / args.chunks, chunk = block % args.chunks;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) places[warp * kDigits + thread] = 0;
        uint32_t all;
        uint32_t place = exclusive_sum(args.totals[h * kDigits + thread], sums, all);  // its barriers: zeros are there
        place += args.counts[(h * kDigits + thread) * args.chunks + chunk];
        uint32_t* const warp_digits = places + thread / kWarpSize * kDigits;
        for_thread_rows(args, h, chunk, [&](const Entry&, int digit, unsigned same, bool real) {
            if (real && is_first_of(same)) warp_digits[digit] += popcount(same);
        });
        sync_block();
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) {
            const uint32_t count = places[warp * kDigits + thread];
            places[warp * kDigits + thread] = place;
            place += count;
        }
        sync_block();
        for_thread_rows(args, h, chunk, [&](const Entry& entry, int digit, unsigned same, bool real) {
            const unsigned before = same & ((1u << threadIdx.x % kWarpSize) - 1);
            const uint32_t at = real ? warp_digits[digit] + popcount(before) : 0;
            sync_warp();
            if (!real) return;
            if (before == 0) warp_digits[digit] += popcount(same);
            store_vec(args.to + h * args.rows + at, Vector<Entry, 1>{{entry}});
        });
        sync_block();
    }
}

}  // namespace
}  // namespace xlayer::cuda::quantize
