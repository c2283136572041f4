// CPU kernel of fsq (xlayer/quantize.h): one pass each way, over the numbers as one long line, whose dimensions repeat.
// Bound by memory with fast vectors: forward reads z and writes codes and indices, backward reads two and writes one.
#include <type_traits>

#include "rows.h"
#include "xlayer/quantize.h"

namespace xlayer::cpu::XLAYER_ISA {
namespace {

constexpr int64_t kPieceElements = 1024;  // of whole rows that one step takes
constexpr int64_t kTaskElements = 16384;

// The constants of every dimension, repeated so that a vector can be loaded at any of them.
template <class T>
struct Constants {
    static constexpr int kLength = kFsqMostDimensions + lanes<T>;
    T most[kLength];     // L − 1
    T center[kLength];   // ⌊L/2⌋, the digit of 0 of the offset bound
    T inverse[kLength];  // of what codes are divided by
    T shift[kLength], half[kLength], middle[kLength];
    T slope[kLength];  // of the code, per slope of tanh

    explicit Constants(const FsqDimensions& dimensions) {
        for (int64_t i = 0; i < dimensions.width + lanes<T>; ++i) {
            const int64_t from = i % dimensions.width, levels = dimensions.levels[from];
            const bool symmetric = dimensions.bound == FsqBound::symmetric;
            most[i] = static_cast<T>(levels - 1), center[i] = static_cast<T>(levels / 2);
            inverse[i] = 1 / (symmetric ? most[i] : center[i]);
            shift[i] = static_cast<T>(dimensions.shift[from]), half[i] = static_cast<T>(dimensions.half[from]);
            middle[i] = static_cast<T>(dimensions.middle[from]);
            slope[i] = symmetric ? T(1) : half[i] / center[i];
        }
    }
};

// x rounded to nearest, ties to even; |x| below 2²².
template <class T>
XLAYER_INLINE Vec<T> round_nearest(Vec<T> x) {
    const Vec<T> shifter =
        splat<T>(sizeof(T) == 8 ? T(6755399441055744.0) : T(12582912.0));  // 1.5 times the ulp's inverse
    return (x + shifter) - shifter;
}

// n / d for whole numbers, with the bits of the division: the remainder of n · (1/d), exact by one fused operation, is
// divided too.
template <class T>
XLAYER_INLINE Vec<T> divide(Vec<T> n, Vec<T> d, [[maybe_unused]] Vec<T> inverse) {
#ifdef __FMA__
    const Vec<T> quotient = n * inverse;
    return quotient + (n - quotient * d) * inverse;
#else
    return n / d;
#endif
}

// Calls f(first row, rows) for pieces of whole rows, on the pool.
template <class F>
void for_pieces(const ThreadPool& pool, int64_t rows, int64_t width, const F& f) {
    const int64_t piece = greater<int64_t>(1, kPieceElements / width);
    const int64_t pieces = greater<int64_t>(1, kTaskElements / (piece * width));
    parallel_tasks(pool, ceil_div(rows, piece * pieces), [&](int64_t, int64_t task) {
        const int64_t last = lesser(rows, (task + 1) * piece * pieces);
        for (int64_t row = task * piece * pieces; row < last; row += piece) f(row, lesser(piece, last - row));
    });
}

// Lanes of whole numbers as wide as T.
template <class T>
using Whole32Or64 = typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type;

// One piece of z: codes, and digits times their part of the index, `basis`. With σ(2x) = (tanh x + 1)/2, which is as
// exact as the digits need.
template <class T, bool kSymmetric>
XLAYER_INLINE void quantize(const Constants<T>& constants, const Whole32Or64<T>* basis, int64_t width, const T* z,
                            int64_t count, T* codes, Whole32Or64<T>* parts) {
    int64_t i = 0;  // the dimension of the first lane
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        const Vec<T> in = io.load(z + e), most = load(constants.most + i), center = load(constants.center + i);
        Vec<T> digit;
        if constexpr (kSymmetric) {
            digit = most * sigmoid(in + in) + T(0.5);
        } else {
            const Vec<T> y = in + load(constants.shift + i), half = load(constants.half + i);
            digit = round_nearest<T>((half + half) * sigmoid(y + y) - (half + load(constants.middle + i))) + center;
        }
        digit = digit > T(0) ? digit : Vec<T>{};  // of NaN too
        digit = digit < most ? digit : most;
        IntVec<T> part = __builtin_convertvector(digit, IntVec<T>), factor;  // rounded down
        if constexpr (kSymmetric) digit = __builtin_convertvector(part, Vec<T>);
        std::memcpy(&factor, basis + i, sizeof(factor));
        part *= factor;
        std::memcpy(parts + e, &part, sizeof(part));  // past `count` too
        const Vec<T> from_center = kSymmetric ? digit + digit - most : digit - center;
        const Vec<T> code = divide<T>(from_center, kSymmetric ? most : center, load(constants.inverse + i));
        io.store(codes + e, in == in ? code : in);
        i += lanes<T>;
        while (i >= width) i -= width;
    });
}

template <class T>
void forward(const FsqForward& args) {
    using Whole = Whole32Or64<T>;
    const FsqDimensions& dimensions = args.dimensions;
    const int64_t width = dimensions.width;
    const Constants<T> constants(dimensions);
    // Where the index fits a lane its parts are made there, elsewhere from the digits.
    const int64_t last = dimensions.basis[width - 1], levels = dimensions.levels[width - 1];
    const bool fits = !args.digits && (sizeof(T) == 8 || last <= INT32_MAX / levels);
    Whole basis[Constants<T>::kLength];
    for (int64_t i = 0; i < width + lanes<T>; ++i)
        basis[i] = fits ? static_cast<Whole>(dimensions.basis[i % width]) : Whole{1};
    for_pieces(args.pool, args.rows, width, [&](int64_t row, int64_t rows) {
        T in[kPieceElements], out[kPieceElements];
        Whole parts[kPieceElements + lanes<T>];
        const int64_t first = row * width, count = rows * width;
        const T* z = read_elements(args.dtype, args.z, first, count, in);
        T* codes = write_target(args.dtype, args.codes, first, out);
        if (dimensions.bound == FsqBound::symmetric) {
            quantize<T, true>(constants, basis, width, z, count, codes, parts);
        } else {
            quantize<T, false>(constants, basis, width, z, count, codes, parts);
        }
        narrow_elements(args.dtype, codes, args.codes, first, count);
        if (args.digits) {
            for (int64_t e = 0; e < count; ++e) args.indices[first + e] = parts[e];
            return;
        }
        for (int64_t r = 0; r < rows; ++r) {
            const Whole* part = parts + r * width;
            int64_t index = 0;
            if (fits) {
                for (int64_t i = 0; i < width; ++i) index += part[i];
            } else {
                for (int64_t i = 0; i < width; ++i) index += part[i] * dimensions.basis[i];
            }
            args.indices[row + r] = index;
        }
    });
}

template <class T>
void backward(const FsqBackward& args) {
    const FsqDimensions& dimensions = args.dimensions;
    const int64_t width = dimensions.width;
    const Constants<T> constants(dimensions);
    for_pieces(args.pool, args.rows, width, [&](int64_t row, int64_t rows) {
        T in[kPieceElements], incoming[kPieceElements], out[kPieceElements];
        const int64_t first = row * width, count = rows * width;
        const T* z = read_elements(args.dtype, args.z, first, count, in);
        const T* grad = read_elements(args.dtype, args.grad, first, count, incoming);
        T* to = write_target(args.dtype, args.grad_z, first, out);
        int64_t i = 0;
        for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
            // sech²y = 4q/(1 + q)² with q = e^−2|y|
            const Vec<T> y = io.load(z + e) + load(constants.shift + i);  // symmetric: + 0
            const Vec<T> q = exponential(T(-2) * magnitude<T>(y)), inverse = T(1) / (T(1) + q);
            io.store(to + e, io.load(grad + e) * load(constants.slope + i) * (T(4) * q * inverse * inverse));
            i += lanes<T>;
            while (i >= width) i -= width;
        });
        narrow_elements(args.dtype, to, args.grad_z, first, count);
    });
}

}  // namespace

void fsq_forward(const FsqForward& args) {
    if (args.dtype == DType::float64) return forward<double>(args);
    forward<float>(args);
}

void fsq_backward(const FsqBackward& args) {
    if (args.dtype == DType::float64) return backward<double>(args);
    backward<float>(args);
}

}  // namespace xlayer::cpu::XLAYER_ISA
