// What depth_attention's forward and backward share: the taps that one token's state may use, and its softmax.
#pragma once

#include "aggregate_products.h"

namespace xlayer::cpu::XLAYER_ISA {

constexpr int64_t kAttentionTile = 96;              // tokens that walk together, at most
constexpr int64_t kAttentionTileBytes = 512 << 10;  // of their states and the like

// Keys and values of one token, from the oldest tap of the window on.
template <class T>
struct Window {
    const T *keys, *values;
    int64_t key_stride, value_stride;  // from layer to layer
    int64_t first, count;              // layers
};

inline int64_t most_taps(const DepthAttention& args) { return greater<int64_t>(1, lesser(args.memory, args.layers)); }
inline int64_t inner_width(const DepthAttention& args) { return args.heads * args.head_width; }

// Elements of scratch for window_of(): none for rows that can be read where they lie.
template <class T>
inline int64_t window_size(const DepthAttention& args) {
    return args.dtype == own_dtype<T> ? 0 : 2 * most_taps(args) * inner_width(args);
}

// The taps of a token at a layer, where they lie or widened into `scratch`.
template <class T>
inline Window<T> window_of(const DepthAttention& args, int64_t layer, int64_t token, T* scratch) {
    const int64_t first = greater<int64_t>(0, layer - args.memory + 1), count = layer + 1 - first;
    const int64_t width = inner_width(args);
    auto rows = [&](const LayerRows& from, T* wide, int64_t* stride) {
        const int64_t offset = first * from.layer_stride + token * from.token_stride;
        *stride = args.dtype == own_dtype<T> ? from.layer_stride : width;
        if (args.dtype == own_dtype<T>) return static_cast<const T*>(from.data) + offset;
        for (int64_t j = 0; j < count; ++j)
            read_elements(args.dtype, from.data, offset + j * from.layer_stride, width, wide + j * width);
        return static_cast<const T*>(wide);
    };
    Window<T> window;
    window.first = first, window.count = count;
    window.keys = rows(args.keys, scratch, &window.key_stride);
    window.values = rows(args.values, scratch + count * width, &window.value_stride);
    return window;
}

template <class T>
XLAYER_INLINE T dot(const T* a, const T* b, int64_t count) {
    Vec<T> sum = {};
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN { sum += io.load(a + e) * io.load(b + e); });
    return sum_lanes<T>(sum);
}

// Room for a number per head and tap.
template <class T>
inline int64_t weights_size(const DepthAttention& args) {
    return round_up(args.heads * most_taps(args), lanes<T>);
}

// weights[head][tap] = softmax over the taps of scale · q·k.
template <class T>
inline void attention_weights(const DepthAttention& args, const T* query, const Window<T>& window, T* weights) {
    const int64_t taps = window.count, count = args.heads * taps;
    const T scale = static_cast<T>(args.scale);
    for (int64_t h = 0; h < args.heads; ++h) {
        const int64_t at = h * args.head_width;
        T* score = weights + h * taps;
        T most = T(-HUGE_VAL);
        for (int64_t j = 0; j < taps; ++j) {
            score[j] = scale * dot(query + at, window.keys + j * window.key_stride + at, args.head_width);
            most = greater(most, score[j]);
        }
        for (int64_t j = 0; j < taps; ++j) score[j] -= most;
    }
    for (int64_t c = count; c < round_up(count, lanes<T>); ++c) weights[c] = 0;
    for (int64_t c = 0; c < count; c += lanes<T>) store(weights + c, exponential(load(weights + c)));
    for (int64_t h = 0; h < args.heads; ++h) {
        T sum = 0;
        for (int64_t j = 0; j < taps; ++j) sum += weights[h * taps + j];
        for (int64_t j = 0; j < taps; ++j) weights[h * taps + j] /= sum;
    }
}

// to = Σ_j weights[j]·rows[j], for one head's columns.
template <class T>
XLAYER_INLINE void weighted_sum(const T* weights, const T* rows, int64_t stride, int64_t taps, int64_t count, T* to) {
    for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN {
        Vec<T> sum = {};
        for (int64_t j = 0; j < taps; ++j) sum += weights[j] * io.load(rows + j * stride + e);
        io.store(to + e, sum);
    });
}

}  // namespace xlayer::cpu::XLAYER_ISA
