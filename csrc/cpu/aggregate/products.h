// Shared parts of the recurrent aggregators: tiles of tokens, weights packed once per call for products with rows of
// tokens, and weight gradients, which are sums over tokens of outer products of two rows.
#pragma once

#include "cpu/common/gemm.h"
#include "cpu/common/rows.h"
#include "xlayer/aggregate.h"
#include "xlayer/workspace.h"

namespace xlayer::cpu::XLAYER_ISA::aggregate {

// Terms summed in one chain: a sum of short sums rounds less than one long sum. Fewer where products are rounded too.
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
constexpr int64_t kProductSlice = 256;
#else
constexpr int64_t kProductSlice = 16;
#endif

// Tokens cut into tiles of nearly equal size, a multiple of kUnit but for the last, as many as suit the threads. No
// token's result depends on the cut: every tile of registers begins at a multiple of its rows.
struct TokenTiles {
    static constexpr int64_t kUnit = 24;  // rows of every tile of registers divide it
    int64_t tokens, units, count;

    TokenTiles(int64_t tokens_, int64_t max_tile, int64_t threads) : tokens(tokens_), units(ceil_div(tokens_, kUnit)) {
        count = min(units, round_up(ceil_div(units, max<int64_t>(1, max_tile / kUnit)), threads));
    }
    int64_t begin(int64_t tile) const { return min(tokens, tile * units / count * kUnit); }
    int64_t size(int64_t tile) const { return begin(tile + 1) - begin(tile); }
    int64_t max_tile() const { return count == 0 ? 0 : ceil_div(units, count) * kUnit; }
};

// to[k·stride] = from[offset + k], widened, for k in [0, count).
template <class T>
inline void spread_row(DType dtype, const void* from, int64_t offset, int64_t count, T* to, int64_t stride) {
    constexpr int64_t kChunk = 64;
    T chunk[kChunk];
    for (int64_t first = 0; first < count; first += kChunk) {
        const int64_t length = min(kChunk, count - first);
        const T* row = read_elements(dtype, from, offset + first, length, chunk);
        for (int64_t k = 0; k < length; ++k) to[(first + k) * stride] = row[k];
    }
}

// `count` elements at `offset` from from[k·stride], narrowed.
template <class T>
inline void gather_row(DType dtype, const T* from, int64_t stride, int64_t count, void* to, int64_t offset) {
    constexpr int64_t kChunk = 64;
    T chunk[kChunk];
    for (int64_t first = 0; first < count; first += kChunk) {
        const int64_t length = min(kChunk, count - first);
        T* row = write_target(dtype, to, offset + first, chunk);
        for (int64_t k = 0; k < length; ++k) row[k] = from[(first + k) * stride];
        narrow_elements(dtype, row, to, offset + first, length);
    }
}

// `count` elements at `offset` from a row of T, narrowed.
template <class T>
inline void put_row(DType dtype, const T* from, int64_t count, void* to, int64_t offset) {
    if (dtype == dtype_of<T>) {
        if (count > 0) std::memcpy(static_cast<T*>(to) + offset, from, count * sizeof(T));  // `to` of nothing is null
    } else {
        narrow_elements(dtype, from, to, offset, count);
    }
}

// The first `count` lanes of a vector, narrowed, to the elements at `offset`.
template <class T>
XLAYER_INLINE void write_vector(DType dtype, Vec<T> value, void* data, int64_t offset, int64_t count) {
    if (dtype == dtype_of<T> && count == lanes<T>) return store(static_cast<T*>(data) + offset, value);
    T lane[lanes<T>];
    store(lane, value);
    put_row(dtype, lane, count, data, offset);
}

// B of products C[rows × columns] (+)= A[rows × depth]·B, cut into panels of columns that lie one after another.
template <class T>
class PackedWeight {
  public:
    PackedWeight(int64_t depth, int64_t columns, Workspace& space)
        : depth_(depth),
          columns_(columns),
          panels_(ceil_div(columns, lanes<T>)),
          data_(space.take<T>(depth, padded())) {}

    int64_t padded() const { return panels_.vectors * lanes<T>; }  // columns of C

    // B(k, c) = from[k·depth_stride + c·column_stride], one of them 1.
    void pack(const ThreadPool& pool, DType dtype, const void* from, int64_t depth_stride,
              int64_t column_stride) const {
        parallel_for_each(pool, panels_.count, [&](int64_t panel) {
            const int64_t begin = panels_.begin(panel) * lanes<T>, width = panels_.width(panel) * lanes<T>;
            const int64_t count = min(width, columns_ - begin);
            T* to = data_ + begin * depth_;
            std::memset(to, 0, depth_ * width * sizeof(T));
            if (column_stride == 1) {
                for (int64_t k = 0; k < depth_; ++k)
                    spread_row(dtype, from, k * depth_stride + begin, count, to + k * width, 1);
            } else {
                for (int64_t c = 0; c < count; ++c)
                    spread_row(dtype, from, (begin + c) * column_stride, depth_, to + c, width);
            }
        });
    }

    // With rows [first, first + depth) of B.
    __attribute__((noinline)) void multiply(int64_t rows, int64_t first, int64_t depth, const T* a, int64_t a_row, T* c,
                                            int64_t c_row, bool accumulate) const {
        for (int64_t panel = 0; panel < panels_.count; ++panel) {
            const int64_t begin = panels_.begin(panel) * lanes<T>, width = panels_.width(panel) * lanes<T>;
            const T* b = data_ + begin * depth_ + first * width;
            for (int64_t k = 0; k < max<int64_t>(1, depth); k += kProductSlice) {
                gemm(rows, width, min(kProductSlice, depth - k), a + k, a_row, 1, b + k * width, width, c + begin,
                     c_row, accumulate || k > 0);
            }
        }
    }

  private:
    int64_t depth_, columns_;
    Panels panels_;
    T* data_;
};

// The gradient of weights [columns, depth] of y = x·Wᵀ: Σ over layers and tokens of ∂L/∂y_c · x_k. Tokens are summed in
// slices, a layer's slices in order, the layers in order. Tasks are cut by columns, so each sum is made by one thread.
template <class T>
class WeightGradient {
  public:
    static constexpr int64_t kTokens = 128;  // of a slice
    static constexpr int64_t kGroup = 3;     // panels of a task, which meet a slice of x together

    WeightGradient(DType dtype, int64_t tokens, int64_t depth, int64_t columns, Workspace& space)
        : dtype_(dtype),
          tokens_(tokens),
          depth_(depth),
          columns_(columns),
          panels_(ceil_div(columns, lanes<T>)),
          total_(space.take<T>(depth, padded())),
          bias_(space.take<double>(padded())) {}

    int64_t tasks() const { return ceil_div(panels_.count, kGroup); }
    // Elements of a worker's buffers: sums, slices of ∂L/∂y and, for dtypes other than T, of x.
    static int64_t scratch_size(DType dtype, int64_t depth) {
        const int64_t columns = kGroup * kPanelColumns<T>, x = dtype == dtype_of<T> ? 0 : kTokens * depth;
        return round_up(columns * (depth + kTokens) + x, lanes<T>);
    }
    void clear() const {
        std::memset(total_, 0, depth_ * padded() * sizeof(T));
        std::memset(bias_, 0, padded() * sizeof(double));
    }

    // Adds one layer. grad: ∂L/∂y, rows of whole vectors; x at `offset` of `data`.
    void add(int64_t task, const T* grad, int64_t grad_row, const void* data, int64_t offset, int64_t x_row,
             T* scratch) const {
        const int64_t first = task * kGroup, last = min(first + kGroup, panels_.count);
        const int64_t begin = panels_.begin(first) * lanes<T>;
        T *sums = scratch, *packed = sums + kGroup * kPanelColumns<T> * depth_;
        T* wide = packed + kGroup * kPanelColumns<T> * kTokens;
        for (int64_t token = 0; token < tokens_; token += kTokens) {
            const int64_t count = min(kTokens, tokens_ - token);
            const T* x = nullptr;
            int64_t stride = x_row;
            if (dtype_ == dtype_of<T>) {
                x = static_cast<const T*>(data) + offset + token * x_row;
            } else {
                x = wide, stride = depth_;
                for (int64_t t = 0; t < count; ++t)
                    read_elements(dtype_, data, offset + (token + t) * x_row, depth_, wide + t * depth_);
            }
            for (int64_t panel = first; panel < last; ++panel) {
                const int64_t at = panels_.begin(panel) * lanes<T>, width = panels_.width(panel) * lanes<T>;
                pack(grad + token * grad_row + at, grad_row, count, width, packed, bias_ + at);
                T* to = sums + (at - begin) * depth_;
                gemm(depth_, width, count, x, 1, stride, packed, width, to, width, token > 0);
            }
        }
        for (int64_t panel = first; tokens_ > 0 && panel < last; ++panel) {
            const int64_t at = panels_.begin(panel) * lanes<T>, width = panels_.width(panel) * lanes<T>;
            const T* from = sums + (at - begin) * depth_;
            for (int64_t k = 0; k < depth_; ++k)
                for (int64_t c = 0; c < width; ++c) total_[k * padded() + at + c] += from[k * width + c];
        }
    }

    // Row c of the gradient, and element c of the bias's.
    void write_row(int64_t c, void* to, int64_t offset) const {
        gather_row(dtype_, total_ + c, padded(), depth_, to, offset);
    }
    void write_bias(void* to, int64_t offset) const {
        for (int64_t c = 0; c < columns_; ++c) {
            const T value = static_cast<T>(bias_[c]);
            gather_row(dtype_, &value, 1, 1, to, offset + c);
        }
    }

  private:
    int64_t padded() const { return panels_.vectors * lanes<T>; }

    // A slice of a panel's columns, row after row, whose sums go to the bias.
    static void pack(const T* from, int64_t row, int64_t count, int64_t width, T* to, double* bias) {
        for (int64_t c = 0; c < width; c += lanes<T>) {
            Vec<T> sum = {};
            for (int64_t t = 0; t < count; ++t) {
                const Vec<T> value = load(from + t * row + c);
                store(to + t * width + c, value);
                sum += value;
            }
            for (int64_t l = 0; l < lanes<T>; ++l) bias[c + l] += sum[l];
        }
    }

    DType dtype_;
    int64_t tokens_, depth_, columns_;
    Panels panels_;
    T* total_;
    double* bias_;
};

}  // namespace xlayer::cpu::XLAYER_ISA::aggregate
