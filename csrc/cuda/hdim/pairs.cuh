// Shared parts of the hdim kernels: the packed inputs, and a pair's hidden units as a small matrix product.
//
// With W1 = [Wa Wb Wc Wd], the term of the query alone is computed once per query and initializes the accumulator of
// the product over a pair's 3D features:
//
//   pre_ijm = u_im + Wb_m·k_j + Wc_m·(q_i∘k_j) + Wd_m·|q_i−k_j|,     u_i = b1 + Wa·q_i
//
// The features are rounded as PyTorch rounds them, and the weights not at all. Folding q_i∘Wc + Wb into one weight of
// k_j would save a third of the product, but its rounding is the same for all keys of a query and flips ReLUs the same
// way for all of them, so that errors of bfloat16 add up in ∂L/∂q instead of averaging out.
//
// Packed inputs (pack.cu) are contiguous, padded with zeros to 8·G columns (G groups) and to 16·⌈M/16⌉ hidden units,
// and finite: tokens that are masked or hold NaN or inf are zero there, and their bias, which is added to their logits,
// is −inf for masked keys and NaN for the others; 0 for all other tokens.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "cuda/common/fragment.cuh"
#include "xlayer/hdim.h"
#include "xlayer/workspace.h"

namespace xlayer::cuda::hdim {

constexpr int kWarps = 4;  // in a block of the pair kernels
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPairBlocks = 2;              // on a multiprocessor, so that a thread has all registers that it can use
constexpr int kWeightBlocks = 4;            // Wb, Wc, Wd, Wa
constexpr size_t kWeightBytes = 48 * 1024;  // of weights in shared memory at a time; more hidden units take more passes

template <class A>
__device__ __forceinline__ A infinity() {
    return static_cast<A>(HUGE_VALF);
}
// The logit of an allowed pair whose own is −inf, which is what says that a pair is not allowed.
template <class A>
__device__ __forceinline__ A lowest() {
    return sizeof(A) == 8 ? static_cast<A>(-DBL_MAX) : static_cast<A>(-FLT_MAX);
}
template <class A>
__device__ __forceinline__ A not_a_number() {
    return infinity<A>() - infinity<A>();
}

// A mask [B,S], any byte but 0: may be used.
struct TokenFlags {
    const uint8_t* data;  // null: all
    int64_t stride[2];

    __device__ __forceinline__ bool allows(int64_t b, int64_t s) const {
        return data == nullptr || data[b * stride[0] + s * stride[1]] != 0;
    }
};

// Sizes as the packed arrays have them.
struct PairSizes {
    int64_t batch, queries, keys, pitch;
    int hidden;  // M, a multiple of 16, at least 16
    int groups;  // G

    explicit PairSizes(const HdimInputs& in)
        : batch(in.batch),
          queries(in.queries),
          keys(in.keys),
          pitch(logits_pitch(in.keys)),
          hidden(static_cast<int>(in.mlp_dim > 0 ? round_up(in.mlp_dim, 16) : 16)),
          groups(0) {
        const int wanted = static_cast<int>(ceil_div(in.proj_dim, 8));
        const int half_precision[] = {2, 3, 4, 8}, full_precision[] = {4, 8};  // what kernels are compiled for
        if (element_size(in.dtype) == 2) {
            for (int have : half_precision) groups = groups == 0 && wanted <= have ? have : groups;
        } else {
            for (int have : full_precision) groups = groups == 0 && wanted <= have ? have : groups;
        }
    }
};

template <class T>
struct Packed {
    using A = Accumulator<T>;
    T* query;         // [B][Sq][8G]
    T* key;           // [B][Sk][8G]
    T* weight;        // [M][kWeightBlocks][8G]
    A* query_weight;  // [8G][M]  Wa
    A* bias1;         // [M]
    A* weight2;       // [M]  w2 / temperature
    A* query_hidden;  // [B][Sq][M]  u
    A* query_bias;    // [B][Sq]
    A* key_bias;      // [B][Sk]
};

template <class T>
Packed<T> take_packed(Workspace& space, const PairSizes& s) {
    using A = Accumulator<T>;
    Packed<T> p;
    p.query = space.take<T>(s.batch, s.queries, 8, s.groups);
    p.key = space.take<T>(s.batch, s.keys, 8, s.groups);
    p.weight = space.take<T>(s.hidden, kWeightBlocks, 8, s.groups);
    p.query_weight = space.take<A>(8, s.groups, s.hidden);
    p.bias1 = space.take<A>(s.hidden);
    p.weight2 = space.take<A>(s.hidden);
    p.query_hidden = space.take<A>(s.batch, s.queries, s.hidden);
    p.query_bias = space.take<A>(s.batch, s.queries);
    p.key_bias = space.take<A>(s.batch, s.keys);
    return p;
}

// --- Activations ----------------------------------------------------------------------------------------------------

struct Relu {
    template <class A>
    static __device__ __forceinline__ A value(A x) {
        return clamp_min_zero(x);
    }
    template <class A>
    static __device__ __forceinline__ A slope(A x) {
        return x > 0 ? A(1) : A(0);
    }
};
struct Gelu {
    template <class A>
    static __device__ __forceinline__ A cdf(A x) {
        return A(0.5) * (A(1) + erf(x * A(0.70710678118654752440)));
    }
    template <class A>
    static __device__ __forceinline__ A value(A x) {
        return x * cdf(x);
    }
    template <class A>
    static __device__ __forceinline__ A slope(A x) {
        return cdf(x) + x * exp(A(-0.5) * x * x) * A(0.39894228040143267794);
    }
};

// --- Tiles ----------------------------------------------------------------------------------------------------------

// Copies `rows` rows of `width` elements between 16-byte aligned rows, `threads` threads together; rows from `valid` on
// become zero. Ends with the copies under way.
template <class T>
__device__ __forceinline__ void copy_rows(T* to, int to_pitch, const T* from, int from_pitch, int rows, int valid,
                                          int width, int thread, int threads) {
    constexpr int kElements = 16 / sizeof(T);
    const int pieces = width / kElements;
    for (int index = thread; index < rows * pieces; index += threads) {
        const int row = index / pieces, column = index % pieces * kElements;
        T* const place = to + row * to_pitch + column;
        if (row < valid) {
            copy_async(place, from + static_cast<int64_t>(row) * from_pitch + column);
        } else {
            store_vec<Space::generic>(place, Vector<T, kElements>{});
        }
    }
    commit_copies();
}

// A query's columns 2t and 2t+1 of each group: held in registers, or read where they are used.
template <class T, int G, bool InRegisters>
class QueryRow {
  public:
    __device__ __forceinline__ explicit QueryRow(const T* row) : from_(row + lane_column()) {
        if constexpr (InRegisters) {
#pragma unroll
            for (int g = 0; g < G; ++g) held_[g] = load_pair(from_ + 8 * g);
        }
    }
    __device__ __forceinline__ Pair<T> operator()(int g) const {
        if constexpr (InRegisters) return held_[g];
        return load_pair(from_ + 8 * g);
    }

  private:
    const T* from_;
    Pair<T> held_[InRegisters ? G : 1];
};

// q∘k and |q−k| of R tiles of 16 keys, for the current query. In half precision they are computed once and held in
// registers: the compiler would recompute them for every 8 hidden units. Else they are computed where they are used.
template <class T, int G, int R>
class PairFeatures {
  public:
    template <class Keys, class Query>
    __device__ __forceinline__ PairFeatures(const Keys& keys, const Query& query) {
        if constexpr (is_half<T>) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const FragmentA<T> key = keys(r, g);
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        held_[r][g].row[h] = product<T>(key.row[h], query(g));
                        held_[r][G + g].row[h] = distance<T>(key.row[h], query(g));
                    }
                }
            }
        }
    }
    __device__ __forceinline__ const FragmentA<T>& operator()(int r, int g) const { return held_[r][g]; }

  private:
    FragmentA<T> held_[is_half<T> ? R : 1][is_half<T> ? 2 * G : 1];
};

// pre[r] += [k | q∘k | |q−k|] · [Wb | Wc | Wd]ᵀ for R tiles of 16 keys and 8 hidden units, whose weights begin at
// `weights`. keys(r, g) is group g of tile r; query is a QueryRow.
template <class T, int G, int R, class Keys, class Query>
__device__ __forceinline__ void add_scores(FragmentC<T> (&pre)[R], const Keys& keys,
                                           const PairFeatures<T, G, R>& features, const T* weights, int pitch,
                                           const Query& query) {
    if constexpr (is_half<T>) {
        FragmentB<T> columns[3 * G];
        load_b_from_rows(columns, weights, pitch);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            FragmentA<T> all[3 * G];
#pragma unroll
            for (int g = 0; g < 3 * G; ++g) all[g] = g < G ? keys(r, g) : features(r, g - G);
            multiply(pre[r], all, columns);
        }
    } else {  // one group at a time: all of them would not fit in registers
#pragma unroll(sizeof(T) == 8 ? 1 : G)
        for (int g = 0; g < G; ++g) {
            FragmentB<T> linear[1], hadamard[1], difference[1];
            load_b_from_rows(linear, weights + 8 * g, pitch);
            load_b_from_rows(hadamard, weights + 8 * (G + g), pitch);
            load_b_from_rows(difference, weights + 8 * (2 * G + g), pitch);
            const Pair<T> q = query(g);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const FragmentA<T> key = keys(r, g);
                multiply_group(pre[r], key, linear[0]);
                multiply_group(pre[r], {{product<T>(key.row[0], q), product<T>(key.row[1], q)}}, hadamard[0]);
                multiply_group(pre[r], {{distance<T>(key.row[0], q), distance<T>(key.row[1], q)}}, difference[0]);
            }
        }
    }
}

// Queries in a slice, at least 1: the pair kernels split the queries so that `tasks` warps become `target_warps`. A
// function of the sizes alone, so that results do not depend on the machine.
inline int64_t slice_length(int64_t queries, int64_t tasks, int64_t target_warps) {
    constexpr int64_t kMinLength = 16;
    const int64_t slices = ceil_div(target_warps, tasks > 0 ? tasks : 1), length = ceil_div(queries, slices);
    return length > kMinLength ? length : kMinLength;
}

// Calls f(element, activation, groups) with values of the types that the inputs ask for.
template <class F>
void dispatch_pair_types(const HdimInputs& in, const F& f) {
    const int groups = PairSizes(in).groups;
    auto dispatch_groups = [&](auto element, auto activation) {
        if constexpr (is_half<decltype(element)>) {
            if (groups == 2) return f(element, activation, std::integral_constant<int, 2>{});
            if (groups == 3) return f(element, activation, std::integral_constant<int, 3>{});
        }
        if (groups == 4) return f(element, activation, std::integral_constant<int, 4>{});
        return f(element, activation, std::integral_constant<int, 8>{});
    };
    auto dispatch_activation = [&](auto element) {
        return in.gelu ? dispatch_groups(element, Gelu{}) : dispatch_groups(element, Relu{});
    };
    if (in.dtype == DType::float32 && in.tf32) return dispatch_activation(tf32{});
    dispatch_dtype(in.dtype, dispatch_activation);
}

}  // namespace xlayer::cuda::hdim
