// What the recurrent aggregators share: their scratch, tiles of tokens, weights packed once per call for products with
// rows of tokens, and sums over tokens of products of two rows, which are the weights' gradients.
#pragma once

#include "gemm.h"
#include "rows.h"
#include "xlayer/aggregate.h"

namespace xlayer::cpu::XLAYER_ISA {

constexpr int64_t kProductSlice = 256;  // terms summed in one chain: a sum of short sums rounds less than one long sum

// Cuts the caller's scratch memory into aligned pieces; from null it tells their size.
class Scratch {
  public:
    explicit Scratch(void* memory) : begin_(static_cast<char*>(memory)), next_(begin_) {}
    template <class T>
    T* take(int64_t count) {
        char* piece = next_;
        next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return reinterpret_cast<T*>(piece);
    }
    int64_t bytes() const { return next_ - begin_; }

  private:
    char *begin_, *next_;
};

// Tokens cut into tiles of nearly equal size, a multiple of kUnit but for the last, as many as suit the threads. No
// token's result depends on the cut: every tile of registers begins at a multiple of its rows.
struct TokenTiles {
    static constexpr int64_t kUnit = 24;  // rows of every tile of registers divide it
    int64_t tokens, units, count;

    TokenTiles(int64_t tokens_, int64_t most, int64_t threads) : tokens(tokens_), units(ceil_div(tokens_, kUnit)) {
        count = lesser(units, round_up(ceil_div(units, greater<int64_t>(1, most / kUnit)), threads));
    }
    int64_t begin(int64_t tile) const { return lesser(tokens, tile * units / count * kUnit); }
    int64_t size(int64_t tile) const { return begin(tile + 1) - begin(tile); }
    int64_t most() const { return count == 0 ? 0 : ceil_div(units, count) * kUnit; }
};

// to[k·stride] = from[offset + k], widened, for k in [0, count).
template <class T>
inline void spread_row(DType dtype, const void* from, int64_t offset, int64_t count, T* to, int64_t stride) {
    constexpr int64_t kChunk = 64;
    T chunk[kChunk];
    for (int64_t first = 0; first < count; first += kChunk) {
        const int64_t length = lesser(kChunk, count - first);
        const T* row = read_elements(dtype, from, offset + first, length, chunk);
        for (int64_t k = 0; k < length; ++k) to[(first + k) * stride] = row[k];
    }
}

// The first `count` lanes of a vector, narrowed, to the elements at `offset`.
template <class T>
XLAYER_INLINE void write_vector(DType dtype, Vec<T> value, void* data, int64_t offset, int64_t count) {
    if (dtype == own_dtype<T> && count == lanes<T>) return store(static_cast<T*>(data) + offset, value);
    T lane[lanes<T>];
    store(lane, value);
    if (dtype == own_dtype<T>) {
        Part<T>{count}.store(static_cast<T*>(data) + offset, value);
    } else {
        narrow_elements(dtype, lane, data, offset, count);
    }
}

}  // namespace xlayer::cpu::XLAYER_ISA
