// The search of vq_nearest (nearest.cu): a GEMM of rows and codes with an argmin epilogue. A block computes kBlockRows
// rows by tiles of kBlockCodes codes, in slices of kRowBytes of the width through a cp.async pipeline of kStages
// stages; each row's best score and code stay in registers while the codes pass. Where shared memory allows it, x stays
// resident and only codes are streamed.
#pragma once

#include "cuda/common/fragment.cuh"
#include "cuda/quantize/common.cuh"

namespace xlayer::cuda::quantize {
namespace {

template <class A>
using Terms = Vector<A, 2>;  // bias, scale

// Tiles lie in shared memory as rows of 64 bytes, four chunks of 16, swizzled by row: neither the 8 rows of a matrix
// for ldmatrix nor the rows that lanes read pairs of numbers from have bank conflicts.

constexpr int kThreads = 256;
constexpr int kRowGroups = 4, kCodeGroups = 2;  // of warps
constexpr int kStages = 3;
// Stages of the bias and scale of a tile's codes, read after the barrier that frees the stage of the tile's last slice.
constexpr int kTermStages = kStages + 1;
constexpr int kChunk = 16, kChunks = 4, kRowBytes = kChunk * kChunks;
constexpr int64_t kMaxSharedBytes = 163 * 1024;  // of sm_80; sm_90 has more
constexpr int64_t kTargetBlocks = 264;           // the codes are split until there are as many

template <class T>
struct Shape {
    // Tiles of 16 rows and of 8 codes that a warp holds the scores of.
    static constexpr int kRows = is_half<T> ? 4 : 2;
    static constexpr int kCodes = sizeof(T) == 8 ? 4 : 8;
    static constexpr int kBlockRows = kRowGroups * 16 * kRows, kBlockCodes = kCodeGroups * 8 * kCodes;
    static constexpr int kDepth = kRowBytes / sizeof(T);  // of a slice of the width
    static constexpr int kGroups = is_half<T> ? 2 : 1;    // of 8 columns that one product takes
    static constexpr bool kPrefetch = sizeof(T) != 4;     // operands are loaded one product before their use
    static constexpr int kProducts = kDepth / (8 * kGroups);
};

template <class A>
struct Best {
    A score;
    int code;
};
// Returns the better of two; of equal scores the lower code. Scores are never NaN.
template <class A>
__device__ __forceinline__ Best<A> better(const Best<A>& a, const Best<A>& b) {
    return b.score < a.score || (b.score == a.score && b.code < a.code) ? b : a;
}

template <class A>
struct Search {
    VqRows x, codebook;
    int64_t rows, codes, width, padded;
    int64_t row_blocks;   // of one codebook
    int64_t tiles, span;  // of codes: in all, and of one block
    bool resident;        // x stays in shared memory
    const Terms<A>* terms;
    A* scores;  // [splits][num_codebooks][rows]
    int* found;
};

// Byte offset of chunk `chunk` of row `row` in a tile.
__device__ __forceinline__ int swizzled_offset(int row, int chunk) {
    const int swizzle = row / 2 % 2 * 2 + row / 4 % 2;
    return row * kRowBytes + (chunk ^ swizzle) * kChunk;
}

// Copies columns [column, column + kDepth) of the first `valid` of kRows rows, of which the first is at `from`; zeros
// beyond the rows and the width.
template <class T, int kRows, bool kVectors>
__device__ __forceinline__ void copy_slice(char* tile, const T* from, int64_t row_stride, int valid, int64_t column,
                                           int64_t width) {
    constexpr int kElements = kChunk / sizeof(T), kStep = kThreads / kChunks;
    const int chunk = static_cast<int>(threadIdx.x) % kChunks, row = static_cast<int>(threadIdx.x) / kChunks;
    column += chunk * kElements;
    const T* source = from + row * row_stride + column;
    char* const to = tile + swizzled_offset(row, chunk);
    if (column >= width) valid = 0;
#pragma unroll
    for (int r = 0; r < kRows; r += kStep) {
        const bool real = r + row < valid;
        if (kVectors && real) {
            copy_async(to + r * kRowBytes, source);
        } else {
            Vector<T, kElements> piece{};
            if constexpr (!kVectors) {
#pragma unroll
                for (int e = 0; e < kElements; ++e)
                    if (real && column + e < width) piece.at[e] = source[e];
            }
            store_vec<Space::generic>(reinterpret_cast<T*>(to + r * kRowBytes), piece);
        }
        source += kStep * row_stride;
    }
}

// Operands of one product of a warp: kRows × kCodes small matrices.
template <class T>
struct Operands {
    using S = Shape<T>;
    FragmentA<T> x[S::kRows][S::kGroups];
    FragmentB<T> code[S::kCodes][S::kGroups];

    // Loads columns [8·kGroups·product, …) of a slice; the warp's rows and codes begin at `first_row` and
    // `first_code`, multiples of 8.
    __device__ __forceinline__ void load(const char* rows, int first_row, const char* codes, int first_code,
                                         int product) {
        rows += first_row * kRowBytes, codes += first_code * kRowBytes;
        // Rows 8 apart have the same swizzle.
        if constexpr (is_half<T>) {
            const int lane = lane_id();
            rows += swizzled_offset(lane % 16, 2 * product + lane / 16);
            codes += swizzled_offset(lane / 16 * 8 + lane % 8, 2 * product + lane / 8 % 2);
#pragma unroll
            for (int r = 0; r < S::kRows; ++r) {
                uint32_t four[4];
                load_matrices(four, rows + 16 * r * kRowBytes);
                x[r][0] = {{four[0], four[1]}};
                x[r][1] = {{four[2], four[3]}};
            }
#pragma unroll
            for (int c = 0; c < S::kCodes; c += 2) {
                uint32_t four[4];
                load_matrices(four, codes + 8 * c * kRowBytes);
                code[c][0] = {four[0]};
                code[c][1] = {four[1]};
                code[c + 1][0] = {four[2]};
                code[c + 1][1] = {four[3]};
            }
        } else {
            constexpr int kPair = 2 * sizeof(T);
            const int byte = 4 * product * kPair + lane_id() % 4 * kPair;
            const int lane_offset = swizzled_offset(lane_row(), byte / kChunk) + byte % kChunk;
            const auto pair = [&](const char* tile, int row) {
                return load_pair(reinterpret_cast<const T*>(tile + lane_offset + row * kRowBytes));
            };
#pragma unroll
            for (int r = 0; r < S::kRows; ++r) x[r][0] = {{pair(rows, 16 * r), pair(rows, 16 * r + 8)}};
#pragma unroll
            for (int c = 0; c < S::kCodes; ++c) code[c][0] = {pair(codes, 8 * c)};
        }
    }
};

template <class T, int R, int C>
__device__ __forceinline__ void multiply_all(FragmentC<T> (&sum)[R][C], const Operands<T>& operands) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int c = 0; c < C; ++c) multiply(sum[r][c], operands.x[r], operands.code[c]);
    }
}

// On devices that offer more than 99 KB, resident rows of x may take up to 163 KB: one block there as well.
// resources: vq_search_kernel threads 256, registers 255, shared 98304, occupancy 0.125
// sass: vq_search_kernel<*float16, *> HMMA.16816, LDSM
// sass: vq_search_kernel<float, *> HMMA.1688
// sass: vq_search_kernel<tf32, *> HMMA.1688
// sass: vq_search_kernel<double, *> DMMA
// sass: vq_search_kernel<*, true> LDGSTS.128
template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads, 1) vq_search_kernel(Search<Accumulator<T>> args) {
    using A = Accumulator<T>;
    using S = Shape<T>;
    constexpr int kRowsBytes = S::kBlockRows * kRowBytes, kCodesBytes = S::kBlockCodes * kRowBytes;
    constexpr int kTermsBytes = S::kBlockCodes * sizeof(Terms<A>);
    const int slices = static_cast<int>(ceil_div(args.width, S::kDepth));
    char* const codes = shared_memory<char>();
    char* const terms = codes + kStages * kCodesBytes;
    char* const rows = terms + kTermStages * kTermsBytes;

    const int64_t h = blockIdx.x / args.row_blocks;
    const int64_t first_row = blockIdx.x % args.row_blocks * S::kBlockRows;
    const int64_t first_tile = blockIdx.y * args.span;
    const int tiles = static_cast<int>(args.tiles - first_tile < args.span ? args.tiles - first_tile : args.span);
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int warp_row = warp / kCodeGroups * 16 * S::kRows, warp_code = warp % kCodeGroups * 8 * S::kCodes;
    const T* const x = static_cast<const T*>(args.x.data) + h * args.x.codebook_stride + first_row * args.x.row_stride;
    const int valid = static_cast<int>(args.rows - first_row < S::kBlockRows ? args.rows - first_row : S::kBlockRows);
    const T* const codebook = static_cast<const T*>(args.codebook.data) + h * args.codebook.codebook_stride;
    const Terms<A>* const all_terms = args.terms + h * args.padded;

    // Steps are slices of tiles of codes. `next` is the one to be copied, `at` the one that is multiplied.
    struct Step {
        int tile = 0, slice = 0, stage = 0;
        __device__ __forceinline__ void advance(int slices) {
            stage = stage + 1 < kStages ? stage + 1 : 0;
            if (++slice == slices) slice = 0, ++tile;
        }
    } next, at;
    const auto rows_of = [&](const Step& step) {
        return rows + (args.resident ? step.slice : step.stage) * kRowsBytes;
    };
    const auto copy_next = [&] {
        if (next.tile < tiles) {
            const int64_t first_code = (first_tile + next.tile) * S::kBlockCodes;
            const int64_t column = static_cast<int64_t>(next.slice) * S::kDepth;
            if (!args.resident || next.tile == 0)
                copy_slice<T, S::kBlockRows, kVectors>(rows_of(next), x, args.x.row_stride, valid, column, args.width);
            const int64_t left = args.codes - first_code;
            copy_slice<T, S::kBlockCodes, kVectors>(
                codes + next.stage * kCodesBytes, codebook + first_code * args.codebook.row_stride,
                args.codebook.row_stride, static_cast<int>(left < S::kBlockCodes ? left : S::kBlockCodes), column,
                args.width);
            const int piece = static_cast<int>(threadIdx.x) * kChunk;
            if (next.slice + 1 == slices && piece < kTermsBytes)
                copy_async(terms + next.tile % kTermStages * kTermsBytes + piece,
                           reinterpret_cast<const char*>(all_terms + first_code) + piece);
            next.advance(slices);
        }
        commit_copies();
    };

    Best<A> best[S::kRows][2];  // of rows g and g+8
    FragmentC<T> sum[S::kRows][S::kCodes];
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
        best[r][0] = best[r][1] = {A(INFINITY), 0};
#pragma unroll
        for (int c = 0; c < S::kCodes; ++c) sum[r][c] = {};
    }

    for (int stage = 0; stage + 1 < kStages; ++stage) copy_next();
    wait_copies<kStages - 2>();
    sync_block();
    Operands<T> operands;
    operands.load(rows_of(at), warp_row, codes, warp_code, 0);
    for (int tile = 0; tile < tiles; ++tile) {
        for (int slice = 0; slice < slices; ++slice) {
            const Step step = at;
            at.advance(slices);
            // Into the stage of the step before, whose last operands all warps had before the barrier.
            copy_next();
#pragma unroll
            for (int p = 0; p < S::kProducts; ++p) {
                Operands<T> next_operands;
                if constexpr (!S::kPrefetch) multiply_all(sum, operands);
                if (p + 1 < S::kProducts) {
                    next_operands.load(rows_of(step), warp_row, codes + step.stage * kCodesBytes, warp_code, p + 1);
                } else {
                    wait_copies<kStages - 2>();
                    sync_block();
                    const Step following = at.tile < tiles ? at : step;  // no branch; after the last, anything
                    next_operands.load(rows_of(following), warp_row, codes + following.stage * kCodesBytes, warp_code,
                                       0);
                }
                if constexpr (S::kPrefetch) multiply_all(sum, operands);
                operands = next_operands;
            }
        }
        // Codes ascend: a later one must be nearer.
        const int first_code = static_cast<int>((first_tile + tile) * S::kBlockCodes) + warp_code + lane_column();
        const Terms<A>* const lane_terms =
            reinterpret_cast<const Terms<A>*>(terms + tile % kTermStages * kTermsBytes) + warp_code + lane_column();
#pragma unroll
        for (int c = 0; c < S::kCodes; ++c) {
            const Vector<Terms<A>, 2> terms_of_two = load_vec<2>(lane_terms + 8 * c);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const Terms<A> term = terms_of_two.at[e];
#pragma unroll
                for (int r = 0; r < S::kRows; ++r) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const A score = fma(-sum[r][c].at[2 * h + e], term.at[1], term.at[0]);
                        if (score < best[r][h].score) best[r][h] = {score, first_code + 8 * c + e};
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < S::kRows; ++r) sum[r][c] = {};
        }
    }

    // Over the four lanes of a row, then over the warps of a row.
    sync_block();
    Best<A>* const others = shared_memory<Best<A>>();  // the copies have all landed and been used
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int mask = 1; mask < 4; mask *= 2) {
                const Best<A> other{shuffle_xor(best[r][h].score, mask), shuffle_xor(best[r][h].code, mask)};
                best[r][h] = better(best[r][h], other);
            }
            if (lane_id() % 4 == 0)
                others[warp % kCodeGroups * S::kBlockRows + warp_row + 16 * r + 8 * h + lane_row()] = best[r][h];
        }
    }
    sync_block();
    const int row = static_cast<int>(threadIdx.x);
    if (row >= S::kBlockRows || first_row + row >= args.rows) return;
    Best<A> all = others[row];
#pragma unroll
    for (int group = 1; group < kCodeGroups; ++group) all = better(all, others[group * S::kBlockRows + row]);
    const int64_t num_codebooks = gridDim.x / args.row_blocks;
    const int64_t to = (blockIdx.y * num_codebooks + h) * args.rows + first_row + row;
    args.scores[to] = all.score;
    args.found[to] = all.code;
}

}  // namespace
}  // namespace xlayer::cuda::quantize
