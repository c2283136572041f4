// The contract of the quantization kernels: nearest codes of a codebook, counts and sums of the rows of each code, and
// finite scalar quantization. Implemented by csrc/cpu/quantize and csrc/cuda/quantize, called by
// csrc/torch/quantize.cpp.
#pragma once

#include "xlayer/types.h"

namespace xlayer {

enum class VqMetric { euclidean, cosine };

// A matrix per codebook; unit stride along the width, the other strides in elements.
struct VqRows {
    DType dtype;
    const void* data;
    int64_t codebook_stride, row_stride;
};

// indices[h, n] = the code k of codebook h that is nearest to x[h, n]; the lowest k of those that are equally near.
// euclidean: Σ(x − c)², the least of ½|c|² − x·c; cosine: 1 − x·c / (|x| |c|), where a vector of length 0 has cosine 0.
// distance[h, n] = the distance to that code, computed from the differences themselves; never negative.
// A code that holds a NaN or inf is not chosen. A row that does has no nearest code: its index is 0, and its distance
// inf or NaN. Nothing of the size rows × codes is ever written.
struct VqNearest {
    VqMetric metric;
    int64_t num_codebooks, rows, codes, width;  // codes and width at least 1
    VqRows x, codebook;                         // of one dtype
    bool tf32;                                  // CUDA: products of float32 may be made of factors rounded to tf32
    int64_t* indices;                           // contiguous [num_codebooks, rows]
    void* distance;                             // contiguous [num_codebooks, rows], float32; float64 for float64
    void* workspace;                            // vq_nearest_workspace() bytes, aligned to 64
    ThreadPool pool;
};

// counts[h, k] = how many n have indices[h, n] = k; sums[h, k] = Σ x[h, n] over them, in an order that depends on
// nothing but the indices. Rows whose index is below 0 or at least `codes` count nowhere.
struct VqStatistics {
    int64_t num_codebooks, rows, codes, width;
    VqRows x;
    const int64_t* indices;  // [num_codebooks, rows]
    int64_t index_codebook_stride, index_row_stride;
    void* counts;     // contiguous [num_codebooks, codes], float32; float64 for float64
    void* sums;       // contiguous [num_codebooks, codes, width], the same
    void* workspace;  // vq_statistics_workspace() bytes, aligned to 64
    ThreadPool pool;
};

enum class FsqBound { symmetric, offset };

// Finite scalar quantization of every row of `width` numbers z, dimension i with levels[i] levels L.
// symmetric: digit = ⌊(L−1)(tanh z + 1)/2 + ½⌋, code = 2·digit/(L−1) − 1.
// offset: digit = round(tanh(z + shift)·half − middle) + ⌊L/2⌋, code = (digit − ⌊L/2⌋)/⌊L/2⌋.
// Digits stay in [0, L−1]; a NaN has the code NaN and the digit 0. Arithmetic in float32, in float64 for float64.
constexpr int kFsqMaxDimensions = 64;
struct FsqDimensions {
    FsqBound bound;
    int64_t width;                      // at most kFsqMaxDimensions
    int64_t levels[kFsqMaxDimensions];  // symmetric: at least 2, offset: at least 3; at most 2²⁰
    double shift[kFsqMaxDimensions];    // offset only, as are `half` and `middle`
    double half[kFsqMaxDimensions];
    double middle[kFsqMaxDimensions];  // ½ where L is even, else 0
    int64_t basis[kFsqMaxDimensions];  // of the index: Σ digit_i · basis_i
};

// The gradient goes straight through the rounding: slope = d bound/dz in units of the code, symmetric sech²(z), offset
// sech²(z + shift)·half/⌊L/2⌋; NaN of a NaN.
struct FsqForward {
    DType dtype;  // of z, codes and slope
    FsqDimensions dimensions;
    int64_t rows;
    const void* z;     // contiguous [rows, width]
    void* codes;       // contiguous [rows, width]
    int64_t* indices;  // contiguous [rows], or [rows, width] with the digits where `digits`
    void* slope;       // contiguous [rows, width]; null: not wanted
    bool digits;
    ThreadPool pool;
};

namespace cpu::quantize {
int64_t vq_nearest_workspace(const VqNearest& args);
void vq_nearest(const VqNearest& args);
int64_t vq_statistics_workspace(const VqStatistics& args);
void vq_statistics(const VqStatistics& args);
void fsq_forward(const FsqForward& args);
}  // namespace cpu::quantize

namespace cuda::quantize {
// `stream` is a cudaStream_t of the current device; the pool is not used. Throws std::runtime_error if a launch fails.
int64_t vq_nearest_workspace(const VqNearest& args);
void vq_nearest(const VqNearest& args, void* stream);
int64_t vq_statistics_workspace(const VqStatistics& args);
void vq_statistics(const VqStatistics& args, void* stream);
void fsq_forward(const FsqForward& args, void* stream);
}  // namespace cuda::quantize

}  // namespace xlayer
