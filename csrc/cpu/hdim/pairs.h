// Shared parts of hdim's forward and backward: the weights in kernel layout, the list of usable keys, and the scores of
// one query against a tile of its allowed pairs.
//
// Layout. "Packed" arrays hold the accumulation type T, rows padded with zeros to whole vectors: Dp = D, Mp = M, Fp =
// 2D rounded up. A pair's features are [q∘k | |q−k|] (2D of them); the q- and k-only columns of W1 act outside the pair
// loop, as u_i = b1 + W1a·q_i and w_j = W1b·k_j. So per pair the work is one row of a [pairs × 2D] · [2D × M] product,
// and pairs that are not allowed are never gathered into it.
#pragma once

#include "cpu/common/element.h"
#include "cpu/common/gemm.h"
#include "xlayer/hdim.h"
#include "xlayer/workspace.h"

namespace xlayer::cpu::XLAYER_ISA::hdim {

constexpr int64_t kPairTile = 64;    // pairs scored at a time: their features and hidden units stay in the first cache
constexpr int64_t kQueryBlock = 32;  // query rows that share one pass over the values

struct HdimSizes {
    int64_t D, M, Dp, Mp, Fp;

    template <class T>
    static XLAYER_INLINE HdimSizes of(const HdimInputs& in) {
        const int64_t D = in.proj_dim, M = in.mlp_dim;
        return {D, M, round_up(D, lanes<T>), round_up(M, lanes<T>), round_up(2 * D, lanes<T>)};
    }
};

template <class T>
XLAYER_INLINE void clear(T* array, int64_t count) {
    if (count > 0) std::memset(static_cast<void*>(array), 0, count * sizeof(T));  // an array of nothing is null
}

// W1's four column blocks, each transposed to [inputs][Mp], b1, and w2 divided by the temperature.
template <class T>
struct HdimWeights {
    T *query, *key, *pair, *bias1, *weight2;

    XLAYER_INLINE void allocate(Workspace& space, const HdimSizes& s) {
        query = space.take<T>(s.D, s.Mp);
        key = space.take<T>(s.D, s.Mp);
        pair = space.take<T>(2, s.D, s.Mp);
        bias1 = space.take<T>(s.Mp);
        weight2 = space.take<T>(s.Mp);
    }

    template <class S>
    void pack(const HdimInputs& in, const HdimSizes& s) {
        const S* weight1 = static_cast<const S*>(in.weight1);
        T* const block[3] = {query, key, pair};
        const int64_t begin[4] = {0, s.D, 2 * s.D, 4 * s.D};
        for (int b = 0; b < 3; ++b) {
            clear(block[b], (begin[b + 1] - begin[b]) * s.Mp);
            for (int64_t m = 0; m < s.M; ++m)
                for (int64_t c = begin[b]; c < begin[b + 1]; ++c)
                    block[b][(c - begin[b]) * s.Mp + m] = widen(weight1[m * 4 * s.D + c]);
        }
        clear(bias1, s.Mp);
        clear(weight2, s.Mp);
        read_row(static_cast<const S*>(in.bias1), 1, s.M, bias1);
        const S* scorer = static_cast<const S*>(in.weight2);
        for (int64_t m = 0; m < s.M; ++m) weight2[m] = widen(scorer[m]) * static_cast<T>(1 / in.temperature);
    }
};

// The keys that some query may use, per batch: their positions in the tensor, and packed.
template <class T>
struct HdimKeys {
    int64_t capacity;  // Sk
    int32_t* count;    // [B]
    int32_t* index;    // [B][Sk] position of the p-th usable key
    T* packed;         // [B][Sk][Dp]
    T* hidden;         // [B][Sk][Mp]  w_j

    XLAYER_INLINE void allocate(Workspace& space, const HdimInputs& in, const HdimSizes& s) {
        capacity = in.keys;
        count = space.take<int32_t>(in.batch);
        index = space.take<int32_t>(in.batch, in.keys);
        packed = space.take<T>(in.batch, in.keys, s.Dp);
        hidden = space.take<T>(in.batch, in.keys, s.Mp);
    }

    // usable[j] = 1 if some query may use key j, else 0.
    static void mark_usable(const HdimInputs& in, int64_t b, int32_t* usable) {
        for (int64_t j = 0; j < in.keys; ++j) usable[j] = in.attn_mask == nullptr;
        for (int64_t i = 0; in.attn_mask != nullptr && i < in.queries; ++i) {
            const uint8_t* row = in.attn_mask + b * in.attn_mask_stride[0] + i * in.attn_mask_stride[1];
            for (int64_t j = 0; j < in.keys; ++j) usable[j] |= row[j * in.attn_mask_stride[2]] != 0;
        }
        for (int64_t j = 0; in.key_mask != nullptr && j < in.keys; ++j)
            usable[j] &= in.key_mask[b * in.key_mask_stride[0] + j * in.key_mask_stride[1]] != 0;
    }

    template <class S>
    void pack(const HdimInputs& in, const HdimSizes& s, const HdimWeights<T>& weights, int64_t b) {
        const S* key = static_cast<const S*>(in.key) + b * in.key_stride[0];
        int32_t* list = index + b * capacity;
        mark_usable(in, b, list);
        int32_t n = 0;
        for (int64_t j = 0; j < in.keys; ++j)
            if (list[j]) list[n++] = static_cast<int32_t>(j);
        count[b] = n;
        T* to = packed + b * capacity * s.Dp;
        clear(to, n * s.Dp);
        for (int64_t p = 0; p < n; ++p)
            read_row(key + list[p] * in.key_stride[1], in.key_stride[2], s.D, to + p * s.Dp);
        gemm(n, s.M, s.D, to, s.Dp, 1, weights.key, s.Mp, hidden + b * capacity * s.Mp, s.Mp, false);
    }
};

// A block of query rows, packed, and their u_i.
template <class T>
struct HdimQueries {
    T *packed, *hidden;  // [kQueryBlock][Dp], [kQueryBlock][Mp]

    XLAYER_INLINE void allocate(Workspace& space, const HdimSizes& s) {
        packed = space.take<T>(kQueryBlock, s.Dp);
        hidden = space.take<T>(kQueryBlock, s.Mp);
    }

    template <class S>
    XLAYER_INLINE void pack(const HdimInputs& in, const HdimSizes& s, const HdimWeights<T>& weights, int64_t b,
                            int64_t first, int64_t rows) {
        const S* query = static_cast<const S*>(in.query) + b * in.query_stride[0];
        clear(packed, kQueryBlock * s.Dp);
        for (int64_t r = 0; r < rows; ++r) {
            read_row(query + (first + r) * in.query_stride[1], in.query_stride[2], s.D, packed + r * s.Dp);
            std::memcpy(hidden + r * s.Mp, weights.bias1, s.Mp * sizeof(T));
        }
        gemm(rows, s.M, s.D, packed, s.Dp, 1, weights.query, s.Mp, hidden, s.Mp, true);
    }
};

// The positions p in [first, last) of the key list whose pair with query i is allowed; returns how many.
XLAYER_INLINE int64_t allowed_pairs(const HdimInputs& in, const int32_t* index, int64_t b, int64_t i, int64_t first,
                                    int64_t last, int32_t* position) {
    if (in.attn_mask == nullptr) {
        for (int64_t p = first; p < last; ++p) position[p - first] = static_cast<int32_t>(p);
        return last - first;
    }
    const uint8_t* row = in.attn_mask + b * in.attn_mask_stride[0] + i * in.attn_mask_stride[1];
    int64_t n = 0;
    for (int64_t p = first; p < last; ++p)
        if (row[index[p] * in.attn_mask_stride[2]] != 0) position[n++] = static_cast<int32_t>(p);
    return n;
}

struct Relu {
    static constexpr bool kKeepsSlope = false;  // the slope is read off the value
};
struct Gelu {
    static constexpr bool kKeepsSlope = true;
};

// Scratch of one worker for scoring a tile of pairs.
template <class T>
struct HdimTile {
    T* features;        // [kPairTile][Fp] and a row's slack: rows are written in order, each over the end of the last
    T* partial;         // [kPairTile][lanes] each pair's sum over m, one lane per residue of m
    T* logit;           // [kPairTile]
    int32_t* position;  // [kPairTile] of each pair's key in the key list
    T* value;           // [kPairTile][Mp] act(pre); only where hidden units are kept (backward)
    T* slope;           // [kPairTile][Mp] act'(pre), for GELU

    XLAYER_INLINE void allocate(Workspace& space, const HdimSizes& s, bool keep, bool keep_slope) {
        features = space.take<T>((kPairTile + 1) * s.Fp + 2 * lanes<T>);
        partial = space.take<T>(kPairTile, lanes<T>);
        logit = space.take<T>(kPairTile);
        position = space.take<int32_t>(kPairTile);
        value = keep ? space.take<T>(kPairTile, s.Mp) : nullptr;
        slope = keep && keep_slope ? space.take<T>(kPairTile, s.Mp) : nullptr;
    }

    // Call once before the first tile: columns that no row writes stay zero.
    XLAYER_INLINE void reset(const HdimSizes& s) {
        clear(features, (kPairTile + 1) * s.Fp + 2 * lanes<T>);
        clear(partial, kPairTile * lanes<T>);
    }

    XLAYER_INLINE void gather(const HdimSizes& s, const T* query, const T* keys, int64_t n) {
        for (int64_t t = 0; t < n; ++t) {
            const T* key = keys + position[t] * s.Dp;
            T* row = features + t * s.Fp;
            for (int64_t d = 0; d < s.Dp; d += lanes<T>) store<T>(row + d, load(query + d) * load(key + d));
            for (int64_t d = 0; d < s.Dp; d += lanes<T>)
                store<T>(row + s.D + d, magnitude<T>(load(query + d) - load(key + d)));
        }
    }

    // logit[t] = w2 · act(W1·features + u + w) / temperature for t < n.
    template <class Activation, bool Keep>
    __attribute__((noinline)) void score(const HdimSizes& s, const HdimWeights<T>& weights, const T* query_hidden,
                                         const T* key_hidden, int64_t n) {
        const Panels panels(s.Mp / lanes<T>);
        for (int64_t p = 0; p < panels.count; ++p) {
            const int64_t begin = panels.begin(p) * lanes<T>;
            dispatch_panel_width(panels.width(p), [&](auto width) XLAYER_FLATTEN {
                constexpr int kWidth = decltype(width)::value;
                auto finish = [&](int64_t row, auto& acc) XLAYER_FLATTEN {
                    constexpr int kRows = sizeof(acc) / sizeof(acc[0]);
                    Vec<T> u[kWidth], w2[kWidth];
                    XLAYER_UNROLL for (int v = 0; v < kWidth; ++v) {
                        u[v] = load(query_hidden + begin + v * lanes<T>);
                        w2[v] = load(weights.weight2 + begin + v * lanes<T>);
                    }
                    XLAYER_UNROLL for (int r = 0; r < kRows; ++r) {
                        const T* w = key_hidden + position[row + r] * s.Mp + begin;
                        Vec<T> sum = {};
                        XLAYER_UNROLL for (int v = 0; v < kWidth; ++v) {
                            // The small ones first: with few columns it is the features, products of two, that are
                            // large.
                            const Vec<T> pre = acc[r][v] + (u[v] + load(w + v * lanes<T>));
                            Vec<T> act, derivative;
                            if constexpr (Activation::kKeepsSlope) {
                                gelu(pre, &act, &derivative);
                            } else {
                                act = Vec<T>{} > pre ? Vec<T>{} : pre;  // NaN stays NaN
                            }
                            sum += act * w2[v];
                            if constexpr (Keep) {
                                const int64_t at = (row + r) * s.Mp + begin + v * lanes<T>;
                                store<T>(value + at, act);
                                if constexpr (Activation::kKeepsSlope) store<T>(slope + at, derivative);
                            }
                        }
                        T* to = partial + (row + r) * lanes<T>;
                        store<T>(to, begin == 0 ? sum : load(to) + sum);
                    }
                };
                gemm_panel<T, kWidth>(n, 2 * s.D, features, s.Fp, 1, weights.pair + begin, s.Mp, finish);
            });
        }
        for (int64_t t = 0; t < n; t += lanes<T>) store<T>(logit + t, sum_rows(partial + t * lanes<T>));
    }
};

// Calls f(activation, element, accumulation) with values of the types that `in` asks for.
template <class F>
XLAYER_INLINE void dispatch_types(const HdimInputs& in, F f) {
    dispatch_dtype(in.dtype, [&](auto* element) {
        using S = std::remove_pointer_t<decltype(element)>;
        if (in.gelu) {
            f(Gelu{}, S{}, typename Accumulation<S>::Type{});
        } else {
            f(Relu{}, S{}, typename Accumulation<S>::Type{});
        }
    });
}

}  // namespace xlayer::cpu::XLAYER_ISA::hdim
