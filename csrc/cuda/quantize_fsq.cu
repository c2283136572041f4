// CUDA kernels of fsq (xlayer/quantize.h): one pass each way.
//
// A block takes rows of 2048 numbers at a time, as one line, whose dimensions repeat; the digits meet in shared memory,
// where a thread to a row adds up the index. With σ(y) = 1/(1 + e^−y) the bound is tanh y = 2σ(2y) − 1, as exact as
// digits need: an exponential and a reciprocal, where tanh takes twenty instructions.
// Bytes per number: forward 2·sizeof(T) + 8/width, backward 3·sizeof(T). Other operations: forward some 30, backward
// some 20 instructions, no tensor flops. On an H200 (4.8 TB/s, 29 trillion instructions of a lane a second) float32 is
// bound by memory; bfloat16 with rows of 8, 5 bytes a number, is at the edge, 0.96 trillion numbers a second allow 30.
#include "quantize.cuh"

namespace xlayer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTileNumbers = 2048;

// Of a dimension; `factor` and `offset` so that the place of a number among the digits is factor·σ − offset.
template <class A>
struct alignas(16) Dimension {
    A factor, offset, shift, most;
    A center, divisor, inverse, slope;
};

template <class A>
struct Fsq {
    int64_t rows;
    int width;
    int tile_rows;  // a multiple of 8, so that tiles begin at vectors
    bool digits;    // are what `indices` takes
    const void* z;
    const void* grad;
    void* out;  // codes, or grad_z
    int64_t* indices;
    FsqDimensions dimensions;
};

// The constants of every dimension, in shared memory: what a thread indexes in the kernel's parameters would be copied
// to local memory.
template <class A>
__device__ __forceinline__ void make_dimensions(const FsqDimensions& from, Dimension<A>* to, int64_t* basis) {
    const bool symmetric = from.bound == FsqBound::symmetric;
    for (int i = static_cast<int>(threadIdx.x); i < from.width; i += kThreads) {
        const A most = static_cast<A>(from.levels[i] - 1), center = static_cast<A>(from.levels[i] / 2);
        const A half = static_cast<A>(from.half[i]), divisor = symmetric ? most : center;
        to[i] = {symmetric ? most : 2 * half,
                 symmetric ? A(-0.5) : half + static_cast<A>(from.middle[i]),
                 static_cast<A>(from.shift[i]),
                 most,
                 symmetric ? most / 2 : center,
                 symmetric ? most / 2 : center,
                 1 / divisor,
                 symmetric ? A(1) : half / center};
        if (basis != nullptr) basis[i] = from.basis[i];
    }
    sync_block();
}

// σ(2y)
__device__ __forceinline__ float logistic(float y) {
    constexpr float kMinusTwoOverLn2 = -2.8853900817779268f;
    return reciprocal(1 + exp2(kMinusTwoOverLn2 * y));
}
__device__ __forceinline__ double logistic(double y) { return reciprocal(1 + exp(-2 * y)); }

// n/d with the bits of the division: the remainder of n·(1/d) is exact.
template <class A>
__device__ __forceinline__ A divide(A n, A d, A inverse) {
    const A quotient = n * inverse;
    return fma(fma(-quotient, d, n), inverse, quotient);
}

// Calls f(first number, its dimension, vector's length) for this thread's vectors of `count` numbers.
template <int N, class F>
__device__ __forceinline__ void for_my_vectors(int count, int width, const F& f) {
    for (int at = static_cast<int>(threadIdx.x) * N; at < count; at += kThreads * N) f(at, at % width);
}

// resources: fsq_kernel threads 256, registers 40, shared 12928, occupancy 0.75
// sass: fsq_kernel<*, [!1], *> LDG.128, STG.128
template <class T, int N, bool kSymmetric>
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
        T* const codes = static_cast<T*>(args.out) + row * width;
        for_my_vectors<N>(count, width, [&](int first, int column) {
            // The last vector may reach past the last row.
            const bool whole = first + N <= count;
            Vector<T, N> in{};
            if (whole) {
                in = load<N>(z + first);
            } else {
#pragma unroll
                for (int n = 0; n < N; ++n)
                    if (first + n < count) in.at[n] = z[first + n];
            }
            int place = first / width * pitch + column;
            Vector<T, N> out;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const Dimension<A>& d = dimensions[column];
                const A number = widen(in.at[n]);
                A digit = fma(d.factor, logistic(kSymmetric ? number : number + d.shift), -d.offset);
                digit = kSymmetric ? floor(digit) : rint(digit) + d.center;
                digit = digit > 0 ? digit : A(0);  // of NaN too
                digit = digit < d.most ? digit : d.most;
                const A code = kSymmetric ? divide(2 * digit - d.most, d.most, d.inverse)
                                          : divide(digit - d.center, d.center, d.inverse);
                out.at[n] = narrow<T>(number == number ? code : number);
                if (first + n < count) digits[place] = static_cast<int>(digit);
                ++place;
                if (++column == width) column = 0, place += pitch - width;
            }
            if (whole) {
                store_global(codes + first, out);
            } else {
#pragma unroll
                for (int n = 0; n < N; ++n)
                    if (first + n < count) codes[first + n] = out.at[n];
            }
        });
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

// resources: fsq_backward_kernel threads 256, registers 40, shared 4096, occupancy 0.75
// sass: fsq_backward_kernel<*, [!1]> LDG.128, STG.128
template <class T, int N>
__global__ void __launch_bounds__(kThreads) fsq_backward_kernel(Fsq<Accumulator<T>> args) {
    using A = Accumulator<T>;
    Dimension<A>* const dimensions = shared_memory<Dimension<A>>();
    const int width = args.width;
    make_dimensions<A>(args.dimensions, dimensions, nullptr);

    for (int64_t row = static_cast<int64_t>(blockIdx.x) * args.tile_rows; row < args.rows;
         row += static_cast<int64_t>(gridDim.x) * args.tile_rows) {
        const int64_t rows = args.rows - row < args.tile_rows ? args.rows - row : args.tile_rows;
        const int count = static_cast<int>(rows) * width;
        const T* const z = static_cast<const T*>(args.z) + row * width;
        const T* const grad = static_cast<const T*>(args.grad) + row * width;
        T* const grad_z = static_cast<T*>(args.out) + row * width;
        const auto one = [&](T number, T incoming, int column) {
            // sech²y = 4q/(1 + q)² with q = e^−2|y|
            const A y = widen(number) + dimensions[column].shift, q = exp(-2 * fabs(y)), part = reciprocal(1 + q);
            return narrow<T>(widen(incoming) * dimensions[column].slope * (4 * q * part * part));
        };
        for_my_vectors<N>(count, width, [&](int first, int column) {
            if (first + N > count) {  // reaches past the last row
                for (int at = first; at < count; ++at) {
                    grad_z[at] = one(z[at], grad[at], column);
                    if (++column == width) column = 0;
                }
                return;
            }
            const Vector<T, N> in = load<N>(z + first), incoming = load<N>(grad + first);
            Vector<T, N> out;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                out.at[n] = one(in.at[n], incoming.at[n], column);
                if (++column == width) column = 0;
            }
            store_global(grad_z + first, out);
        });
    }
}

// Rows of a tile: some 2048 numbers' worth, and of all vectors' lengths a multiple.
int tile_rows(int64_t width) {
    const int64_t rows = kTileNumbers / width / 8 * 8;
    return static_cast<int>(rows > 8 ? rows : 8);
}

template <class A, class Args>
Fsq<A> describe(const Args& args) {
    Fsq<A> fsq{};
    fsq.rows = args.rows;
    fsq.width = static_cast<int>(args.dimensions.width);
    fsq.tile_rows = tile_rows(fsq.width);
    fsq.z = args.z;
    fsq.dimensions = args.dimensions;
    return fsq;
}

Launch launch_of(int64_t rows, int64_t width, int64_t dimension_bytes, int64_t digit_bytes, void* stream) {
    const int64_t blocks = ceil_div(rows, tile_rows(width));
    const int64_t bytes = width * dimension_bytes + tile_rows(width) * (width | 1) * digit_bytes;
    return {blocks < kMostBlocks ? blocks : kMostBlocks, kThreads, stream, static_cast<size_t>(bytes)};
}

}  // namespace

void fsq_forward(const FsqForward& args, void* stream) {
    with_element(args.dtype, [&](auto element) {
        using T = decltype(element);
        using A = Accumulator<T>;
        constexpr int full = 16 / sizeof(T);
        Fsq<A> fsq = describe<A>(args);
        fsq.out = args.codes, fsq.indices = args.indices, fsq.digits = args.digits;
        const bool vectors = vector_length<T>(args.z) > 1 && vector_length<T>(args.codes) > 1;
        const Launch how = launch_of(args.rows, fsq.width, sizeof(Dimension<A>) + sizeof(int64_t), sizeof(int), stream);
        const bool symmetric = args.dimensions.bound == FsqBound::symmetric;
        const auto kernel = symmetric ? (vectors ? fsq_kernel<T, full, true> : fsq_kernel<T, 1, true>)
                                      : (vectors ? fsq_kernel<T, full, false> : fsq_kernel<T, 1, false>);
        launch("fsq", kernel, how, fsq);
    });
}

void fsq_backward(const FsqBackward& args, void* stream) {
    with_element(args.dtype, [&](auto element) {
        using T = decltype(element);
        using A = Accumulator<T>;
        constexpr int full = 16 / sizeof(T);
        Fsq<A> fsq = describe<A>(args);
        fsq.out = args.grad_z, fsq.grad = args.grad;
        const bool vectors =
            vector_length<T>(args.z) > 1 && vector_length<T>(args.grad) > 1 && vector_length<T>(args.grad_z) > 1;
        launch("fsq_backward", vectors ? fsq_backward_kernel<T, full> : fsq_backward_kernel<T, 1>,
               launch_of(args.rows, fsq.width, sizeof(Dimension<A>), 0, stream), fsq);
    });
}

}  // namespace xlayer::cuda
