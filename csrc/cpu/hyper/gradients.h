// Gradients of a mixture of rows and of a norm's products, over a chunk of columns, for hyper's backward.
#pragma once

#include "cpu/hyper/rows.h"

namespace xlayer::cpu::XLAYER_ISA::hyper {

// A weight as the second step reads it: one vector of each row after the other, instead of rows whose distance is often
// a multiple of the cache's, where every store of the gradient would hold up the load that follows. Vector m of element
// e of stream j lies at (j·blocks·lanes + e)·rows + m·lanes.
template <class T>
struct PackedWeight {
    int64_t rows = 0, streams = 0, width = 0, blocks = 0;

    explicit PackedWeight(const HyperBackward& args) {
        if (!args.pre || args.connection.norm == HyperNorm::none) return;
        const bool all = args.connection.norm == HyperNorm::rms_all;
        rows = all ? args.size.coefficients() : args.size.columns();
        streams = all ? args.size.streams : 1;
        width = args.size.width;
        blocks = ceil_div(width, lanes<T>);
    }
    int64_t size() const { return streams * blocks * rows * lanes<T>; }
    int64_t of_stream(int64_t j) const { return streams > 1 ? j * blocks * rows * lanes<T> : 0; }

    // Calls f(packed, plain, count) for every vector: where it lies, and its first element in [rows, streams·width].
    template <class F>
    void for_each_vector(int64_t block, const F& f) const {  // block < streams · blocks
        const int64_t j = block / blocks, e = block % blocks * lanes<T>;
        for (int64_t m = 0; m < rows; ++m) {
            f((block * rows + m) * lanes<T>, (m * streams + j) * width + e, min<int64_t>(lanes<T>, width - e));
        }
    }
};

// Over a stretch of a row: out_j = Σ_k a[j·n + k] grad_k and products[j·n + k] += ⟨grad_k, inputs_j⟩ for J rows from
// `first` on. `inputs` are the streams and the branch output, `a` what post multiplied them with.
template <class T, int N, int J>
XLAYER_INLINE void post_rows(int first, int64_t streams, const T* const* grad, const T* const* inputs, const T* a,
                             T* const* out, int64_t begin, int64_t count, const int64_t* prefetch_offset,
                             const int64_t* prefetch_offset_out, Vec<T>* products) {
    const int n = streams_of<N>(streams);
    Vec<T> sum[J][kMaxStreamsOf<N>];
    for (int j = 0; j < J; ++j)
        for (int k = 0; k < n; ++k) sum[j][k] = products[(first + j) * n + k];
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        Vec<T> row[J], mixed[J] = {};
        XLAYER_UNROLL for (int j = 0; j < J; ++j) {
            row[j] = io.load(inputs[first + j] + begin + e);
            prefetch(inputs[first + j] + begin + e + prefetch_offset[first + j]);
        }
        for (int k = 0; k < n; ++k) {
            const Vec<T> g = io.load(grad[k] + e);
            XLAYER_UNROLL for (int j = 0; j < J; ++j) {
                mixed[j] += a[(first + j) * n + k] * g;
                sum[j][k] += row[j] * g;
            }
        }
        XLAYER_UNROLL for (int j = 0; j < J; ++j) {
            io.store(out[first + j] + begin + e, mixed[j]);
            prefetch_to_write(out[first + j] + begin + e + prefetch_offset_out[first + j]);
        }
    });
    for (int j = 0; j < J; ++j)
        for (int k = 0; k < n; ++k) products[(first + j) * n + k] = sum[j][k];
}

template <class T, int N>
__attribute__((noinline)) void post_chunk(int64_t streams, const T* const* grad, const T* const* inputs, const T* a,
                                          T* const* out, int64_t begin, int64_t count, const int64_t* prefetch_offset,
                                          const int64_t* prefetch_offset_out, Vec<T>* products) {
    constexpr int kRows = N == 4 ? 5 : N == 2 || N == 8 ? 3 : 1;  // of n+1; their products fill the registers
    const int rows = streams_of<N>(streams) + 1;
    for (int first = 0; first < rows; first += kRows)
        post_rows<T, N, kRows>(first, streams, grad, inputs, a, out, begin, count, prefetch_offset, prefetch_offset_out,
                               products);
}

// out_k = Σ_j a[k·(n+1) + j] in_j as mix_post makes them, and sum[k] = ⟨out_k, other⟩, lane by lane.
template <class T, int N>
__attribute__((noinline)) void mix_and_dot(int64_t streams, const T* const* in, const T* a, T* const* out,
                                           const T* other, int64_t count, Vec<T>* sum) {
    const int n = streams_of<N>(streams);
    Vec<T> total[kMaxStreamsOf<N>] = {};
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        const Vec<T> w = io.load(other + e);
        Vec<T> x[kMaxStreamsOf<N> + 1];
        for (int j = 0; j <= n; ++j) x[j] = io.load(in[j] + e);
        for (int k = 0; k < n; ++k) {
            Vec<T> mixed = a[k * (n + 1)] * x[0];
            for (int j = 1; j <= n; ++j) mixed += a[k * (n + 1) + j] * x[j];
            io.store(out[k] + e, mixed);
            total[k] += mixed * w;
        }
    });
    for (int k = 0; k < n; ++k) sum[k] = total[k];
}

// Terms of ∂L/∂h' of one token besides the ∂L/∂h' of the next sublayer.
template <class T>
struct StreamGradient {
    const T* grad_x;
    T pre[kHyperMaxStreams];    // times ∂L/∂x: c_j0
    T slope[kHyperMaxStreams];  // times h'_j − mean_j − rest_j, and
    T level[kHyperMaxStreams];  // added: what the norm's statistics bring
    T mean[kHyperMaxStreams], rest[kHyperMaxStreams];
    T logits[kMaxCoefficients];                      // times the weight's rows: ∂L/∂z ÷ root of the variance
    int64_t prefetch_offset, prefetch_offset_x;      // from grad_next, and from ∂L/∂x, to the next token's
    int64_t prefetch_offset_h, prefetch_offset_out;  // the same of h and ∂L/∂h, where there is no post to do it
};

// Over a stretch: grad_j = handed_on_j + pre_j ∂L/∂x + slope_j (h'_j − mean_j − rest_j) + level_j + Σ_m logits_jm
// weight_m, and the token's share of the weight's gradient. One packed weight for all streams; without it (not Dynamic)
// what the norm brings is 0.
template <class T, int N, bool Dynamic>
__attribute__((noinline)) void stream_gradient(int64_t streams, const StreamGradient<T>& terms,
                                               const T* const* grad_next, const T* const* h, const T* weight,
                                               T* grad_weight, int64_t begin, int64_t count, T* const* out) {
    const int n = streams_of<N>(streams), columns = n + 2;
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        const Vec<T> gx = io.load(terms.grad_x + begin + e);
        prefetch(terms.grad_x + begin + e + terms.prefetch_offset_x);
        Vec<T> grad[kMaxStreamsOf<N>] = {}, centred[kMaxStreamsOf<N>];
        for (int j = 0; Dynamic && j < n; ++j) {
            centred[j] = io.load(h[j] + begin + e) - terms.mean[j] - terms.rest[j];
            prefetch(h[j] + begin + e + terms.prefetch_offset_h);
            grad[j] = terms.slope[j] * centred[j] + terms.level[j];
        }
        for (int m = 0; Dynamic && m < columns; ++m) {
            const int64_t at = (begin + e) * columns + m * lanes<T>;
            const Vec<T> w = load(weight + at);
            Vec<T> sum = load(grad_weight + at);
            for (int j = 0; j < n; ++j) {
                grad[j] += terms.logits[j * columns + m] * w;
                sum += terms.logits[j * columns + m] * centred[j];
            }
            store(grad_weight + at, sum);
        }
        // The many small terms first, so that they are not rounded to the size of these.
        for (int j = 0; j < n; ++j) {
            io.store(out[j] + e, io.load(grad_next[j] + begin + e) + (terms.pre[j] * gx + grad[j]));
            prefetch(grad_next[j] + begin + e + terms.prefetch_offset);
            prefetch_to_write(out[j] + e + terms.prefetch_offset_out);
        }
    });
}

// The same for rms_all and one stream of G tokens: its part of the weight, of `numbers` rows, is loaded once for all of
// them.
template <class T, int G>
__attribute__((noinline)) void stream_gradient_all(int stream, int64_t num_coefficients, const StreamGradient<T>* terms,
                                                   const T* const* grad_next, const T* const* h, const T* weight,
                                                   T* grad_weight, int64_t begin, int64_t count, T* const* out) {
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        Vec<T> grad[G], row[G];
        XLAYER_UNROLL for (int g = 0; g < G; ++g) {
            row[g] = io.load(h[g] + begin + e);
            grad[g] = terms[g].slope[stream] * row[g];
        }
        for (int64_t m = 0; m < num_coefficients; ++m) {
            const int64_t at = (begin + e) * num_coefficients + m * lanes<T>;
            const Vec<T> w = load(weight + at);
            Vec<T> sum = load(grad_weight + at);
            XLAYER_UNROLL for (int g = 0; g < G; ++g) {
                grad[g] += terms[g].logits[m] * w;
                sum += terms[g].logits[m] * row[g];
            }
            store(grad_weight + at, sum);
        }
        XLAYER_UNROLL for (int g = 0; g < G; ++g) {
            const Vec<T> gx = io.load(terms[g].grad_x + begin + e);
            io.store(out[g] + e, io.load(grad_next[g] + begin + e) + (terms[g].pre[stream] * gx + grad[g]));
        }
    });
}

}  // namespace xlayer::cpu::XLAYER_ISA::hyper
