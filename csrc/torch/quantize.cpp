// xlayer::vq_nearest, vq_statistics and fsq: schemas, checks, allocation. Shapes and formulas: xlayer/quantize.h.
#include "xlayer/quantize.h"

#include <cstdint>
#include <tuple>
#include <vector>

#include "common.h"

namespace xlayer {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

VqRows rows_view(const Tensor& rows, const char* name) {
    return {kernel_dtype(rows, name), kernel_input(rows, name), rows.stride(0), rows.stride(1)};
}

FsqDimensions fsq_dimensions(int64_t width, const std::vector<int64_t>& levels, const std::vector<double>& shift,
                             const std::vector<double>& half, const std::vector<double>& middle, bool offset,
                             bool* digits) {
    const auto count = static_cast<int64_t>(levels.size());
    STD_TORCH_CHECK(count >= 1 && count <= kFsqMaxDimensions, "levels must have 1 to ", kFsqMaxDimensions,
                    " entries, got ", count);
    STD_TORCH_CHECK(count == width, "z must have a column for each of the ", count, " levels, got ", width);
    FsqDimensions dimensions{};
    dimensions.bound = offset ? FsqBound::offset : FsqBound::symmetric;
    dimensions.width = width;
    for (const auto* column : {&shift, &half, &middle}) {
        const size_t wanted = offset ? levels.size() : 0;
        STD_TORCH_CHECK(column->size() == wanted, "shift, half and middle must have ", wanted, " entries, got ",
                        column->size());
    }
    constexpr uint64_t limit = uint64_t{1} << 63;  // one more than the largest index
    uint64_t product = 1;
    *digits = false;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t level = levels[i];
        STD_TORCH_CHECK(level >= (offset ? 3 : 2) && level <= (1 << 20), "levels must be between ", offset ? 3 : 2,
                        " and ", 1 << 20, ", got ", level);
        dimensions.levels[i] = level;
        dimensions.basis[i] = static_cast<int64_t>(product);
        *digits = *digits || product > limit / static_cast<uint64_t>(level);
        if (!*digits) product *= static_cast<uint64_t>(level);
        if (offset) dimensions.shift[i] = shift[i], dimensions.half[i] = half[i], dimensions.middle[i] = middle[i];
    }
    return dimensions;
}

class VqNearestArguments {
  public:
    VqNearest args{};

    VqNearestArguments(const Tensor& x, const Tensor& codebook, bool cosine, bool tf32) {
        check_shape(x, "x", {-1, -1, -1});
        check_shape(codebook, "codebook", {x.size(0), -1, x.size(2)});
        check_dtype(codebook, "codebook", x.scalar_type());
        check_same_device(codebook, "codebook", x, "x");
        args.metric = cosine ? VqMetric::cosine : VqMetric::euclidean;
        args.num_codebooks = x.size(0), args.rows = x.size(1), args.codes = codebook.size(1), args.width = x.size(2);
        STD_TORCH_CHECK(args.codes > 0 && args.width > 0, "codebook must have at least one code and one column, got ",
                        shape_string(codebook));
        args.tf32 = tf32;
        x_ = unit_stride_last(x), codebook_ = unit_stride_last(codebook);
        args.x = rows_view(x_, "x"), args.codebook = rows_view(codebook_, "codebook");
        args.pool = torch_pool();
    }

  private:
    Tensor x_, codebook_;
};

class VqStatisticsArguments {
  public:
    VqStatistics args{};

    VqStatisticsArguments(const Tensor& x, const Tensor& indices, int64_t codebook_size) {
        check_shape(x, "x", {-1, -1, -1});
        check_shape(indices, "indices", {x.size(0), x.size(1)});
        check_dtype(indices, "indices", ScalarType::Long);
        check_same_device(indices, "indices", x, "x");
        STD_TORCH_CHECK(codebook_size >= 1, "codebook_size must be at least 1, got ", codebook_size);
        args.num_codebooks = x.size(0), args.rows = x.size(1), args.codes = codebook_size, args.width = x.size(2);
        x_ = unit_stride_last(x);
        args.x = rows_view(x_, "x");
        args.indices = static_cast<const int64_t*>(kernel_input(indices, "indices"));
        args.index_codebook_stride = indices.stride(0), args.index_row_stride = indices.stride(1);
        args.pool = torch_pool();
    }

  private:
    Tensor x_;
};

class FsqArguments {
  public:
    FsqForward args{};

    FsqArguments(const Tensor& z, const std::vector<int64_t>& levels, const std::vector<double>& shift,
                 const std::vector<double>& half, const std::vector<double>& middle, bool offset) {
        STD_TORCH_CHECK(z.dim() >= 1, "z must have at least one dimension");
        check_elements(z, "z");
        const int64_t width = z.size(z.dim() - 1);
        args.dimensions = fsq_dimensions(width, levels, shift, half, middle, offset, &args.digits);
        args.dtype = kernel_dtype(z, "z");
        args.rows = z.numel() / width;
        z_ = as_contiguous(z);
        args.z = kernel_input(z_, "z");
        args.pool = torch_pool();
    }

  private:
    Tensor z_;
};

#ifndef XLAYER_EMULATED
void run(const CpuScope& scope, const Tensor& like, VqNearest& args) {
    scope.run(like, args, cpu::quantize::vq_nearest_workspace, cpu::quantize::vq_nearest);
}
void run(const CpuScope& scope, const Tensor& like, VqStatistics& args) {
    scope.run(like, args, cpu::quantize::vq_statistics_workspace, cpu::quantize::vq_statistics);
}
void run(const CpuScope& scope, const FsqForward& args) { scope.run(args, cpu::quantize::fsq_forward); }
#endif
#ifdef XLAYER_HAS_CUDA_KERNELS
void run(const CudaScope& scope, const Tensor& like, VqNearest& args) {
    scope.run(like, args, cuda::quantize::vq_nearest_workspace, cuda::quantize::vq_nearest);
}
void run(const CudaScope& scope, const Tensor& like, VqStatistics& args) {
    scope.run(like, args, cuda::quantize::vq_statistics_workspace, cuda::quantize::vq_statistics);
}
void run(const CudaScope& scope, const FsqForward& args) { scope.run(args, cuda::quantize::fsq_forward); }
#endif

template <class Scope>
Two vq_nearest(const Tensor& x, const Tensor& codebook, bool cosine, bool tf32) {
    const Scope scope(x);
    VqNearestArguments given(x, codebook, cosine, tf32);
    VqNearest& args = given.args;
    Tensor indices = allocate(x, {args.num_codebooks, args.rows}, ScalarType::Long, "indices");
    Tensor distance = allocate(x, {args.num_codebooks, args.rows}, accumulation_type(args.x.dtype), "distance");
    args.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
    args.distance = distance.mutable_data_ptr();
    if (indices.numel() > 0) run(scope, x, args);
    return {indices, distance};
}

template <class Scope>
Two vq_statistics(const Tensor& x, const Tensor& indices, int64_t codebook_size) {
    const Scope scope(x);
    VqStatisticsArguments given(x, indices, codebook_size);
    VqStatistics& args = given.args;
    const ScalarType wide = accumulation_type(args.x.dtype);
    Tensor counts = allocate(x, {args.num_codebooks, codebook_size}, wide, "counts");
    Tensor sums = allocate(x, {args.num_codebooks, codebook_size, args.width}, wide, "sums");
    args.counts = counts.mutable_data_ptr(), args.sums = sums.mutable_data_ptr();
    if (args.num_codebooks > 0) run(scope, x, args);
    return {counts, sums};
}

template <class Scope>
Three fsq(const Tensor& z, const std::vector<int64_t>& levels, const std::vector<double>& shift,
          const std::vector<double>& half, const std::vector<double>& middle, bool offset, bool keep) {
    const Scope scope(z);
    FsqArguments given(z, levels, shift, half, middle, offset);
    FsqForward& args = given.args;
    std::vector<int64_t> shape(z.dim());
    for (int64_t d = 0; d < z.dim(); ++d) shape[d] = z.size(d);
    Tensor codes = allocate(z, shape, z.scalar_type(), "codes");
    Tensor slope = allocate(z, keep ? shape : std::vector<int64_t>{0}, z.scalar_type(), "slope");
    if (!args.digits) shape.pop_back();
    Tensor indices = allocate(z, shape, ScalarType::Long, "indices");
    args.codes = codes.mutable_data_ptr();
    args.slope = keep ? slope.mutable_data_ptr() : nullptr;
    args.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
    if (args.rows > 0) run(scope, args);
    return {codes, indices, slope};
}

template <class Scope, class Library>
void register_kernels(Library& m) {
    m.impl("vq_nearest", TORCH_BOX(&vq_nearest<Scope>));
    m.impl("vq_statistics", TORCH_BOX(&vq_statistics<Scope>));
    m.impl("fsq", TORCH_BOX(&fsq<Scope>));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(XLAYER_OPS, m) {
    m.def("vq_nearest(Tensor x, Tensor codebook, bool cosine, bool tf32) -> (Tensor indices, Tensor distance)");
    m.def("vq_statistics(Tensor x, Tensor indices, SymInt codebook_size) -> (Tensor counts, Tensor sums)");
    m.def(
        "fsq(Tensor z, int[] levels, float[] shift, float[] half, float[] middle, bool offset, bool keep) "
        "-> (Tensor codes, Tensor indices, Tensor slope)");
}

#ifndef XLAYER_EMULATED
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, CPU, m) { register_kernels<CpuScope>(m); }
#endif

#ifdef XLAYER_HAS_CUDA_KERNELS
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, XLAYER_CUDA_KEY, m) { register_kernels<CudaScope>(m); }
#endif

}  // namespace xlayer
