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

ScalarType accumulation(const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

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

// Kernels of one device.
template <class Kernels>
struct Operators {
    static Two nearest(const Tensor& x, const Tensor& codebook, bool cosine, bool tf32) {
        const typename Kernels::Scope scope(x);
        check_shape(x, "x", {-1, -1, -1});
        check_shape(codebook, "codebook", {x.size(0), -1, x.size(2)});
        check_dtype(codebook, "codebook", x.scalar_type());
        check_same_device(codebook, "codebook", x, "x");
        VqNearest args{};
        args.metric = cosine ? VqMetric::cosine : VqMetric::euclidean;
        args.books = x.size(0), args.rows = x.size(1), args.codes = codebook.size(1), args.width = x.size(2);
        STD_TORCH_CHECK(args.codes > 0 && args.width > 0, "codebook must have at least one code and one column, got ",
                        shape_string(codebook));
        args.tf32 = tf32;
        const Tensor rows = unit_stride_last(x), codes = unit_stride_last(codebook);
        args.x = rows_view(rows, "x"), args.codebook = rows_view(codes, "codebook");
        Tensor indices = allocate(x, {args.books, args.rows}, ScalarType::Long, "indices");
        Tensor distance = allocate(x, {args.books, args.rows}, accumulation(x), "distance");
        args.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
        args.distance = distance.mutable_data_ptr();
        if (indices.numel() > 0) scope.run(x, args);
        return {indices, distance};
    }

    static Two statistics(const Tensor& x, const Tensor& indices, int64_t codes) {
        const typename Kernels::Scope scope(x);
        check_shape(x, "x", {-1, -1, -1});
        check_shape(indices, "indices", {x.size(0), x.size(1)});
        check_dtype(indices, "indices", ScalarType::Long);
        check_same_device(indices, "indices", x, "x");
        STD_TORCH_CHECK(codes >= 1, "codes must be at least 1, got ", codes);
        VqStatistics args{};
        args.books = x.size(0), args.rows = x.size(1), args.codes = codes, args.width = x.size(2);
        const Tensor rows = unit_stride_last(x);
        args.x = rows_view(rows, "x");
        args.indices = static_cast<const int64_t*>(kernel_input(indices, "indices"));
        args.index_book_stride = indices.stride(0), args.index_row_stride = indices.stride(1);
        Tensor counts = allocate(x, {args.books, codes}, accumulation(x), "counts");
        Tensor sums = allocate(x, {args.books, codes, args.width}, accumulation(x), "sums");
        args.counts = counts.mutable_data_ptr(), args.sums = sums.mutable_data_ptr();
        if (args.books > 0) scope.run(x, args);
        return {counts, sums};
    }

    static Three fsq(const Tensor& z, const std::vector<int64_t>& levels, const std::vector<double>& shift,
                     const std::vector<double>& half, const std::vector<double>& middle, bool offset, bool keep) {
        const typename Kernels::Scope scope(z);
        STD_TORCH_CHECK(z.dim() >= 1, "z must have at least one dimension");
        check_elements(z, "z");
        FsqForward args{};
        const int64_t width = z.size(z.dim() - 1);
        args.dimensions = fsq_dimensions(width, levels, shift, half, middle, offset, &args.digits);
        args.dtype = kernel_dtype(z, "z");
        args.rows = z.numel() / width;
        const Tensor input = as_contiguous(z);
        std::vector<int64_t> shape(z.dim());
        for (int64_t d = 0; d < z.dim(); ++d) shape[d] = z.size(d);
        Tensor codes = allocate(z, shape, z.scalar_type(), "codes");
        Tensor slope = allocate(z, keep ? shape : std::vector<int64_t>{0}, z.scalar_type(), "slope");
        if (!args.digits) shape.pop_back();
        Tensor indices = allocate(z, shape, ScalarType::Long, "indices");
        args.z = kernel_input(input, "z");
        args.codes = codes.mutable_data_ptr();
        args.slope = keep ? slope.mutable_data_ptr() : nullptr;
        args.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
        if (args.rows > 0) scope.run(z, args);
        return {codes, indices, slope};
    }
};

#ifndef XLAYER_EMULATED
struct CpuKernels {
    struct Scope {
        explicit Scope(const Tensor&) {}
        void run(const Tensor& like, VqNearest& args) const {
            args.pool = torch_pool();
            const Tensor workspace = new_workspace(like, cpu::quantize::vq_nearest_workspace(args), &args.workspace);
            cpu::quantize::vq_nearest(args);
        }
        void run(const Tensor& like, VqStatistics& args) const {
            args.pool = torch_pool();
            const Tensor workspace = new_workspace(like, cpu::quantize::vq_statistics_workspace(args), &args.workspace);
            cpu::quantize::vq_statistics(args);
        }
        void run(const Tensor&, FsqForward& args) const {
            args.pool = torch_pool();
            cpu::quantize::fsq_forward(args);
        }
    };
};
#endif

#ifdef XLAYER_HAS_CUDA_KERNELS
struct CudaKernels {
    struct Scope : CudaScope {
        using CudaScope::CudaScope;
        void run(const Tensor& like, VqNearest& args) const {
            const Tensor workspace = new_workspace(like, cuda::quantize::vq_nearest_workspace(args), &args.workspace);
            cuda::quantize::vq_nearest(args, stream());
        }
        void run(const Tensor& like, VqStatistics& args) const {
            const Tensor workspace =
                new_workspace(like, cuda::quantize::vq_statistics_workspace(args), &args.workspace);
            cuda::quantize::vq_statistics(args, stream());
        }
        void run(const Tensor&, const FsqForward& args) const { cuda::quantize::fsq_forward(args, stream()); }
    };
};
#endif

template <class Kernels, class Library>
void register_kernels(Library& m) {
    using Ops = Operators<Kernels>;
    m.impl("vq_nearest", TORCH_BOX(&Ops::nearest));
    m.impl("vq_statistics", TORCH_BOX(&Ops::statistics));
    m.impl("fsq", TORCH_BOX(&Ops::fsq));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(XLAYER_OPS, m) {
    m.def("vq_nearest(Tensor x, Tensor codebook, bool cosine, bool tf32) -> (Tensor indices, Tensor distance)");
    m.def("vq_statistics(Tensor x, Tensor indices, SymInt codes) -> (Tensor counts, Tensor sums)");
    m.def(
        "fsq(Tensor z, int[] levels, float[] shift, float[] half, float[] middle, bool offset, bool keep) "
        "-> (Tensor codes, Tensor indices, Tensor slope)");
}

#ifndef XLAYER_EMULATED
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, CPU, m) { register_kernels<CpuKernels>(m); }
#endif

#ifdef XLAYER_HAS_CUDA_KERNELS
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, XLAYER_CUDA_KEY, m) { register_kernels<CudaKernels>(m); }
#endif

}  // namespace xlayer
