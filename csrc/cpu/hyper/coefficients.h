// A sublayer's coefficients c from the products z of norm and weight, and back from ∂L/∂c to ∂L/∂z. identity and tanh
// vectorize over a token's coefficients; Sinkhorn's algorithm has one token in each lane.
#pragma once

#include "cpu/hyper/rows.h"

namespace xlayer::cpu::XLAYER_ISA::hyper {

constexpr int kMaxCoefficients = static_cast<int>(kHyperMaxStreams * (kHyperMaxStreams + 2));

XLAYER_INLINE bool is_constrained(const HyperConnection& connection) {
    return connection.form == HyperForm::sinkhorn_rows || connection.form == HyperForm::sinkhorn_columns;
}

// Base, scale and bias as the kernels use them: one number for each of a token's coefficients, in whole vectors.
template <class T>
struct CoefficientParameters {
    T base[kMaxCoefficients + lanes<T>] = {}, scale[kMaxCoefficients + lanes<T>] = {},
                              bias[kMaxCoefficients + lanes<T>] = {};

    CoefficientParameters(const HyperConnection& connection, int64_t n) {
        const T* bias_in = static_cast<const T*>(connection.bias);
        for (int64_t j = 0; j < n; ++j) {
            for (int64_t m = 0; m < n + 2; ++m) {
                const int64_t at = j * (n + 2) + m;
                base[at] = static_cast<const T*>(connection.base)[at];
                if (connection.scale != nullptr) scale[at] = static_cast<const T*>(connection.scale)[m];
                if (bias_in != nullptr) bias[at] = bias_in[m];
            }
        }
    }
};

// The sum of each row of a weight [n+2, d]: what a mean of 1 would add to z.
template <class T>
inline void sum_weights(const T* weight, const HyperSizes& size, T* sums) {
    for (int64_t m = 0; m < size.columns(); ++m) {
        double sum = 0;
        for (int64_t e = 0; e < size.width; ++e) sum += weight[m * size.width + e];
        sums[m] = static_cast<T>(sum);
    }
}

// --- identity and tanh -----------------------------------------------------------------------------------------------

// c = base + scale · act(z + bias) for one token's `count` numbers.
template <class T>
inline void plain_coefficients(const CoefficientParameters<T>& params, bool tanh, const T* z, T* c, int64_t count) {
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        const Vec<T> in = io.load(z + e) + load(params.bias + e);
        io.store(c + e, load(params.base + e) + load(params.scale + e) * (tanh ? hyperbolic_tangent(in) : in));
    });
}

// Its backward: grad_z from grad_c, and what the token adds to the gradient of scale at each place.
template <class T>
inline void plain_coefficients_backward(const CoefficientParameters<T>& params, bool tanh, const T* z, const T* grad_c,
                                        T* grad_z, T* grad_scale, int64_t count) {
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        const Vec<T> in = io.load(z + e) + load(params.bias + e), grad = io.load(grad_c + e);
        const Vec<T> act = tanh ? hyperbolic_tangent(in) : in;
        const Vec<T> slope = tanh ? T(1) - act * act : splat(T(1));
        io.store(grad_scale + e, grad * act);
        io.store(grad_z + e, grad * load(params.scale + e) * slope);
    });
}

// --- σ and Sinkhorn --------------------------------------------------------------------------------------------------

// Logits of one matrix that lie further apart than this go through logarithms: their exponentials, and what Sinkhorn's
// algorithm makes of them, could leave the range of T.
template <class T>
constexpr T kSinkhornSpan = sizeof(T) == 8 ? T(600) : T(60);

// n × n matrices, one token to a lane: element (j, i) of `mixing` is M_ij.
template <class T>
struct Sinkhorn {
    int n;
    int64_t steps;  // normalizations
    bool rows_last;

    Sinkhorn(const HyperConnection& connection, int64_t streams)
        : n(static_cast<int>(streams)),
          steps(2 * connection.iterations),
          rows_last(connection.form == HyperForm::sinkhorn_rows) {}

    void forward(const Vec<T>* a, Vec<T>* mixing) const {
        exponentiate(a, mixing);
        for (int64_t step = 0; step < steps; ++step) normalize(mixing, over_j(step));
        for_wide_lanes(a, [&](int lane, T* logarithms) {
            for (int64_t step = 0; step < steps; ++step) normalize_logarithms(logarithms, over_j(step));
            for (int at = 0; at < n * n; ++at) mixing[at][lane] = exponential(logarithms[at]);
        });
    }

    // grad: in ∂L/∂M, out ∂L/∂a. history: scratch for the matrix after each of the normalizations.
    void backward(const Vec<T>* a, Vec<T>* grad, Vec<T>* history) const {
        exponentiate(a, history);
        for (int64_t step = 0; step < steps; ++step) {
            Vec<T>* after = history + step * n * n;
            for (int at = 0; at < n * n && step > 0; ++at) after[at] = after[at - n * n];
            normalize(after, over_j(step));
        }
        for_wide_lanes(a, [&](int lane, T* logarithms) {
            for (int64_t step = 0; step < steps; ++step) {
                normalize_logarithms(logarithms, over_j(step));
                for (int at = 0; at < n * n; ++at) history[step * n * n + at][lane] = exponential(logarithms[at]);
            }
        });
        // From here on grad is by the logarithms: log M loses the logarithm of its lines' sums at every step.
        for (int at = 0; at < n * n; ++at) grad[at] *= history[(steps - 1) * n * n + at];
        for (int64_t step = steps - 1; step >= 0; --step)
            normalize_backward(history + step * n * n, grad, over_j(step));
    }

  private:
    // Whether a step sums over j (a row of M).
    bool over_j(int64_t step) const { return (step % 2 == 0) != rows_last; }
    int line(bool over_j) const { return over_j ? 1 : n; }
    int stride(bool over_j) const { return over_j ? n : 1; }

    // exp(a − its maximum along what is normalized first), which that normalization takes away again.
    void exponentiate(const Vec<T>* a, Vec<T>* mixing) const {
        const int step = stride(over_j(0));
        for (int l = 0; l < n; ++l) {
            const int begin = l * line(over_j(0));
            Vec<T> maximum = a[begin];
            for (int s = 1; s < n; ++s) maximum = a[begin + s * step] > maximum ? a[begin + s * step] : maximum;
            for (int s = 0; s < n; ++s) mixing[begin + s * step] = exponential(a[begin + s * step] - maximum);
        }
    }

    void normalize(Vec<T>* mixing, bool over_j) const {
        const int step = stride(over_j);
        for (int l = 0; l < n; ++l) {
            Vec<T>* const of = mixing + l * line(over_j);
            Vec<T> sum = of[0];
            for (int s = 1; s < n; ++s) sum += of[s * step];
            for (int s = 0; s < n; ++s) of[s * step] /= sum;
        }
    }

    void normalize_backward(const Vec<T>* after, Vec<T>* grad, bool over_j) const {
        const int step = stride(over_j);
        for (int l = 0; l < n; ++l) {
            const int begin = l * line(over_j);
            Vec<T> sum = grad[begin];
            for (int s = 1; s < n; ++s) sum += grad[begin + s * step];
            for (int s = 0; s < n; ++s) grad[begin + s * step] -= after[begin + s * step] * sum;
        }
    }

    // Calls f(lane, a copy of its logits) for each token whose logits need logarithms.
    template <class F>
    void for_wide_lanes(const Vec<T>* a, const F& f) const {
        Vec<T> maximum = a[0], minimum = a[0];
        for (int at = 1; at < n * n; ++at) {
            maximum = a[at] > maximum ? a[at] : maximum;
            minimum = a[at] < minimum ? a[at] : minimum;
        }
        const Vec<T> span = maximum - minimum;
        for (int lane = 0; lane < lanes<T>; ++lane) {
            if (!(span[lane] > kSinkhornSpan<T>)) continue;
            T logarithms[kHyperMaxStreams * kHyperMaxStreams];
            for (int at = 0; at < n * n; ++at) logarithms[at] = a[at][lane];
            f(lane, logarithms);
        }
    }

    void normalize_logarithms(T* logarithms, bool over_j) const {
        const int step = stride(over_j);
        for (int l = 0; l < n; ++l) {
            T* const of = logarithms + l * line(over_j);
            T maximum = of[0], sum = 0;
            for (int s = 1; s < n; ++s) maximum = of[s * step] > maximum ? of[s * step] : maximum;
            for (int s = 0; s < n; ++s) sum += exponential(of[s * step] - maximum);
            const T logarithm = std::log(sum);
            for (int s = 0; s < n; ++s) of[s * step] = of[s * step] - maximum - logarithm;
        }
    }
};

// Numbers of up to lanes<T> tokens, [token][count], turned so that tokens lie in lanes, and back. Lanes without a token
// repeat the last one.
template <class T>
inline void tokens_to_lanes(const T* from, int64_t tokens, int64_t count, Vec<T>* to) {
    for (int64_t at = 0; at < count; ++at) {
        T lane[lanes<T>];
        for (int l = 0; l < lanes<T>; ++l) lane[l] = from[min<int64_t>(l, tokens - 1) * count + at];
        to[at] = load(lane);
    }
}
template <class T>
inline void lanes_to_tokens(const Vec<T>* from, int64_t tokens, int64_t count, T* to) {
    for (int64_t at = 0; at < count; ++at) {
        T lane[lanes<T>];
        store(lane, from[at]);
        for (int64_t l = 0; l < tokens; ++l) to[l * count + at] = lane[l];
    }
}

// Scratch for lanes<T> tokens.
template <class T>
struct SinkhornBuffers {
    Vec<T> values[kMaxCoefficients], grads[kMaxCoefficients];
    Vec<T> a[kHyperMaxStreams * kHyperMaxStreams], mixing[kHyperMaxStreams * kHyperMaxStreams];
};

// c from z for up to lanes<T> tokens, [token][n·(n+2)].
template <class T>
inline void constrained_coefficients(const HyperConnection& connection, const CoefficientParameters<T>& params,
                                     int64_t n, const T* z, T* c, int64_t tokens, SinkhornBuffers<T>& scratch) {
    const Sinkhorn<T> sinkhorn(connection, n);
    const int64_t columns = n + 2, count = n * columns;
    tokens_to_lanes(z, tokens, count, scratch.values);
    for (int64_t at = 0; at < count; ++at) scratch.values[at] = params.base[at] + params.scale[at] * scratch.values[at];
    for (int64_t j = 0; j < n; ++j) {
        Vec<T>* row = scratch.values + j * columns;
        row[0] = sigmoid(row[0]);
        row[n + 1] = T(2) * sigmoid(row[n + 1]);
        for (int64_t i = 0; i < n; ++i) scratch.a[j * n + i] = row[1 + i];
    }
    sinkhorn.forward(scratch.a, scratch.mixing);
    for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < n; ++i) scratch.values[j * columns + 1 + i] = scratch.mixing[j * n + i];
    lanes_to_tokens(scratch.values, tokens, count, c);
}

// Its backward: ∂L/∂a, of which ∂L/∂z is scale times that. history: 2·iterations·n² vectors.
template <class T>
inline void constrained_coefficients_backward(const HyperConnection& connection, const CoefficientParameters<T>& params,
                                              int64_t n, const T* z, const T* grad_c, T* grad_a, int64_t tokens,
                                              SinkhornBuffers<T>& scratch, Vec<T>* history) {
    const Sinkhorn<T> sinkhorn(connection, n);
    const int64_t columns = n + 2, count = n * columns;
    tokens_to_lanes(z, tokens, count, scratch.values);
    tokens_to_lanes(grad_c, tokens, count, scratch.grads);
    for (int64_t at = 0; at < count; ++at) scratch.values[at] = params.base[at] + params.scale[at] * scratch.values[at];
    for (int64_t j = 0; j < n; ++j) {
        const Vec<T>* row = scratch.values + j * columns;
        Vec<T>* grad = scratch.grads + j * columns;
        const Vec<T> pre = sigmoid(row[0]), post = sigmoid(row[n + 1]);
        grad[0] *= pre * (T(1) - pre);
        grad[n + 1] *= T(2) * post * (T(1) - post);
        for (int64_t i = 0; i < n; ++i) {
            scratch.a[j * n + i] = row[1 + i];
            scratch.mixing[j * n + i] = grad[1 + i];
        }
    }
    sinkhorn.backward(scratch.a, scratch.mixing, history);
    for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < n; ++i) scratch.grads[j * columns + 1 + i] = scratch.mixing[j * n + i];
    lanes_to_tokens(scratch.grads, tokens, count, grad_a);
}

}  // namespace xlayer::cpu::XLAYER_ISA::hyper
