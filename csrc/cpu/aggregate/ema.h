// Shared parts of ema_scan's forward and backward: tiles of tokens, rows of a group of tokens, and LayerNorm.
#pragma once

#include <type_traits>

#include "cpu/common/rows.h"
#include "xlayer/aggregate.h"
#include "xlayer/workspace.h"

namespace xlayer::cpu::XLAYER_ISA::aggregate {

// Tokens whose rows are worked on at once: their sums do not wait for each other, and the norm's vectors are loaded
// once for all.
constexpr int kGroup = kVectorBytes == 64 ? 4 : 2;

// Calls f(std::integral_constant<int, tokens>{}, first) for groups of tokens below `count`.
template <class F>
XLAYER_INLINE void for_groups(int64_t count, const F& f) {
    int64_t t = 0;
    for (; t + kGroup <= count; t += kGroup) f(std::integral_constant<int, kGroup>{}, t);
    for (; t + 2 <= count; t += 2) f(std::integral_constant<int, 2>{}, t);
    for (; t < count; ++t) f(std::integral_constant<int, 1>{}, t);
}

// Rows of the tokens of a group.
template <class T>
struct GroupRows {
    T* first;
    int64_t stride;
    XLAYER_INLINE T* operator[](int g) const { return first + g * stride; }
};

// Calls f(begin, end) for short runs of columns: a sum of short sums rounds less than one long chain.
constexpr int64_t kRun = 32;  // additions in a chain
template <class T, class F>
XLAYER_INLINE void for_runs(int64_t width, const F& f) {
    for (int64_t e = 0; e < width; e += kRun * lanes<T>) f(e, min(width, e + kRun * lanes<T>));
}

// Means of the rows of a group, one row after the other: it is here that they come from memory, and a run of addresses
// is what the prefetchers follow.
template <class T, int Group>
XLAYER_INLINE void means(const GroupRows<const T>& x, int64_t width, T* mean) {
    Vec<T> total[Group];
    XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
        const T* row = x[g];
        Vec<T> sum[4] = {};
        int64_t e = 0;
        for (; e + 4 * lanes<T> <= width; e += 4 * lanes<T>) {
            XLAYER_UNROLL for (int i = 0; i < 4; ++i) sum[i] += load(row + e + i * lanes<T>);
        }
        for_vectors<T>(e, width, [&](int64_t at, auto io) XLAYER_FLATTEN { sum[0] += io.load(row + at); });
        total[g] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    sum_each_lanes<T, Group>(total, mean);
    XLAYER_UNROLL for (int g = 0; g < Group; ++g) mean[g] /= static_cast<T>(width);
}

// 1/√(variance + eps) of the rows of a group, and by how much `mean` had been rounded, which is not small beside the
// deviations where the mean is large beside them. Half of the rows `prefetch_offset` elements further are prefetched.
template <class T, int Group>
XLAYER_INLINE void inverse_deviations(const GroupRows<const T>& x, int64_t width, double eps, int64_t prefetch_offset,
                                      const T* mean, T* rest, T* scale) {
    Vec<T> sum[Group] = {}, square[Group] = {};
    for_runs<T>(width, [&](int64_t begin, int64_t end) XLAYER_FLATTEN {
        Vec<T> run_sum[Group] = {}, run_square[Group] = {};
        for_vectors<T>(begin, end, [&](int64_t e, auto io) XLAYER_FLATTEN {
            XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                if (g < Group / 2) prefetch_near(x[g] + e + prefetch_offset);
                const Vec<T> centered = io.zero_tail(io.load(x[g] + e) - mean[g]);
                run_sum[g] += centered;
                run_square[g] += centered * centered;
            }
        });
        XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
            sum[g] += run_sum[g];
            square[g] += run_square[g];
        }
    });
    sum_each_lanes<T, Group>(sum, rest);
    sum_each_lanes<T, Group>(square, scale);
    XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
        rest[g] /= static_cast<T>(width);
        const T variance = scale[g] / static_cast<T>(width) - rest[g] * rest[g];
        scale[g] = 1 / std::sqrt(max(variance, T(0)) + static_cast<T>(eps));
    }
}

// 1 − σ(a) and σ(a): each with a small error of its own, however far from zero a is.
template <class T>
struct Gate {
    T keep, take;
};

template <class T>
class Scan {
  public:
    static constexpr int64_t kStreamingBytes = 32
                                               << 20;  // bytes of a result from which on it is written past the caches

    // A tile has at most `tile_bytes` of the rows of one layer, and at most `most` tokens.
    Scan(const EmaScan& args, int64_t tile_bytes, int64_t max_tokens)
        : args(args),
          row(round_up(max<int64_t>(args.width, 1), lanes<T>)),
          tile(max<int64_t>(1, min(max_tokens, tile_bytes / static_cast<int64_t>(row * sizeof(T))))),
          same_dtype(args.dtype == dtype_of<T>) {}

    Gate<T> gate(int64_t layer) const {
        const T logit = static_cast<const T*>(args.gate_logits)[layer];
        return {1 / (1 + exponential(logit)), 1 / (1 + exponential(-logit))};
    }

    // Rows of a group of tokens where they lie, or widened into `scratch`, a row for each.
    template <int Group>
    XLAYER_INLINE GroupRows<const T> read(const LayerRows& rows, int64_t layer, int64_t token, T* scratch) const {
        const int64_t offset = layer * rows.layer_stride + token * rows.token_stride;
        if (same_dtype) return {static_cast<const T*>(rows.data) + offset, rows.token_stride};
        for (int g = 0; g < Group; ++g)
            read_elements<T>(args.dtype, rows.data, offset + g * rows.token_stride, args.width, scratch + g * row);
        return {scratch, row};
    }
    // From a row to the one that is read `layers` later, to be fetched ahead; 0 where there is none.
    int64_t prefetch_offset(const LayerRows& rows, int64_t layer, int64_t layers) const {
        return same_dtype && layer + layers >= 0 && layer + layers < args.layers ? layers * rows.layer_stride : 0;
    }
    // Destination of a group's results: contiguous rows from `offset` on, or `scratch`, which `finish` narrows.
    XLAYER_INLINE GroupRows<T> target(void* data, int64_t offset, T* scratch) const {
        if (same_dtype) return {static_cast<T*>(data) + offset, args.width};
        return {scratch, row};
    }
    template <int Group>
    XLAYER_INLINE void finish(const GroupRows<T>& from, void* data, int64_t offset) const {
        for (int g = 0; !same_dtype && g < Group; ++g)
            narrow_elements(args.dtype, from[g], data, offset + g * args.width, args.width);
    }
    // Whether results of all layers are written past the caches.
    bool use_streaming(const void* results) const {
        const int64_t bytes = args.layers * args.tokens * args.width * static_cast<int64_t>(sizeof(T));
        return same_dtype && bytes >= kStreamingBytes && args.width % lanes<T> == 0 &&
               reinterpret_cast<uintptr_t>(results) % kVectorBytes == 0;
    }

    void load_initial(int64_t token, T* to) const {
        if (args.initial_state == nullptr) {
            for (int64_t e = 0; e < row; ++e) to[e] = 0;
            return;
        }
        const T* from = read_elements<T>(args.dtype, args.initial_state, token * args.width, args.width, to);
        if (from != to) read_row(from, 1, args.width, to);
    }

    // f(g, value, x̂, e, io) for every vector of the rows of a group of taps, normalized where that is asked for.
    // Meanwhile it prefetches the rows at `prefetch_offset`, in parts, so that memory is never idle.
    template <int Group, class F>
    XLAYER_INLINE void for_each_value(const GroupRows<const T>& x, int64_t prefetch_offset, T* scale,
                                      const F& f) const {
        if (!args.normalize) {
            for_vectors<T>(0, args.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
                XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                    prefetch_near(x[g] + e + prefetch_offset);
                    const Vec<T> value = io.load(x[g] + e);
                    f(g, value, value, e, io);
                }
            });
            return;
        }
        T mean[Group], rest[Group];
        means<T, Group>(x, args.width, mean);
        inverse_deviations<T, Group>(x, args.width, args.eps, prefetch_offset, mean, rest, scale);
        XLAYER_UNROLL for (int g = 0; g < Group; ++g) rest[g] *= scale[g];
        const T* weight = static_cast<const T*>(args.norm_weight);
        const T* bias = static_cast<const T*>(args.norm_bias);
        for_vectors<T>(0, args.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            const Vec<T> slope = io.load(weight + e), offset = bias == nullptr ? Vec<T>{} : io.load(bias + e);
            XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                if (g >= Group / 2) prefetch_near(x[g] + e + prefetch_offset);
                const Vec<T> unit = io.zero_tail((io.load(x[g] + e) - mean[g]) * scale[g] - rest[g]);
                f(g, unit * slope + offset, unit, e, io);
            }
        });
    }

    const EmaScan& args;
    const int64_t row, tile;  // elements of a row of scratch; tokens of a tile
    const bool same_dtype;    // rows in memory are of T: neither widened nor narrowed
};

}  // namespace xlayer::cpu::XLAYER_ISA::aggregate
