// Matrix product of the CPU kernels: C[rows × columns] (+)= A[rows × depth] · B[depth × columns]. A is read element by
// element with any strides; B in whole vectors, so its rows and C's are padded to them. A register tile of C
// accumulates over the whole depth in order, so the bits of an element of C depend on no other dimension.
#pragma once

#include <type_traits>

#include "cpu/common/simd.h"

namespace xlayer::cpu::XLAYER_ISA {

// Tile shapes that fill the register file: 32 registers with AVX-512, 16 before.
constexpr int kMaxPanelVectors = kVectorBytes == 64 ? 4 : 2;
template <int Vectors>
constexpr int kTileRows = kVectorBytes == 64 ? (Vectors == 4   ? 6
                                                : Vectors == 3 ? 8
                                                               : 12)
                                             : (Vectors == 2 ? 6 : 12);

// Split of `vectors` vectors of columns into panels of equal width, give or take one.
struct Panels {
    int64_t vectors, count;

    XLAYER_INLINE explicit Panels(int64_t vectors_) : vectors(vectors_), count(ceil_div(vectors_, kMaxPanelVectors)) {}
    XLAYER_INLINE int64_t begin(int64_t panel) const { return panel * vectors / count; }
    XLAYER_INLINE int64_t width(int64_t panel) const { return begin(panel + 1) - begin(panel); }
};

// Calls f(std::integral_constant<int, vectors>{}).
template <class F>
XLAYER_INLINE void dispatch_panel_width(int64_t vectors, F f) {
    if constexpr (kMaxPanelVectors == 4) {
        if (vectors == 4) return f(std::integral_constant<int, 4>{});
        if (vectors == 3) return f(std::integral_constant<int, 3>{});
    }
    if (vectors == 2) return f(std::integral_constant<int, 2>{});
    return f(std::integral_constant<int, 1>{});
}

// One panel of Vectors vectors, in tiles of rows. done(row, acc) gets each tile's sums, still in registers, as
// acc[Rows][Vectors] from `row` on.
template <class T, int Vectors, class Done>
XLAYER_INLINE void gemm_panel(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b,
                              int64_t b_row, Done done) {
    int64_t row = 0;
    auto tiles = [&](auto count) XLAYER_FLATTEN {
        constexpr int kRows = decltype(count)::value;
        for (; row + kRows <= rows; row += kRows) {
            const T* tile_a = a + row * a_row;
            Vec<T> acc[kRows][Vectors] = {};
            for (int64_t k = 0; k < depth; ++k) {
                Vec<T> vector[Vectors];
                XLAYER_UNROLL for (int v = 0; v < Vectors; ++v) vector[v] = load(b + k * b_row + v * lanes<T>);
                XLAYER_UNROLL for (int r = 0; r < kRows; ++r) {
                    const T scale = tile_a[r * a_row + k * a_depth];
                    XLAYER_UNROLL for (int v = 0; v < Vectors; ++v) acc[r][v] += scale * vector[v];
                }
            }
            done(row, acc);
        }
    };
    tiles(std::integral_constant<int, kTileRows<Vectors>>{});
    tiles(std::integral_constant<int, kTileRows<Vectors> / 2>{});
    tiles(std::integral_constant<int, 1>{});
}

// Writes or adds a tile to C; `c` is the panel's first column in the tile's first row.
template <class T, int Rows, int Vectors>
XLAYER_INLINE void store_tile(const Vec<T> (&acc)[Rows][Vectors], T* c, int64_t c_row, bool accumulate) {
    XLAYER_UNROLL for (int r = 0; r < Rows; ++r) {
        XLAYER_UNROLL for (int v = 0; v < Vectors; ++v) {
            T* to = c + r * c_row + v * lanes<T>;
            store<T>(to, accumulate ? load(to) + acc[r][v] : acc[r][v]);
        }
    }
}

// A product whose B fits the cache. Writes round_up(columns, lanes) columns of C. Not inlined: a dozen tile shapes.
template <class T>
__attribute__((noinline)) void gemm(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row,
                                    int64_t a_depth, const T* b, int64_t b_row, T* c, int64_t c_row, bool accumulate) {
    const Panels panels(ceil_div(columns, lanes<T>));
    for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t begin = panels.begin(p) * lanes<T>;
        dispatch_panel_width(panels.width(p), [&](auto width) XLAYER_FLATTEN {
            gemm_panel<T, decltype(width)::value>(rows, depth, a, a_row, a_depth, b + begin, b_row,
                                                  [&](int64_t row, auto& acc) XLAYER_FLATTEN {
                                                      store_tile(acc, c + row * c_row + begin, c_row, accumulate);
                                                  });
        });
    }
}

// A product whose B is large or not in memory as T: pack(k, column, count, to) writes columns [column, column + count)
// of its row k, slice by slice, to `packed` (packed_size<T> elements).
constexpr int64_t kDepthSlice = 32;  // short: a sum of short sums rounds less than one long sum
template <class T>
constexpr int64_t kPanelColumns = int64_t{kMaxPanelVectors} * lanes<T>;
template <class T>
constexpr int64_t packed_size = kDepthSlice * kPanelColumns<T>;

// One column panel of it, begin = its first column, into C whose first column is the panel's.
template <class T, class Pack>
inline void gemm_packed_panel(int64_t rows, int64_t begin, int64_t columns, int64_t depth, const T* a, int64_t a_row,
                              int64_t a_depth, T* packed, Pack pack, T* c, int64_t c_row) {
    const int64_t width = round_up(columns, lanes<T>);
    if (depth == 0)
        for (int64_t r = 0; r < rows; ++r) std::memset(c + r * c_row, 0, width * sizeof(T));
    for (int64_t first = 0; first < depth; first += kDepthSlice) {
        const int64_t slice = min(kDepthSlice, depth - first);
        for (int64_t k = 0; k < slice; ++k) {
            pack(first + k, begin, columns, packed + k * width);
            for (int64_t column = columns; column < width; ++column) packed[k * width + column] = 0;
        }
        gemm(rows, width, slice, a + first * a_depth, a_row, a_depth, packed, width, c, c_row, first > 0);
    }
}

// All panels in turn through one buffer of rows × kPanelColumns: emit(column, count, c, c_row) takes each when done.
template <class T, class Pack, class Emit>
inline void gemm_streamed(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_depth,
                          T* packed, T* buffer, Pack pack, Emit emit) {
    const Panels panels(ceil_div(columns, lanes<T>));
    for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t begin = panels.begin(p) * lanes<T>;
        const int64_t count = min(panels.width(p) * lanes<T>, columns - begin);
        gemm_packed_panel(rows, begin, count, depth, a, a_row, a_depth, packed, pack, buffer, kPanelColumns<T>);
        emit(begin, count, buffer, kPanelColumns<T>);
    }
}

}  // namespace xlayer::cpu::XLAYER_ISA
