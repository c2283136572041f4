// fsq (xlayer/quantize.h): one elementwise pass over whole rows as one line of numbers, whose dimensions repeat. The
// exponential of the bound gives its slope too.
#include <type_traits>

#include "cpu/common/rows.h"
#include "xlayer/quantize.h"

namespace xlayer::cpu::XLAYER_ISA::quantize {
namespace {

constexpr int64_t kChunkElements = 1024;  // of whole rows that one step takes
constexpr int64_t kTaskElements = 16384;

// Lanes of whole numbers as wide as T.
template <class T>
using Whole32Or64 = typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type;

// Constants of the dimensions of a vector's lanes.
template <class T>
struct Dimensions {
    Vec<T> max_digit;              // L − 1
    Vec<T> shift, factor, offset;  // of the offset bound: the place of a number is factor·σ − offset
    Vec<T> center;                 // ⌊L/2⌋, the digit of 0 there
    Vec<T> inverse;                // of what codes are divided by, most or center
    Vec<T> gain;                   // four times the slope of the code per slope of tanh
    IntVec<T> basis;
};

// The same of every dimension, repeated so that a vector can be loaded at any of them.
template <class T>
struct Constants {
    static constexpr int kLength = kFsqMaxDimensions + lanes<T>;
    T max_digit[kLength], shift[kLength], factor[kLength], offset[kLength], center[kLength], inverse[kLength],
        gain[kLength];
    Whole32Or64<T> basis[kLength];

    // Without `index` digits stay as they are.
    Constants(const FsqDimensions& dimensions, bool index) {
        const bool symmetric = dimensions.bound == FsqBound::symmetric;
        for (int64_t i = 0; i < dimensions.width + lanes<T>; ++i) {
            const int64_t from = i % dimensions.width, levels = dimensions.levels[from];
            const T half = static_cast<T>(dimensions.half[from]);
            max_digit[i] = static_cast<T>(levels - 1), center[i] = static_cast<T>(levels / 2);
            shift[i] = static_cast<T>(dimensions.shift[from]);
            factor[i] = 2 * half, offset[i] = half + static_cast<T>(dimensions.middle[from]);
            inverse[i] = 1 / (symmetric ? max_digit[i] : center[i]);
            gain[i] = symmetric ? T(4) : 4 * half / center[i];
            basis[i] = index ? static_cast<Whole32Or64<T>>(dimensions.basis[from]) : 1;
        }
    }
    XLAYER_INLINE Dimensions<T> at(int64_t i) const {
        IntVec<T> parts;
        std::memcpy(&parts, basis + i, sizeof(parts));
        return {load(max_digit + i), load(shift + i),   load(factor + i), load(offset + i),
                load(center + i),    load(inverse + i), load(gain + i),   parts};
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
void for_chunks(const ThreadPool& pool, int64_t rows, int64_t width, const F& f) {
    const int64_t chunk = max<int64_t>(1, kChunkElements / width);
    const int64_t chunks = max<int64_t>(1, kTaskElements / (chunk * width));
    parallel_tasks(pool, ceil_div(rows, chunk * chunks), [&](int64_t, int64_t task) {
        const int64_t last = min(rows, (task + 1) * chunk * chunks);
        for (int64_t row = task * chunk * chunks; row < last; row += chunk) f(row, min(chunk, last - row));
    });
}

// A chunk of whole rows: in place, or widened.
template <class T>
struct Chunk {
    const T* z;
    int64_t count;
    T* codes;
    T* slope;
    Whole32Or64<T>* parts;  // digits times their part of the index
};

// One vector at e. With σ(2y) = (tanh y + 1)/2, as exact as the digits need, and sech²y = 4σ(2y)(1 − σ(2y)).
template <class T, bool kSymmetric, bool kKeep, class InOut>
XLAYER_INLINE void quantize_vector(const Dimensions<T>& d, const Chunk<T>& chunk, int64_t e, InOut io) {
    const Vec<T> largest = splat<T>(80);  // e^80 is finite, and its inverse a normal number
    const Vec<T> in = io.load(chunk.z + e), y = kSymmetric ? in : in + d.shift, exponent = T(-2) * y;
    const Vec<T> q = exponential(largest < exponent ? largest : exponent), sigma = T(1) / (T(1) + q);
    Vec<T> digit = kSymmetric ? d.max_digit * sigma + T(0.5) : round_nearest<T>(d.factor * sigma - d.offset) + d.center;
    digit = digit > T(0) ? digit : Vec<T>{};  // of NaN too
    digit = digit < d.max_digit ? digit : d.max_digit;
    const IntVec<T> whole = __builtin_convertvector(digit, IntVec<T>);  // rounded down
    const IntVec<T> part = whole * d.basis;
    std::memcpy(chunk.parts + e, &part, sizeof(part));  // past `count` too
    if constexpr (kSymmetric) digit = __builtin_convertvector(whole, Vec<T>);
    const Vec<T> from_center = kSymmetric ? digit + digit - d.max_digit : digit - d.center;
    const Vec<T> code = divide<T>(from_center, kSymmetric ? d.max_digit : d.center, d.inverse);
    io.store(chunk.codes + e, in == in ? code : in);
    if constexpr (kKeep) io.store(chunk.slope + e, d.gain * sigma * (q * sigma));  // 1 − σ would cancel
}

// kFixed: every vector begins at the first dimension, and the constants stay in registers.
template <class T, bool kSymmetric, bool kKeep, bool kFixed>
void quantize(const Constants<T>& constants, int64_t width, Chunk<T> chunk) {
    const Dimensions<T> fixed = constants.at(0);
    int64_t i = 0;  // the dimension of the first lane
    const int64_t step = lanes<T> % width;
    for_vectors<T>(0, chunk.count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        if constexpr (kFixed) {
            quantize_vector<T, kSymmetric, kKeep>(fixed, chunk, e, io);
        } else {
            quantize_vector<T, kSymmetric, kKeep>(constants.at(i), chunk, e, io);
            i = i + step < width ? i + step : i + step - width;
        }
    });
}

template <class T>
using Quantize = void (*)(const Constants<T>&, int64_t, Chunk<T>);

template <class T, bool kSymmetric, bool kKeep>
Quantize<T> choose_fixed(int64_t width) {
    return lanes<T> % width == 0 ? quantize<T, kSymmetric, kKeep, true> : quantize<T, kSymmetric, kKeep, false>;
}
template <class T>
Quantize<T> choose(const FsqForward& args) {
    const int64_t width = args.dimensions.width;
    if (args.dimensions.bound == FsqBound::symmetric)
        return args.slope != nullptr ? choose_fixed<T, true, true>(width) : choose_fixed<T, true, false>(width);
    return args.slope != nullptr ? choose_fixed<T, false, true>(width) : choose_fixed<T, false, false>(width);
}

// to[r] = the sum of row r of `parts`; of a known width without a loop.
template <int64_t kWidth, class FullVector>
XLAYER_INLINE void sum_rows_of(const FullVector* parts, int64_t rows, int64_t width, int64_t* to) {
    if (kWidth > 0) width = kWidth;
    for (int64_t r = 0; r < rows; ++r) {
        int64_t index = 0;
        for (int64_t i = 0; i < width; ++i) index += parts[r * width + i];
        to[r] = index;
    }
}

// Unsigned lanes: vectors past the last row hold anything and may overflow.
template <class T>
struct Unsigned {
    typedef typename std::make_unsigned<Whole32Or64<T>>::type Vec __attribute__((vector_size(kVectorBytes)));
};

// The same, and overwrites `parts`: pairs are added in whole vectors until the width is odd.
template <class T>
XLAYER_INLINE void sum_parts(Whole32Or64<T>* parts, int64_t rows, int64_t width, int64_t* to) {
    IntVec<T> even;
    XLAYER_UNROLL for (int l = 0; l < lanes<T>; ++l) even[l] = 2 * l;
    for (; width % 2 == 0; width /= 2) {
        for (int64_t at = 0; at < rows * width / 2; at += lanes<T>) {
            typename Unsigned<T>::Vec low, high;
            std::memcpy(&low, parts + 2 * at, sizeof(low));
            std::memcpy(&high, parts + 2 * at + lanes<T>, sizeof(high));
            const typename Unsigned<T>::Vec sum =
                __builtin_shuffle(low, high, even) + __builtin_shuffle(low, high, even + 1);
            std::memcpy(parts + at, &sum, sizeof(sum));
        }
    }
    switch (width) {
        case 1:
            return sum_rows_of<1>(parts, rows, width, to);
        case 3:
            return sum_rows_of<3>(parts, rows, width, to);
        case 5:
            return sum_rows_of<5>(parts, rows, width, to);
        default:
            return sum_rows_of<0>(parts, rows, width, to);
    }
}

template <class T>
void forward(const FsqForward& args) {
    const FsqDimensions& dimensions = args.dimensions;
    const int64_t width = dimensions.width;
    // If the index fits a lane its terms are computed there, else from the digits.
    const int64_t last = dimensions.basis[width - 1], levels = dimensions.levels[width - 1];
    const bool fits = !args.digits && (sizeof(T) == 8 || last <= INT32_MAX / levels);
    const Constants<T> constants(dimensions, fits);
    const Quantize<T> quantize_chunk = choose<T>(args);
    for_chunks(args.pool, args.rows, width, [&](int64_t row, int64_t rows) {
        T in[kChunkElements], out[kChunkElements], slope[kChunkElements];
        Whole32Or64<T> parts[kChunkElements + 2 * lanes<T>];  // whole vectors, and pairs of them
        const int64_t first = row * width, count = rows * width;
        Chunk<T> chunk{read_elements(args.dtype, args.z, first, count, in), count,
                       write_target(args.dtype, args.codes, first, out), nullptr, parts};
        if (args.slope != nullptr) chunk.slope = write_target(args.dtype, args.slope, first, slope);
        quantize_chunk(constants, width, chunk);
        narrow_elements(args.dtype, chunk.codes, args.codes, first, count);
        if (args.slope != nullptr) narrow_elements(args.dtype, chunk.slope, args.slope, first, count);
        if (args.digits) {
            for (int64_t e = 0; e < count; ++e) args.indices[first + e] = parts[e];
        } else if (fits) {
            sum_parts<T>(parts, rows, width, args.indices + row);
        } else {
            for (int64_t r = 0; r < rows; ++r) {
                int64_t index = 0;
                for (int64_t i = 0; i < width; ++i) index += parts[r * width + i] * dimensions.basis[i];
                args.indices[row + r] = index;
            }
        }
    });
}

}  // namespace

void fsq_forward(const FsqForward& args) {
    if (args.dtype == DType::float64) return forward<double>(args);
    forward<float>(args);
}

}  // namespace xlayer::cpu::XLAYER_ISA::quantize
