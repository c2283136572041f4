// Shared parts of depth_attention's forward and backward: the taps in a token's window, and the softmax over them.
#pragma once

#include "cpu/aggregate/products.h"

namespace xlayer::cpu::XLAYER_ISA::aggregate {

constexpr int64_t kAttentionTile = 96;              // at most, of a tile
constexpr int64_t kAttentionTileBytes = 512 << 10;  // of their states and the like

// Keys and values of one token, from the oldest tap of the window on.
template <class T>
struct Window {
    const T *keys, *values;
    int64_t key_stride, value_stride;  // from layer to layer
    int64_t first, count;              // layers
};

inline int64_t max_taps(const DepthAttention& args) { return max<int64_t>(1, min(args.window, args.layers)); }
inline int64_t inner_width(const DepthAttention& args) { return args.num_heads * args.head_width; }

// Elements of scratch for window_of(): none for rows that can be read where they lie.
template <class T>
inline int64_t window_size(const DepthAttention& args) {
    return args.dtype == dtype_of<T> ? 0 : 2 * max_taps(args) * inner_width(args);
}

// The taps of a token at a layer, where they lie or widened into `scratch`.
template <class T>
inline Window<T> window_of(const DepthAttention& args, int64_t layer, int64_t token, T* scratch) {
    const int64_t first = max<int64_t>(0, layer - args.window + 1), count = layer + 1 - first;
    const int64_t width = inner_width(args);
    auto rows = [&](const LayerRows& from, T* wide, int64_t* stride) {
        const int64_t offset = first * from.layer_stride + token * from.token_stride;
        *stride = args.dtype == dtype_of<T> ? from.layer_stride : width;
        if (args.dtype == dtype_of<T>) return static_cast<const T*>(from.data) + offset;
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

// Numbers per tap and head, [taps][heads_row], heads in lanes; lanes without a head hold zeros.
template <class T>
inline int64_t heads_row(const DepthAttention& args) {
    return round_up(args.num_heads, lanes<T>);
}
template <class T>
inline int64_t scores_size(const DepthAttention& args) {
    return max_taps(args) * heads_row<T>(args);
}

// out[tap][head] = the product of a row and a tap over the head's columns.
template <class T>
inline void head_products(const DepthAttention& args, const T* a, const T* taps, int64_t stride, int64_t count,
                          T* out) {
    T partial[lanes<T> * lanes<T>] = {}, sum[lanes<T>];
    T* to[lanes<T>];
    int pending = 0;
    auto flush = [&] {
        store(sum, sum_rows<T>(partial));
        for (int i = 0; i < pending; ++i) *to[i] = sum[i];
        pending = 0;
    };
    std::memset(out, 0, count * heads_row<T>(args) * sizeof(T));
    for (int64_t j = 0; j < count; ++j) {
        for (int64_t h = 0; h < args.num_heads; ++h) {
            const T *row = a + h * args.head_width, *tap = taps + j * stride + h * args.head_width;
            Vec<T> products = {};
            for_vectors<T>(0, args.head_width,
                           [&](int64_t e, auto io) XLAYER_FLATTEN { products += io.load(row + e) * io.load(tap + e); });
            store(partial + pending * lanes<T>, products);
            to[pending++] = out + j * heads_row<T>(args) + h;
            if (pending == lanes<T>) flush();
        }
    }
    if (pending > 0) flush();
}

// weights[tap][head] = softmax over the taps of scale · q·k.
template <class T>
inline void attention_weights(const DepthAttention& args, const T* query, const Window<T>& window, T* weights) {
    const int64_t taps = window.count, row = heads_row<T>(args);
    const T scale = static_cast<T>(args.scale);
    head_products(args, query, window.keys, window.key_stride, taps, weights);
    for (T* head = weights; head < weights + row; head += lanes<T>) {
        Vec<T> maximum = load(head), sum = {};
        for (int64_t j = 1; j < taps; ++j) {
            const Vec<T> product = load(head + j * row);
            maximum = (scale < 0 ? product < maximum : product > maximum) ? product : maximum;
        }
        for (int64_t j = 0; j < taps; ++j) {
            const Vec<T> weight = exponential(scale * (load(head + j * row) - maximum));
            store(head + j * row, weight);
            sum += weight;
        }
        for (int64_t j = 0; j < taps; ++j) store(head + j * row, load(head + j * row) / sum);
    }
}

// to = Σ_j weights[j]·taps[j], head by head.
template <class T>
inline void weighted_sum(const DepthAttention& args, const T* weights, const T* taps, int64_t stride, int64_t count,
                         T* to) {
    for (int64_t h = 0; h < args.num_heads; ++h) {
        const int64_t at = h * args.head_width;
        for_vectors<T>(at, at + args.head_width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            Vec<T> sum = {};
            for (int64_t j = 0; j < count; ++j)
                sum += weights[j * heads_row<T>(args) + h] * io.load(taps + j * stride + e);
            io.store(to + e, sum);
        });
    }
}

}  // namespace xlayer::cpu::XLAYER_ISA::aggregate
