// Shared parts of the hyper kernels: rows in memory, sums over a block, and a sublayer's coefficients (xlayer/hyper.h).
#pragma once

#include <cmath>
#include <initializer_list>

#include "cuda/common/device.cuh"
#include "xlayer/hyper.h"
#include "xlayer/workspace.h"

namespace xlayer::cuda::hyper {

// The number of streams, known to the compiler (N) or not (N = 0: any up to the most). Arrays have room for the most;
// loops over them are unrolled, so that they stay in registers.
template <int N>
constexpr int kMaxStreamsOf = N ? N : static_cast<int>(kHyperMaxStreams);
template <int N>
constexpr int kMaxCoefficientsOf = kMaxStreamsOf<N> * (kMaxStreamsOf<N> + 2);
template <int N>
__device__ __forceinline__ int streams_of(const HyperSizes& size) {
    return N ? N : static_cast<int>(size.streams);
}

__host__ __device__ inline bool is_constrained(const HyperConnection& connection) {
    return connection.form == HyperForm::sinkhorn_rows || connection.form == HyperForm::sinkhorn_columns;
}

__device__ __forceinline__ int64_t tokens_of(const HyperSizes& size) { return size.outer * size.inner; }

// Calls f with kernels' N for a number of streams.
template <int N>
struct Streams {
    static constexpr int value = N;
};
template <class F>
void dispatch_streams(int64_t n, const F& f) {
    switch (n) {
        case 2:
            return f(Streams<2>{});
        case 4:
            return f(Streams<4>{});
        case 8:
            return f(Streams<8>{});
        default:
            return f(Streams<0>{});
    }
}

// --- Rows in memory --------------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t token_offset(const HyperSizes& size, const int64_t* stride, int64_t token) {
    return token / size.inner * stride[0] + token % size.inner * stride[1];
}

// Whether V elements that begin at a multiple of V lie aligned, in all rows.
inline bool aligned(const void* address, size_t element, int64_t v, std::initializer_list<int64_t> strides) {
    bool all = reinterpret_cast<uintptr_t>(address) % (element * static_cast<size_t>(v)) == 0;
    for (int64_t stride : strides) all = all && stride % v == 0;
    return all;
}
template <class Pointer>
bool aligned(const HyperStreams<Pointer>& streams, size_t element, int64_t v) {
    return aligned(streams.data, element, v, {streams.stride[0], streams.stride[1], streams.stride[2]});
}
template <class Pointer>
bool aligned(const HyperRows<Pointer>& rows, size_t element, int64_t v) {
    return aligned(rows.data, element, v, {rows.stride[0], rows.stride[1]});
}

// V elements of a row, `count` of which exist; zeros for the others. `vectorized`: they all exist and are
// aligned.
template <int V, class T>
__device__ __forceinline__ Vector<T, V> read(const T* from, int64_t count, bool vectorized) {
    if (vectorized) return load_vec<V>(from);
    Vector<T, V> some;
#pragma unroll
    for (int v = 0; v < V; ++v) some.at[v] = v < count ? from[v] : narrow<T>(Accumulator<T>(0));
    return some;
}
template <int V, class T>
__device__ __forceinline__ void write(T* to, const Vector<T, V>& some, int64_t count, bool vectorized) {
    if (vectorized) return store_vec(to, some);
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (v < count) to[v] = some.at[v];
    }
}

// The same of the branch output, whose elements are T or, beside float, have 16 bits.
template <class T, int V>
__device__ __forceinline__ void read_branch(DType dtype, const void* data, int64_t offset, int64_t count,
                                            bool vectorized, Accumulator<T> (&to)[V]) {
    auto get = [&](auto element) {
        using B = decltype(element);
        const Vector<B, V> some = read<V>(static_cast<const B*>(data) + offset, count, vectorized);
#pragma unroll
        for (int v = 0; v < V; ++v) to[v] = widen(some.at[v]);
    };
    if constexpr (std::is_same_v<T, float>) {
        if (dtype == DType::bfloat16) return get(bfloat16{});
        if (dtype == DType::float16) return get(float16{});
    }
    get(T{});
}
template <class T, int V>
__device__ __forceinline__ void write_branch(DType dtype, void* data, int64_t offset, int64_t count, bool vectorized,
                                             const Accumulator<T> (&from)[V]) {
    auto put = [&](auto element) {
        using B = decltype(element);
        Vector<B, V> some;
#pragma unroll
        for (int v = 0; v < V; ++v) some.at[v] = narrow<B>(from[v]);
        write(static_cast<B*>(data) + offset, some, count, vectorized);
    };
    if constexpr (std::is_same_v<T, float>) {
        if (dtype == DType::bfloat16) return put(bfloat16{});
        if (dtype == DType::float16) return put(float16{});
    }
    put(T{});
}

// --- Sums ------------------------------------------------------------------------------------------------------------

// Sums of `Count` numbers over the lanes of a warp, in about Count shuffles: a butterfly in which every lane sends one
// half of its numbers and keeps the other. Afterwards lane l holds in v[i], i < kLaneSums<Count>, the sum of number
// lane_sum_index<Count>(i), or of none if that is negative.
template <int Count, int Mask = kWarpSize / 2, class A, size_t Size>
__device__ __forceinline__ void sum_over_lanes(A (&v)[Size]) {
    if constexpr (Mask > 0) {
        constexpr int half = (Count + 1) / 2;
        const bool upper = (lane_id() & Mask) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const A other = i + half < Count ? v[i + half < Count ? i + half : 0] : A(0);
            v[i] = (upper ? other : v[i]) + shuffle_xor(upper ? v[i] : other, Mask);
        }
        sum_over_lanes<half, Mask / 2>(v);
    }
}
template <int Count>
constexpr int kLaneSums = (Count + kWarpSize - 1) / kWarpSize;
template <int Count, int Mask = kWarpSize / 2>
__device__ __forceinline__ int lane_sum_index(int i) {
    if constexpr (Mask == 0) {
        return i;
    } else {
        constexpr int half = (Count + 1) / 2;
        const int within = lane_sum_index<half, Mask / 2>(i);
        const int number = within + ((lane_id() & Mask) != 0 ? half : 0);
        return within >= 0 && within < half && number < Count ? number : -1;
    }
}

// Sums of `Count` numbers over a block of Warps warps, into to[0 … Count); partial: Warps·Count numbers. To be read
// after a barrier.
template <int Count, int Warps, class A>
__device__ __forceinline__ void sum_over_block(A (&v)[Count], A* partial, A* to) {
    sum_over_lanes<Count>(v);
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
    for (int i = 0; i < kLaneSums<Count>; ++i) {
        const int number = lane_sum_index<Count>(i);
        if (number >= 0) partial[warp * Count + number] = v[i];
    }
    sync_block();
    for (int number = static_cast<int>(threadIdx.x); number < Count; number += Warps * kWarpSize) {
        A sum = 0;
#pragma unroll
        for (int w = 0; w < Warps; ++w) sum += partial[w * Count + number];
        to[number] = sum;
    }
}

// --- Coefficients ----------------------------------------------------------------------------------------------------

template <class A>
__device__ __forceinline__ A sigmoid(A x) {
    return A(1) / (A(1) + exp(-x));
}

// Base, scale and bias of one of a token's numbers, j·(n+2) + m.
template <class A>
struct CoefficientParameters {
    A base, scale, bias;

    __device__ __forceinline__ CoefficientParameters(const HyperConnection& connection, int at, int columns) {
        const int m = at % columns;
        base = static_cast<const A*>(connection.base)[at];
        scale = connection.scale == nullptr ? A(0) : static_cast<const A*>(connection.scale)[m];
        bias = connection.bias == nullptr ? A(0) : static_cast<const A*>(connection.bias)[m];
    }
};

// Logits of one matrix that lie further apart than this go through logarithms: their exponentials, and what Sinkhorn's
// algorithm makes of them, could leave the range of A.
template <class A>
constexpr A kSinkhornSpan = sizeof(A) == 8 ? A(600) : A(60);

// Sinkhorn's algorithm on matrices in memory, element (j, i) of one being M_ij. A group of lanes takes a matrix, lane l
// of the group its line l (row or column, as it comes); lanes without a line keep the others company at the barriers.
template <class A>
struct Sinkhorn {
    int n, line;
    int64_t steps;  // normalizations
    bool rows_last, active;

    __device__ __forceinline__ Sinkhorn(const HyperConnection& connection, int streams, int lane, bool has_token)
        : n(streams),
          line(lane),
          steps(2 * connection.iterations),
          rows_last(connection.form == HyperForm::sinkhorn_rows),
          active(has_token && lane < streams) {}

    // In place.
    __device__ __forceinline__ void forward(A* matrix) const {
        const bool wide = is_wide(matrix);
        exponentiate(matrix, wide);
        for (int64_t step = 0; step < steps; ++step) normalize(matrix, matrix, step, wide);
        sync_warp();
        for (int s = 0; s < n && active && wide; ++s) matrix[line * n + s] = exp(matrix[line * n + s]);
        sync_warp();
    }

    // history: steps + 1 matrices, the first of them a. grad: in ∂L/∂M, out ∂L/∂a.
    __device__ __forceinline__ void backward(A* history, A* grad) const {
        const int size = n * n;
        const bool wide = is_wide(history);
        exponentiate(history, wide);
        for (int64_t step = 0; step < steps; ++step)
            normalize(history + step * size, history + (step + 1) * size, step, wide);
        sync_warp();
        // From here on grad is by the logarithms: log M loses the logarithm of its lines' sums at every step.
        for (int s = 0; s < n && active; ++s) grad[line * n + s] *= element(history + steps * size, line * n + s, wide);
        for (int64_t step = steps - 1; step >= 0; --step) {
            sync_warp();
            if (active) normalize_backward(history + (step + 1) * size, grad, step, wide);
        }
        sync_warp();
    }

  private:
    // Whether a step sums over j (a row of M).
    __device__ __forceinline__ bool over_j(int64_t step) const { return (step % 2 == 0) != rows_last; }
    __device__ __forceinline__ int begin(int64_t step) const { return line * (over_j(step) ? 1 : n); }
    __device__ __forceinline__ int stride(int64_t step) const { return over_j(step) ? n : 1; }

    // A matrix that is wide is kLaneSums as logarithms.
    __device__ __forceinline__ static A element(const A* matrix, int at, bool wide) {
        return wide ? exp(matrix[at]) : matrix[at];
    }

    __device__ __forceinline__ bool is_wide(const A* a) const {
        sync_warp();
        if (!active) return false;
        A maximum = a[0], minimum = a[0];
        for (int at = 1; at < n * n; ++at) {
            maximum = a[at] > maximum ? a[at] : maximum;
            minimum = a[at] < minimum ? a[at] : minimum;
        }
        return maximum - minimum > kSinkhornSpan<A>;
    }

    // exp(a − its maximum along what is normalized first), which that normalization takes away again. In place.
    __device__ __forceinline__ void exponentiate(A* matrix, bool wide) const {
        sync_warp();
        if (!active || wide) return;
        const int at = begin(0), next = stride(0);
        A maximum = matrix[at];
        for (int s = 1; s < n; ++s) maximum = matrix[at + s * next] > maximum ? matrix[at + s * next] : maximum;
        for (int s = 0; s < n; ++s) matrix[at + s * next] = exp(matrix[at + s * next] - maximum);
    }

    __device__ __forceinline__ void normalize(const A* from, A* to, int64_t step, bool wide) const {
        sync_warp();
        if (!active) return;
        const int at = begin(step), next = stride(step);
        A sum = from[at];
        if (wide) {
            A maximum = sum;
            for (int s = 1; s < n; ++s) maximum = from[at + s * next] > maximum ? from[at + s * next] : maximum;
            sum = 0;
            for (int s = 0; s < n; ++s) sum += exp(from[at + s * next] - maximum);
            const A logarithm = log(sum);
            for (int s = 0; s < n; ++s) to[at + s * next] = from[at + s * next] - maximum - logarithm;
            return;
        }
        for (int s = 1; s < n; ++s) sum += from[at + s * next];
        for (int s = 0; s < n; ++s) to[at + s * next] = from[at + s * next] / sum;
    }

    __device__ __forceinline__ void normalize_backward(const A* after, A* grad, int64_t step, bool wide) const {
        const int at = begin(step), next = stride(step);
        A sum = 0;
        for (int s = 0; s < n; ++s) sum += grad[at + s * next];
        for (int s = 0; s < n; ++s) grad[at + s * next] -= element(after, at + s * next, wide) * sum;
    }
};

// Index of post's coefficients: element (j, k), j < n, is h_j's in h'_k, element (n, k) is y's.
__device__ __forceinline__ int post_index(int n, int j, int k) {
    return j < n ? j * (n + 2) + 1 + k : k * (n + 2) + n + 1;
}

// h'_k = Σ_j a(j) h_j + a(n) y, as stored in T: the same bits wherever it is made.
template <class T, int N, int V, class F>
__device__ __forceinline__ Vector<T, V> mix(int n, const F& a, const Vector<T, V> (&h)[kMaxStreamsOf<N>],
                                            const Accumulator<T> (&y)[V]) {
    using A = Accumulator<T>;
    A sum[V];
    const A of_y = a(n);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = of_y * y[v];
#pragma unroll
    for (int j = 0; j < kMaxStreamsOf<N>; ++j) {
        if (N == 0 && j >= n) continue;
        const A factor = a(j);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] = fma(factor, widen(h[j].at[v]), sum[v]);
    }
    Vector<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.at[v] = narrow<T>(sum[v]);
    return out;
}
// The same with a token's coefficients.
template <class T, int N, int V>
__device__ __forceinline__ Vector<T, V> mix(int n, int k, const Accumulator<T>* c,
                                            const Vector<T, V> (&h)[kMaxStreamsOf<N>], const Accumulator<T> (&y)[V]) {
    return mix<T, N>(n, [&](int j) { return c[post_index(n, j, k)]; }, h, y);
}

}  // namespace xlayer::cuda::hyper
