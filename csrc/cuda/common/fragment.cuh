// Tensor core fragments: small matrices spread over a warp in one layout for every element type, so that one kernel
// source serves all of them. With g = lane / 4 and t = lane % 4 a lane holds
//
//   FragmentA<T>   (16×8, left operand)    (g, 2t)  (g, 2t+1)  (g+8, 2t)  (g+8, 2t+1)
//   FragmentB<T>   (8×8, right operand)    (2t, g)  (2t+1, g)
//   FragmentC<T>   (16×8, accumulator)     as FragmentA, in the accumulation type: rounded to T it is a FragmentA
//
// A product runs over groups of 8: sum += Σ_k left[k] · right[k]. bfloat16 and float16 take m16n8k16, float64 m8n8k4.
// float32 is split into two tf32 parts, x = high + low, and takes three m16n8k8 products, which keeps 21 bits of each
// factor; every group's product is added in float32 arithmetic, because the tensor cores truncate their sums. The type
// tf32 is float32 with one product of the high parts.
#pragma once

#include "cuda/common/device.cuh"

namespace xlayer::cuda {

template <class T>
constexpr bool is_half = sizeof(T) == 2;

__device__ __forceinline__ int lane_row() { return lane_id() / 4; }         // g
__device__ __forceinline__ int lane_column() { return lane_id() % 4 * 2; }  // 2t

// Two neighbouring elements: one register of two halves, or two numbers.
template <class T, bool = is_half<T>>
struct PairOf {
    using type = Vector<T, 2>;
};
template <class T>
struct PairOf<T, true> {
    using type = uint32_t;
};
template <class T>
using Pair = typename PairOf<T>::type;

template <class T>
struct FragmentA {
    Pair<T> row[2];  // rows g and g+8
};
template <class T>
struct FragmentB {
    Pair<T> at;
};
template <class T>
struct FragmentC {
    Accumulator<T> at[4];
};

template <class T>
__device__ __forceinline__ Accumulator<T> element(const Pair<T>& pair, int which) {
    if constexpr (is_half<T>) {
        return widen(pair_element<T>(pair, which));
    } else {
        return pair.at[which];
    }
}
template <class T>
__device__ __forceinline__ Pair<T> make_pair(Accumulator<T> first, Accumulator<T> second) {
    if constexpr (is_half<T>) {
        return pack<T>(first, second);
    } else {
        return {first, second};
    }
}
template <class T>
__device__ __forceinline__ Pair<T> load_pair(const T* from) {
    return *reinterpret_cast<const Pair<T>*>(from);
}
// Both of one element.
template <class T>
__device__ __forceinline__ Pair<T> load_twice(const T* from) {
    const Accumulator<T> x = widen(*from);
    return make_pair<T>(x, x);
}

// a·b + c, rounded once; a·b and |a − b|, rounded like PyTorch's own.
template <class T>
__device__ __forceinline__ Pair<T> multiply_add(const Pair<T>& a, const Pair<T>& b, const Pair<T>& c) {
    if constexpr (is_half<T>) {
        return pair_fma<T>(a, b, c);
    } else {
        return {fma(widen(a.at[0]), widen(b.at[0]), widen(c.at[0])),
                fma(widen(a.at[1]), widen(b.at[1]), widen(c.at[1]))};
    }
}
template <class T>
__device__ __forceinline__ Pair<T> product(const Pair<T>& a, const Pair<T>& b) {
    if constexpr (is_half<T>) {
        constexpr uint32_t kMinusZeros = 0x80008000;
        return pair_fma<T>(a, b, kMinusZeros);
    } else {
        return {widen(a.at[0]) * widen(b.at[0]), widen(a.at[1]) * widen(b.at[1])};
    }
}
template <class T>
__device__ __forceinline__ Pair<T> distance(const Pair<T>& a, const Pair<T>& b) {
    if constexpr (is_half<T>) {
        constexpr uint32_t kMinusOnes = std::is_same_v<T, bfloat16> ? 0xBF80BF80 : 0xBC00BC00, kNoSigns = 0x7FFF7FFF;
        return pair_fma<T>(b, kMinusOnes, a) & kNoSigns;
    } else {
        return {fabs(widen(a.at[0]) - widen(b.at[0])), fabs(widen(a.at[1]) - widen(b.at[1]))};
    }
}

template <class T>
__device__ __forceinline__ FragmentA<T> round_to_a(const FragmentC<T>& sum) {
    return {{make_pair<T>(sum.at[0], sum.at[1]), make_pair<T>(sum.at[2], sum.at[3])}};
}

// --- From shared memory ---------------------------------------------------------------------------------------------
// Rows of a tile lie `pitch` elements apart, an odd multiple of 8, so that no two rows meet in a bank; every tile
// begins at a multiple of 16 bytes.

__host__ __device__ constexpr int tile_pitch(int groups) { return 8 * (groups | 1); }

// 16 rows of `K` groups of columns.
template <class T, int K>
__device__ __forceinline__ void load_a(FragmentA<T> (&to)[K], const T* tile, int pitch) {
    if constexpr (is_half<T>) {
        const int matrix = lane_id() / 8, row = lane_id() % 8 + matrix % 2 * 8;
#pragma unroll
        for (int k = 0; k + 2 <= K; k += 2) {
            uint32_t four[4];
            load_matrices(four, tile + row * pitch + 8 * (k + matrix / 2));
            to[k] = {{four[0], four[1]}};
            to[k + 1] = {{four[2], four[3]}};
        }
        if constexpr (K % 2 != 0) {
            uint32_t two[2];
            load_matrices(two, tile + row * pitch + 8 * (K - 1));
            to[K - 1] = {{two[0], two[1]}};
        }
    } else {
        const T* from = tile + lane_row() * pitch + lane_column();
#pragma unroll
        for (int k = 0; k < K; ++k) to[k] = {{load_pair(from + 8 * k), load_pair(from + 8 * pitch + 8 * k)}};
    }
}

// The transpose of 8 rows of `K` groups of columns: to[k] is 8k.. of the columns by the 8 rows.
template <class T, int K>
__device__ __forceinline__ void load_b_from_rows(FragmentB<T> (&to)[K], const T* tile, int pitch) {
    if constexpr (is_half<T>) {
        const int matrix = lane_id() / 8;
        const T* from = tile + lane_id() % 8 * pitch;
        constexpr int kFour = K / 4 * 4, kTwo = kFour + K % 4 / 2 * 2;
#pragma unroll
        for (int k = 0; k < kFour; k += 4) {
            uint32_t four[4];
            load_matrices(four, from + 8 * (k + matrix));
#pragma unroll
            for (int m = 0; m < 4; ++m) to[k + m] = {four[m]};
        }
        if constexpr (kTwo > kFour) {
            uint32_t two[2];
            load_matrices(two, from + 8 * (kFour + matrix % 2));
            to[kFour] = {two[0]};
            to[kFour + 1] = {two[1]};
        }
        if constexpr (K > kTwo) {
            uint32_t one[1];
            load_matrices(one, from + 8 * kTwo);
            to[kTwo] = {one[0]};
        }
    } else {
        const T* from = tile + lane_row() * pitch + lane_column();
#pragma unroll
        for (int k = 0; k < K; ++k) to[k] = {load_pair(from + 8 * k)};
    }
}

// 16 rows of 8 columns, as two groups of 8 rows.
template <class T>
__device__ __forceinline__ void load_b(FragmentB<T> (&to)[2], const T* tile, int pitch) {
    if constexpr (is_half<T>) {
        uint32_t two[2];
        load_matrices_transposed(two, tile + lane_id() % 16 * pitch);
        to[0] = {two[0]};
        to[1] = {two[1]};
    } else {
        const T* from = tile + lane_column() * pitch + lane_row();
        to[0] = {{from[0], from[pitch]}};
        to[1] = {{from[8 * pitch], from[9 * pitch]}};
    }
}

// --- Products -------------------------------------------------------------------------------------------------------

// A float32 number as the sum of two tf32 ones, of which the hardware drops the low bits itself. NaN may leave `high`,
// but stays in `low`.
struct Split {
    uint32_t high, low;
    __device__ __forceinline__ explicit Split(float x)
        : high((bits_of(x) + 0x1000) & 0xFFFFE000), low(bits_of(x - float_of(high))) {}
};

__device__ __forceinline__ void multiply_group(FragmentC<float>& sum, const FragmentA<float>& left,
                                               const FragmentB<float>& right) {
    const Split a[4] = {Split(left.row[0].at[0]), Split(left.row[1].at[0]), Split(left.row[0].at[1]),
                        Split(left.row[1].at[1])};
    const Split b[2] = {Split(right.at.at[0]), Split(right.at.at[1])};
    const uint32_t a_high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
    const uint32_t a_low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
    const uint32_t b_high[2] = {b[0].high, b[1].high}, b_low[2] = {b[0].low, b[1].low};
    float group[4] = {};
    mma_16x8x8_tf32(group, a_low, b_high);
    mma_16x8x8_tf32(group, a_high, b_low);
    mma_16x8x8_tf32(group, a_high, b_high);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.at[e] += group[e];
}

__device__ __forceinline__ void multiply_group(FragmentC<tf32>& sum, const FragmentA<tf32>& left,
                                               const FragmentB<tf32>& right) {
    const uint32_t a[4] = {to_tf32(left.row[0].at[0]), to_tf32(left.row[1].at[0]), to_tf32(left.row[0].at[1]),
                           to_tf32(left.row[1].at[1])};
    const uint32_t b[2] = {to_tf32(right.at.at[0]), to_tf32(right.at.at[1])};
    mma_16x8x8_tf32(sum.at, a, b);
}

__device__ __forceinline__ void multiply_group(FragmentC<double>& sum, const FragmentA<double>& left,
                                               const FragmentB<double>& right) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int k = 0; k < 2; ++k)
            mma_8x8x4(sum.at[2 * half], sum.at[2 * half + 1], left.row[half].at[k], right.at.at[k]);
    }
}

// sum += Σ_k left[k] · right[k].
template <class T, int K>
__device__ __forceinline__ void multiply(FragmentC<T>& sum, const FragmentA<T> (&left)[K],
                                         const FragmentB<T> (&right)[K]) {
    if constexpr (is_half<T>) {  // two groups at a time; an odd one out meets zeros
#pragma unroll
        for (int k = 0; k < K; k += 2) {
            const int next = k + 1 < K ? k + 1 : k;
            const uint32_t a[4] = {left[k].row[0], left[k].row[1], left[next].row[0], left[next].row[1]};
            const uint32_t b[2] = {right[k].at, k + 1 < K ? right[next].at : 0};
            mma_16x8x16<T>(sum.at, a, b);
        }
    } else {
#pragma unroll
        for (int k = 0; k < K; ++k) multiply_group(sum, left[k], right[k]);
    }
}

// --- Sums over lanes ------------------------------------------------------------------------------------------------

// Over the four lanes that share a row; over the eight that share a column. Equal in all of them.
template <class A>
__device__ __forceinline__ A add_over_columns(A x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
template <class A>
__device__ __forceinline__ A add_over_rows(A x) {
    x += shuffle_xor(x, 4);
    x += shuffle_xor(x, 8);
    return x + shuffle_xor(x, 16);
}

}  // namespace xlayer::cuda
