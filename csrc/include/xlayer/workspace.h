// Sizes of workspaces and their division into arrays. Sizes are not negative and saturate: from kMaxBytes on they are
// kMaxBytes, which no caller can allocate. Forced inline, as CPU kernels must not share a function across instruction
// sets.
#pragma once

#include <cstdint>

namespace xlayer {

#define XLAYER_SIZE __attribute__((always_inline)) inline

constexpr int64_t kMaxBytes = int64_t{1} << 61;  // small enough that two of them and a rounding fit an int64
constexpr int64_t kWorkspaceAlignment = 64;      // bytes, of a workspace and of every array in it

XLAYER_SIZE int64_t sum_of_sizes(int64_t a, int64_t b) { return a > kMaxBytes - b ? kMaxBytes : a + b; }

XLAYER_SIZE int64_t product_of_sizes(int64_t a, int64_t b) { return a != 0 && b > kMaxBytes / a ? kMaxBytes : a * b; }
template <class... Sizes>
XLAYER_SIZE int64_t product_of_sizes(int64_t a, int64_t b, int64_t c, Sizes... rest) {
    return product_of_sizes(product_of_sizes(a, b), c, static_cast<int64_t>(rest)...);
}

// Divides one allocation into aligned arrays. Without memory (null) it returns null arrays and only counts the bytes,
// so that the same code computes a workspace's size and lays it out.
struct Workspace {
    char* base;
    int64_t bytes = 0;

    explicit Workspace(void* memory) : base(static_cast<char*>(memory)) {}

    // Returns an array of as many elements as the product of `sizes`.
    template <class T, class... Sizes>
    XLAYER_SIZE T* take(Sizes... sizes) {
        T* const array = base == nullptr ? nullptr : reinterpret_cast<T*>(base + bytes);
        const int64_t size = product_of_sizes(sizeof(T), static_cast<int64_t>(sizes)...);
        bytes = sum_of_sizes(bytes, (size + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment);
        return array;
    }
};

#undef XLAYER_SIZE

}  // namespace xlayer
