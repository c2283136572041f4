// Sizes of scratch memory, and its division into arrays. Sizes are not negative and saturate: from kMaxBytes on they
// are kMaxBytes, which no caller can allocate. Forced inline, as CPU kernels must not share a function across
// instruction sets.
#pragma once

#include <cstdint>

namespace xlayer {

#define XLAYER_SIZE __attribute__((always_inline)) inline

constexpr int64_t kMaxBytes = int64_t{1} << 61;  // small enough that two of them and a rounding fit an int64

XLAYER_SIZE int64_t sum_of_sizes(int64_t a, int64_t b) { return a > kMaxBytes - b ? kMaxBytes : a + b; }

XLAYER_SIZE int64_t product_of_sizes(int64_t a, int64_t b) { return a != 0 && b > kMaxBytes / a ? kMaxBytes : a * b; }
template <class... Sizes>
XLAYER_SIZE int64_t product_of_sizes(int64_t a, int64_t b, int64_t c, Sizes... rest) {
    return product_of_sizes(product_of_sizes(a, b), c, static_cast<int64_t>(rest)...);
}

// Cuts one allocation into arrays aligned to 64 bytes; with no memory behind it, only counts.
struct Arena {
    char* base;
    int64_t used = 0;

    explicit Arena(void* memory) : base(static_cast<char*>(memory)) {}

    // An array of as many elements as the product of `sizes`.
    template <class T, class... Sizes>
    XLAYER_SIZE T* take(Sizes... sizes) {
        T* const array = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
        const int64_t bytes = product_of_sizes(sizeof(T), static_cast<int64_t>(sizes)...);
        used = sum_of_sizes(used, (bytes + 63) / 64 * 64);
        return array;
    }
};

#undef XLAYER_SIZE

}  // namespace xlayer
