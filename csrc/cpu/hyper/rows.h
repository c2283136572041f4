// Operations on rows of d elements for the hyper kernels: conversion, mixtures and products. The products are not
// inlined: post, pre and the boundary call the same machine code, so one pass over two sublayers' edges has the bits of
// two passes.
#pragma once

#include "cpu/common/rows.h"
#include "xlayer/hyper.h"

namespace xlayer::cpu::XLAYER_ISA::hyper {

// --- Rows in memory --------------------------------------------------------------------------------------------------

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

// Distance of the next token's rows, in elements past this one's, so that they are fetched while this one is worked
// on: rows are too short for the hardware to see a pattern. 0 where there is no next token or a row is not in T.
template <class T>
XLAYER_INLINE int64_t prefetch_distance(const HyperSizes& size, DType dtype, const int64_t* stride, int64_t token) {
    if (dtype != dtype_of<T> || token + 1 >= size.tokens()) return 0;
    return token_offset(size, stride, token + 1) - token_offset(size, stride, token);
}
// --- Mixtures of rows ------------------------------------------------------------------------------------------------

// The number of streams, known to the compiler (N) or not (N = 0).
template <int N>
constexpr int kMaxStreamsOf = N ? N : static_cast<int>(kHyperMaxStreams);
template <int N>
XLAYER_INLINE int streams_of(int64_t n) {
    return N ? N : static_cast<int>(n);
}

// out_k = Σ_j a[k·(n+1) + j] in_j for k < n, j ≤ n: what post makes of n streams and the branch output. It will write
// `prefetch_offset` elements past out_k next.
template <class T, int N>
__attribute__((noinline)) void mix_post(int64_t streams, const T* const* in, const T* a, T* const* out, int64_t count,
                                        int64_t prefetch_offset) {
    const int n = streams_of<N>(streams);
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        Vec<T> x[kMaxStreamsOf<N> + 1];
        for (int j = 0; j <= n; ++j) x[j] = io.load(in[j] + e);
        for (int k = 0; k < n; ++k) {
            Vec<T> sum = a[k * (n + 1)] * x[0];
            for (int j = 1; j <= n; ++j) sum += a[k * (n + 1) + j] * x[j];
            io.store(out[k] + e, sum);
            prefetch_to_write(out[k] + e + prefetch_offset);
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

// to[i] = the sum over the lanes of from[i].
template <class T>
inline void sum_vectors(const Vec<T>* from, int64_t count, T* to) {
    int64_t i = 0;
    for (; i + lanes<T> <= count; i += lanes<T>) store(to + i, sum_rows(reinterpret_cast<const T*>(from + i)));
    for (; i < count; ++i) to[i] = sum_lanes<T>(from[i]);
}

// sum[j] = ⟨in_j, other⟩, lane by lane, for n + Extra rows.
template <class T, int N, int Extra>
__attribute__((noinline)) void dot_rows(int64_t streams, const T* const* in, const T* other, int64_t count,
                                        Vec<T>* sum) {
    const int rows = streams_of<N>(streams) + Extra;
    Vec<T> total[kMaxStreamsOf<N> + Extra] = {};
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        const Vec<T> w = io.load(other + e);
        for (int j = 0; j < rows; ++j) total[j] += io.load(in[j] + e) * w;
    });
    for (int j = 0; j < rows; ++j) sum[j] = total[j];
}

// A tile of products, lane by lane: product[r·product_row + c] (+)= ⟨in_r − shift[r], weight_c⟩ for r < R, c < C, where
// weight_c begins at weight + c·weight_row. With Moments also sum[r] = Σ_e (in_r[e] − shift[r]), and square[r] of its
// squares. Meanwhile it asks for soon[r], next_begin ≤ r < next_end.
template <class T, int R, int C, bool Moments>
__attribute__((noinline)) void product_tile(const T* const* in, const T* shift, const T* weight, int64_t weight_row,
                                            int64_t count, bool accumulate, Vec<T>* product, int64_t product_row,
                                            Vec<T>* sum, Vec<T>* square, const T* const* next_rows, int next_begin,
                                            int next_end) {
    Vec<T> total[R][C] = {}, first[R] = {}, second[R] = {};
    auto add = [&](const Vec<T>(&x)[R], int64_t e, auto io) XLAYER_FLATTEN {
        XLAYER_UNROLL for (int r = 0; r < R; ++r) {
            if (!Moments) continue;
            first[r] += x[r];
            second[r] += x[r] * x[r];
        }
        XLAYER_UNROLL for (int c = 0; c < C; ++c) {
            const Vec<T> w = io.load(weight + c * weight_row + e);
            XLAYER_UNROLL for (int r = 0; r < R; ++r) total[r][c] += x[r] * w;
        }
    };
    int64_t e = 0;
    for (; e + lanes<T> <= count; e += lanes<T>) {
        Vec<T> x[R];
        XLAYER_UNROLL for (int r = 0; r < R; ++r) { x[r] = load(in[r] + e) - shift[r]; }
        for (int r = next_begin; r < next_end; ++r) prefetch(next_rows[r] + e);
        add(x, e, FullVector<T>{});
    }
    if (e < count) {
        const TailVector<T> part{count - e};
        Vec<T> x[R];
        XLAYER_UNROLL for (int r = 0; r < R; ++r) {
            T lane[lanes<T>] = {};
            for (int64_t l = 0; l < part.count; ++l) lane[l] = in[r][e + l] - shift[r];
            x[r] = load(lane);
        }
        add(x, e, part);
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            Vec<T>& to = product[r * product_row + c];
            to = accumulate ? to + total[r][c] : total[r][c];
        }
        if (!Moments) continue;
        sum[r] = first[r];
        square[r] = second[r];
    }
}

// Arguments that the tiles of one product share.
template <class T>
struct Product {
    int64_t rows, columns;
    const T* const* in;
    const T* shift;
    const T* weight;
    int64_t weight_row, count;
    bool accumulate;
    Vec<T>* product;  // [rows, columns]
    Vec<T>* sum;      // [rows], or null: no moments are wanted
    Vec<T>* square;
    const T* const* next_rows;  // rows that will be read next
};

// Each tile of a row of tiles asks for its share of what comes next: memory is then busy all the time.
template <class T, int R, int C, bool Moments>
XLAYER_INLINE void product_tile(const Product<T>& of, int64_t r, int64_t c) {
    const int64_t tiles = ceil_div(of.columns, 3), tile = c / 3;
    const int begin = static_cast<int>(R * tile / tiles), end = static_cast<int>(R * (tile + 1) / tiles);
    product_tile<T, R, C, Moments>(of.in + r, of.shift + r, of.weight + c * of.weight_row, of.weight_row, of.count,
                                   of.accumulate, of.product + r * of.columns + c, of.columns, of.sum + r,
                                   of.square + r, of.next_rows + r, begin, C < 3 && c % 3 != 0 ? begin : end);
}

template <class T, int R>
inline void product_rows(const Product<T>& of, int64_t r) {
    int64_t c = 0;
    for (; c + 3 <= of.columns; c += 3)
        c == 0 && of.sum != nullptr ? product_tile<T, R, 3, true>(of, r, c) : product_tile<T, R, 3, false>(of, r, c);
    for (; c < of.columns; ++c) product_tile<T, R, 1, false>(of, r, c);
}

// All products of rows with weights (at least three columns), in tiles that stay in registers.
template <class T>
inline void products(const Product<T>& of) {
    int64_t r = 0;
    for (; r + 4 <= of.rows; r += 4) product_rows<T, 4>(of, r);
    for (; r + 2 <= of.rows; r += 2) product_rows<T, 2>(of, r);
    for (; r < of.rows; ++r) product_rows<T, 1>(of, r);
}

}  // namespace xlayer::cpu::XLAYER_ISA::hyper
