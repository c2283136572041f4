// What the hyper kernels do with rows of d elements: read and write them in any dtype, mix them, multiply them with
// each other. The products are functions that are not inlined: post, pre and the boundary call the same machine code,
// so one pass over two sublayers' edges has the bits of two passes.
#pragma once

#include "element.h"
#include "xlayer/hyper.h"

namespace xlayer::cpu::XLAYER_ISA {

// --- Rows in memory
// ---------------------------------------------------------------------------------------------------

template <class T>
constexpr DType own_dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;

// The row at `offset`: where it lies if its dtype is T's own, else widened into `scratch`.
template <class T>
inline const T* read_elements(DType dtype, const void* data, int64_t offset, int64_t count, T* scratch) {
    if (dtype == own_dtype<T>) return static_cast<const T*>(data) + offset;
    if (dtype == DType::bfloat16) {
        read_row(static_cast<const BFloat16*>(data) + offset, 1, count, scratch);
    } else {
        read_row(static_cast<const Float16*>(data) + offset, 1, count, scratch);
    }
    return scratch;
}

// Where to write the row at `offset`: into memory or, for another dtype, into `scratch`, which narrow_elements
// finishes.
template <class T>
inline T* write_target(DType dtype, void* data, int64_t offset, T* scratch) {
    return dtype == own_dtype<T> ? static_cast<T*>(data) + offset : scratch;
}
template <class T>
inline void narrow_elements(DType dtype, const T* from, void* data, int64_t offset, int64_t count) {
    if (dtype == DType::bfloat16) write_row(from, count, static_cast<BFloat16*>(data) + offset);
    if (dtype == DType::float16) write_row(from, count, static_cast<Float16*>(data) + offset);
}

// Rounds a row in T to what it will be in memory.
template <class T>
inline void round_elements(DType dtype, T* row, int64_t count) {
    auto round = [&](auto element) {
        for (int64_t e = 0; e < count; ++e) {
            narrow(row[e], &element);
            row[e] = widen(element);
        }
    };
    if constexpr (sizeof(T) == 4) {
        if (dtype == DType::bfloat16) round(BFloat16{});
        if (dtype == DType::float16) round(Float16{});
    }
}

XLAYER_INLINE int64_t token_offset(const HyperSizes& size, const int64_t* stride, int64_t token) {
    return token / size.inner * stride[0] + token % size.inner * stride[1];
}

// Elements of a row in scratch: whole vectors.
template <class T>
XLAYER_INLINE int64_t row_size(const HyperSizes& size) {
    return round_up(size.width, lanes<T>);
}

// --- Loops over a row
// ---------------------------------------------------------------------------------------------------

// How a loop's body reads and writes: whole vectors, or at the row's end the elements that are left, as if zeros
// followed.
template <class T>
struct Whole {
    XLAYER_INLINE Vec<T> load(const T* from) const { return cpu::XLAYER_ISA::load(from); }
    XLAYER_INLINE void store(T* to, Vec<T> value) const { cpu::XLAYER_ISA::store(to, value); }
};
template <class T>
struct Part {
    int64_t count;
    XLAYER_INLINE Vec<T> load(const T* from) const {
        T lane[lanes<T>] = {};
        for (int64_t l = 0; l < count; ++l) lane[l] = from[l];
        return cpu::XLAYER_ISA::load(lane);
    }
    XLAYER_INLINE void store(T* to, Vec<T> value) const {
        T lane[lanes<T>];
        cpu::XLAYER_ISA::store(lane, value);
        for (int64_t l = 0; l < count; ++l) to[l] = lane[l];
    }
};

template <class T, class Body>
XLAYER_INLINE void for_vectors(int64_t begin, int64_t end, const Body& body) {
    int64_t e = begin;
    for (; e + lanes<T> <= end; e += lanes<T>) body(e, Whole<T>{});
    if (e < end) body(e, Part<T>{end - e});
}

// --- Sums of rows ---------------------------------------------------------------------------------------------------

// The number of streams, known to the compiler (N) or not (N = 0).
template <int N>
constexpr int kMost = N ? N : static_cast<int>(kHyperMostStreams);
template <int N>
XLAYER_INLINE int streams_of(int64_t n) {
    return N ? N : static_cast<int>(n);
}

// out_k = Σ_j a[k·(n+1) + j] in_j for k < n, j ≤ n: what post makes of n streams and the branch output.
template <class T, int N>
__attribute__((noinline)) void mix_post(int64_t streams, const T* const* in, const T* a, T* const* out, int64_t count) {
    const int n = streams_of<N>(streams);
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        Vec<T> x[kMost<N> + 1];
        for (int j = 0; j <= n; ++j) x[j] = io.load(in[j] + e);
        for (int k = 0; k < n; ++k) {
            Vec<T> sum = a[k * (n + 1)] * x[0];
            for (int j = 1; j <= n; ++j) sum += a[k * (n + 1) + j] * x[j];
            io.store(out[k] + e, sum);
        }
    });
}

// out = Σ_j a[j] in_j for j < n.
template <class T, int N>
__attribute__((noinline)) void mix_pre(int64_t streams, const T* const* in, const T* a, T* out, int64_t count) {
    const int n = streams_of<N>(streams);
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        Vec<T> sum = a[0] * io.load(in[0] + e);
        for (int j = 1; j < n; ++j) sum += a[j] * io.load(in[j] + e);
        io.store(out + e, sum);
    });
}

// --- Products of rows -----------------------------------------------------------------------------------------------

// sum[j] = Σ_e in_j[e].
template <class T, int N>
__attribute__((noinline)) void total_rows(int64_t streams, const T* const* in, int64_t count, T* sum) {
    const int n = streams_of<N>(streams);
    Vec<T> total[kMost<N>] = {};
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        for (int j = 0; j < n; ++j) total[j] += io.load(in[j] + e);
    });
    for (int j = 0; j < n; ++j) sum[j] = sum_lanes<T>(total[j]);
}

// sum[j] = Σ_e (in_j[e] − shift[j]) and square[j] = Σ_e (in_j[e] − shift[j])².
template <class T, int N>
__attribute__((noinline)) void moments(int64_t streams, const T* const* in, const T* shift, int64_t count, T* sum,
                                       T* square) {
    const int n = streams_of<N>(streams);
    Vec<T> first[kMost<N>] = {}, second[kMost<N>] = {};
    int64_t e = 0;
    for (; e + lanes<T> <= count; e += lanes<T>) {
        for (int j = 0; j < n; ++j) {
            const Vec<T> x = load(in[j] + e) - shift[j];
            first[j] += x;
            second[j] += x * x;
        }
    }
    for (int j = 0; j < n; ++j) {
        sum[j] = sum_lanes<T>(first[j]);
        square[j] = sum_lanes<T>(second[j]);
        for (int64_t rest = e; rest < count; ++rest) {
            const T x = in[j][rest] - shift[j];
            sum[j] += x;
            square[j] += x * x;
        }
    }
}

// sum[j] = ⟨in_j, with⟩.
template <class T, int N>
__attribute__((noinline)) void dot_rows(int64_t streams, const T* const* in, const T* with, int64_t count, T* sum) {
    const int n = streams_of<N>(streams);
    Vec<T> total[kMost<N>] = {};
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        const Vec<T> w = io.load(with + e);
        for (int j = 0; j < n; ++j) total[j] += io.load(in[j] + e) * w;
    });
    for (int j = 0; j < n; ++j) sum[j] = sum_lanes<T>(total[j]);
}

// A tile of products: out[r·out_row + c] (+)= ⟨in_r − shift[r], weight_c⟩ for r < R, c < C, where weight_c begins at
// weight + c·weight_row.
template <class T, int R, int C>
__attribute__((noinline)) void product_tile(const T* const* in, const T* shift, const T* weight, int64_t weight_row,
                                            int64_t count, T* out, int64_t out_row, bool accumulate) {
    Vec<T> total[R][C] = {};
    auto add = [&](const Vec<T>(&x)[R], int64_t e, auto io) XLAYER_FLATTEN {
        XLAYER_UNROLL for (int c = 0; c < C; ++c) {
            const Vec<T> w = io.load(weight + c * weight_row + e);
            XLAYER_UNROLL for (int r = 0; r < R; ++r) total[r][c] += x[r] * w;
        }
    };
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        Vec<T> x[R];
        XLAYER_UNROLL for (int r = 0; r < R; ++r) x[r] = io.load(in[r] + e) - shift[r];
        add(x, e, io);  // past the row's end the weight is read as 0
    });
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            T& to = out[r * out_row + c];
            to = (accumulate ? to : T(0)) + sum_lanes<T>(total[r][c]);
        }
    }
}

// All products of `rows` rows with `columns` weights, in tiles that stay in registers.
template <class T>
inline void products(int64_t rows, int64_t columns, const T* const* in, const T* shift, const T* weight,
                     int64_t weight_row, int64_t count, T* out, int64_t out_row, bool accumulate) {
    for (int64_t r = 0; r < rows;) {
        const bool four = rows - r >= 4;
        for (int64_t c = 0; c < columns;) {
            const bool three = columns - c >= 3;
            const auto tile = four ? (three ? product_tile<T, 4, 3> : product_tile<T, 4, 1>)
                                   : (three ? product_tile<T, 1, 3> : product_tile<T, 1, 1>);
            tile(in + r, shift + r, weight + c * weight_row, weight_row, count, out + r * out_row + c, out_row,
                 accumulate);
            c += three ? 3 : 1;
        }
        r += four ? 4 : 1;
    }
}

}  // namespace xlayer::cpu::XLAYER_ISA
