// fsq (xlayer/quantize.h): one elementwise pass, in which the exponential of the bound gives its slope too.
//
// A block takes tiles of whole rows, about kTileNumbers numbers, as one line, whose dimensions repeat; the digits go
// through shared memory, where a thread per row sums the index. With σ(y) = 1/(1 + e^−y) the bound is tanh y = 2σ(2y) −
// 1, as exact as digits need: an exponential and a reciprocal.
#include "cuda/quantize/common.cuh"

namespace xlayer::cuda::quantize {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTileNumbers = 2048;

// Constants of a dimension; the position of a number among the digits is factor·σ − offset.
template <class A>
struct alignas(16) Dimension {
    A factor, offset, shift, max_digit;
    A center, divisor, inverse;
    A gain;  // four times the slope of the code per slope of tanh
};

template <class A>
struct Fsq {
    int64_t rows;
    int width;
    int tile_rows;  // a multiple of 8, so that tiles begin at vectors
    bool digits;    // are what `indices` takes
    const void* z;
    void* codes;
    void* slope;
    int64_t* indices;
    FsqDimensions dimensions;
};

// The constants of every dimension, in shared memory: what a thread indexes in the kernel's parameters would be copied
// to local memory.
template <class A>
__device__ __forceinline__ void make_dimensions(const FsqDimensions& from, Dimension<A>* to, int64_t* basis) {
    const bool symmetric = from.bound == FsqBound::symmetric;
    for (int i = static_cast<int>(threadIdx.x); i < from.width; i += kThreads) {
        const A max_digit = static_cast<A>(from.levels[i] - 1), center = static_cast<A>(from.levels[i] / 2);
        const A half = static_cast<A>(from.half[i]), divisor = symmetric ? max_digit : center;
        to[i] = {symmetric ? max_digit : 2 * half,
                 symmetric ? A(-0.5) : half + static_cast<A>(from.middle[i]),
                 static_cast<A>(from.shift[i]),
                 max_digit,
                 symmetric ? max_digit / 2 : center,
                 symmetric ? max_digit / 2 : center,
                 1 / divisor,
                 symmetric ? A(4) : 4 * half / center};
        basis[i] = from.basis[i];
    }
    sync_block();
}

// σ(2y) and 1 − σ(2y), which as a difference would cancel.
template <class A>
struct Logistic {
    A value, rest;
};
template <class A>
__device__ __forceinline__ Logistic<A> logistic(A y) {
    constexpr A kMinusTwoOverLn2 = A(-2.88539008177792681472),
                kMaxExponent = 115;  // 2^115 and its inverse are normal numbers
    const A exponent = kMinusTwoOverLn2 * y, q = exp2(exponent > kMaxExponent ? kMaxExponent : exponent),
            value = reciprocal(1 + q);
    return {value, q * value};
}

// n/d with the bits of the division: the remainder of n·(1/d) is exact.
template <class A>
__device__ __forceinline__ A divide(A n, A d, A inverse) {
    const A quotient = n * inverse;
    return fma(fma(-quotient, d, n), inverse, quotient);
}

// Loads a vector at `first`, of which only the elements before `count` exist.
template <class T, int N>
__device__ __forceinline__ Vector<T, N> load_part(const T* line, int first, int count) {
    if (first + N <= count) return load_vec<N>(line + first);
    Vector<T, N> out{};
#pragma unroll
    for (int n = 0; n < N; ++n)
        if (first + n < count) out.at[n] = line[first + n];
    return out;
}
template <class T, int N>
__device__ __forceinline__ void store_part(T* line, int first, int count, const Vector<T, N>& values) {
    if (first + N <= count) return store_vec(line + first, values);
#pragma unroll
    for (int n = 0; n < N; ++n)
        if (first + n < count) line[first + n] = values.at[n];
}

// resources: fsq_kernel<*, false, true> threads 256, registers 48, shared 12928, occupancy 0.625
// resources: fsq_kernel threads 256, registers 40, shared 12928, occupancy 0.75
// sass: fsq_kernel<*, [!1], *, *> LDG.128, STG.128
template <class T, int N, bool kSymmetric, bool kKeep>
__global__ void __launch_bounds__(kThreads) fsq_kernel(Fsq<Accumulator<T>> args) {
    using A = Accumulator<T>;
    Dimension<A>* const dimensions = shared_memory<Dimension<A>>();
    int64_t* const basis = reinterpret_cast<int64_t*>(dimensions + args.width);
    int* const digits = reinterpret_cast<int*>(basis + args.width);  // rows of an odd pitch, so that banks differ
    const int width = args.width, pitch = width | 1;
    make_dimensions(args.dimensions, dimensions, basis);

    for (int64_t row = static_cast<int64_t>(blockIdx.x) * args.tile_rows; row < args.rows;
         row += static_cast<int64_t>(gridDim.x) * args.tile_rows) {
        const int rows = static_cast<int>(args.rows - row < args.tile_rows ? args.rows - row : args.tile_rows);
        const int count = rows * width;
        const T* const z = static_cast<const T*>(args.z) + row * width;
        for (int first = static_cast<int>(threadIdx.x) * N; first < count; first += kThreads * N) {
            const Vector<T, N> in = load_part<T, N>(z, first, count);
            int column = first % width, place = first / width * pitch + column;
            Vector<T, N> codes, slopes;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const Dimension<A>& d = dimensions[column];
                const A number = widen(in.at[n]);
                const Logistic<A> sigma = logistic<A>(kSymmetric ? number : number + d.shift);
                A digit = fma(d.factor, sigma.value, -d.offset);
                digit = kSymmetric ? floor(digit) : rint(digit) + d.center;
                digit = digit > 0 ? digit : A(0);  // of NaN too
                digit = digit < d.max_digit ? digit : d.max_digit;
                const A code = kSymmetric ? divide(2 * digit - d.max_digit, d.max_digit, d.inverse)
                                          : divide(digit - d.center, d.center, d.inverse);
                codes.at[n] = narrow<T>(number == number ? code : number);
                slopes.at[n] = narrow<T>(d.gain * sigma.value * sigma.rest);
                if (first + n < count) digits[place] = static_cast<int>(digit);
                ++place;
                if (++column == width) column = 0, place += pitch - width;
            }
            store_part<T, N>(static_cast<T*>(args.codes) + row * width, first, count, codes);
            if constexpr (kKeep) store_part<T, N>(static_cast<T*>(args.slope) + row * width, first, count, slopes);
        }
        sync_block();
        if (args.digits) {
            for (int at = static_cast<int>(threadIdx.x); at < count; at += kThreads)
                args.indices[row * width + at] = digits[at / width * pitch + at % width];
        } else {
            for (int r = static_cast<int>(threadIdx.x); r < rows; r += kThreads) {
                int64_t index = 0;
                for (int i = 0; i < width; ++i) index += digits[r * pitch + i] * basis[i];
                args.indices[row + r] = index;
            }
        }
        sync_block();
    }
}

// Rows of a tile: some 2048 numbers' worth, and of all vectors' lengths a multiple.
int tile_rows(int64_t width) {
    const int64_t rows = kTileNumbers / width / 8 * 8;
    return static_cast<int>(rows > 8 ? rows : 8);
}

template <class T, int N>
auto choose(bool symmetric, bool keep) {
    if (symmetric) return keep ? fsq_kernel<T, N, true, true> : fsq_kernel<T, N, true, false>;
    return keep ? fsq_kernel<T, N, false, true> : fsq_kernel<T, N, false, false>;
}

}  // namespace

void fsq_forward(const FsqForward& args, void* stream) {
    dispatch_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        using A = Accumulator<T>;
        const int64_t width = args.dimensions.width, rows = tile_rows(width), blocks = ceil_div(args.rows, rows);
        const Fsq<A> fsq{
            args.rows,    static_cast<int>(width), static_cast<int>(rows), args.digits, args.z, args.codes, args.slope,
            args.indices, args.dimensions};
        const int64_t bytes = width * static_cast<int64_t>(sizeof(Dimension<A>) + sizeof(int64_t)) +
                              rows * (width | 1) * static_cast<int64_t>(sizeof(int));
        const bool vectors = vector_length<T>(args.z) > 1 && vector_length<T>(args.codes) > 1 &&
                             (args.slope == nullptr || vector_length<T>(args.slope) > 1);
        const bool symmetric = args.dimensions.bound == FsqBound::symmetric, keep = args.slope != nullptr;
        launch("fsq", vectors ? choose<T, 16 / sizeof(T)>(symmetric, keep) : choose<T, 1>(symmetric, keep),
               Launch{blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads, stream, static_cast<size_t>(bytes)}, fsq);
    });
}

}  // namespace xlayer::cuda::quantize
