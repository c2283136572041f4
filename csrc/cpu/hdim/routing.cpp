// masked_mean (xlayer/routing.h) and its backward. One task is one sequence and a slice of its width (forward) or of
// its tokens (backward), so the bits do not depend on the threads.
#include "xlayer/routing.h"

#include <cstring>
#include <type_traits>

#include "cpu/common/element.h"

namespace xlayer::cpu::XLAYER_ISA::hdim {
namespace {

constexpr int64_t kColumns = 128;       // width of one task; its sums stay in L1
constexpr int64_t kLeafTokens = 16;     // tokens added one after the other
constexpr int64_t kTokensPerTask = 32;  // of the backward

template <class T>
using Accumulator = typename Accumulation<T>::Type;

bool allowed(const TokenMask& mask, int64_t b, int64_t s) {
    return mask.data == nullptr || mask.data[b * mask.batch_stride + s * mask.token_stride] != 0;
}

int64_t count_allowed(const TokenMask& mask, int64_t b, int64_t tokens) {
    if (mask.data == nullptr) return tokens;
    int64_t count = 0;
    for (int64_t s = 0; s < tokens; ++s) count += allowed(mask, b, s);
    return count;
}

// One sequence's slice: `columns` values of every token.
template <class T>
struct Slice {
    const T* x;
    int64_t token_stride, columns, b;
    TokenMask mask;
};

// sum[c] = Σ x[s, c] over the allowed s in [begin, end), by halves, so that rounding grows with log(tokens). A token
// that is not allowed is not read, so whatever it holds changes nothing.
template <class T>
void sum_tokens(const Slice<T>& slice, int64_t begin, int64_t end, Accumulator<T>* sum) {
    if (end - begin > kLeafTokens) {
        const int64_t middle = begin + (end - begin) / 2;
        Accumulator<T> right[kColumns];
        sum_tokens(slice, begin, middle, sum);
        sum_tokens(slice, middle, end, right);
        for (int64_t c = 0; c < slice.columns; ++c) sum[c] += right[c];
        return;
    }
    for (int64_t c = 0; c < slice.columns; ++c) sum[c] = 0;
    for (int64_t s = begin; s < end; ++s) {
        if (!allowed(slice.mask, slice.b, s)) continue;
        const T* row = slice.x + s * slice.token_stride;
        for (int64_t c = 0; c < slice.columns; ++c) sum[c] += widen(row[c]);
    }
}

template <class T>
void forward(const MaskedMeanForward& args) {
    const int64_t slices = ceil_div(args.width, kColumns);
    parallel_for_each(args.pool, args.batch * slices, [&](int64_t task) {
        const int64_t b = task / slices, h = task % slices * kColumns;
        const T* x = static_cast<const T*>(args.x) + b * args.x_batch_stride + h;
        T* out = static_cast<T*>(args.out) + b * args.width + h;
        const Slice<T> slice{x, args.x_token_stride, min(args.width - h, kColumns), b, args.mask};
        const int64_t count = count_allowed(args.mask, b, args.tokens);
        Accumulator<T> sum[kColumns];
        sum_tokens(slice, 0, args.tokens, sum);
        for (int64_t c = 0; c < slice.columns; ++c) {
            narrow(count ? sum[c] / static_cast<Accumulator<T>>(count) : 0, out + c);
        }
    });
}

template <class T>
void backward(const MaskedMeanBackward& args) {
    const int64_t slices = ceil_div(args.tokens, kTokensPerTask);
    parallel_for_each(args.pool, args.batch * slices, [&](int64_t task) {
        const int64_t b = task / slices, first = task % slices * kTokensPerTask;
        const int64_t last = min(first + kTokensPerTask, args.tokens);
        const T* grad = static_cast<const T*>(args.grad) + b * args.grad_batch_stride;
        const auto count = static_cast<Accumulator<T>>(count_allowed(args.mask, b, args.tokens));
        for (int64_t s = first; s < last; ++s) {
            T* row = static_cast<T*>(args.grad_x) + (b * args.tokens + s) * args.width;
            if (allowed(args.mask, b, s)) {
                for (int64_t c = 0; c < args.width; ++c) narrow(widen(grad[c]) / count, row + c);
            } else {
                std::memset(row, 0, static_cast<size_t>(args.width) * sizeof(T));
            }
        }
    });
}

}  // namespace

void masked_mean_forward(const MaskedMeanForward& args) {
    dispatch_dtype(args.dtype, [&](auto* element) { forward<std::remove_pointer_t<decltype(element)>>(args); });
}

void masked_mean_backward(const MaskedMeanBackward& args) {
    dispatch_dtype(args.dtype, [&](auto* element) { backward<std::remove_pointer_t<decltype(element)>>(args); });
}

}  // namespace xlayer::cpu::XLAYER_ISA::hdim
