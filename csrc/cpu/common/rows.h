// Rows of elements of any dtype in the accumulation type, and loops over them in whole vectors.
#pragma once

#include "cpu/common/element.h"

namespace xlayer::cpu::XLAYER_ISA {

template <class T>
constexpr DType dtype_of = sizeof(T) == 8 ? DType::float64 : DType::float32;

// The row at `offset`: where it lies if its dtype is T's own, else widened into `scratch`.
template <class T>
inline const T* read_elements(DType dtype, const void* data, int64_t offset, int64_t count, T* scratch) {
    if (dtype == dtype_of<T>) return static_cast<const T*>(data) + offset;
    if (dtype == DType::bfloat16) {
        read_row(static_cast<const BFloat16*>(data) + offset, 1, count, scratch);
    } else {
        read_row(static_cast<const Float16*>(data) + offset, 1, count, scratch);
    }
    return scratch;
}

// Destination of the row at `offset`: in place or, for another dtype, `scratch`, which narrow_elements
// finishes.
template <class T>
inline T* write_target(DType dtype, void* data, int64_t offset, T* scratch) {
    return dtype == dtype_of<T> ? static_cast<T*>(data) + offset : scratch;
}
template <class T>
inline void narrow_elements(DType dtype, const T* from, void* data, int64_t offset, int64_t count) {
    if (dtype == DType::bfloat16) write_row(from, count, static_cast<BFloat16*>(data) + offset);
    if (dtype == DType::float16) write_row(from, count, static_cast<Float16*>(data) + offset);
}

template <class T>
XLAYER_INLINE void prefetch(const T* row) {
    __builtin_prefetch(row, 0, 2);
}
// Into L1 at once, for what is needed after a few thousand elements.
template <class T>
XLAYER_INLINE void prefetch_near(const T* row) {
    __builtin_prefetch(row, 0, 3);
}
template <class T>
XLAYER_INLINE void prefetch_to_write(const T* row) {
    __builtin_prefetch(row, 1, 2);
}

// --- Loops over a row ------------------------------------------------------------------------------------------------

// Loads and stores of a loop's body: whole vectors, or the tail of a row as if zeros followed.
template <class T>
struct FullVector {
    XLAYER_INLINE Vec<T> load(const T* from) const { return cpu::XLAYER_ISA::load(from); }
    XLAYER_INLINE void store(T* to, Vec<T> value) const { cpu::XLAYER_ISA::store(to, value); }
    XLAYER_INLINE void store_streaming(T* to, Vec<T> value) const { cpu::XLAYER_ISA::store_streaming(to, value); }
    XLAYER_INLINE Vec<T> zero_tail(Vec<T> value) const { return value; }
};
template <class T>
struct TailVector {
    int64_t count;
    XLAYER_INLINE Vec<T> load(const T* from) const {
        T lane[lanes<T>] = {};
        for (int64_t l = 0; l < count; ++l) lane[l] = from[l];
        return cpu::XLAYER_ISA::load(lane);
    }
    XLAYER_INLINE void store(T* to, Vec<T> value) const {
        T lane[lanes<T>];
        cpu::XLAYER_ISA::store(lane, value);
        for (int64_t l = 0; l < count; ++l) to[l] = lane[l];
    }
    XLAYER_INLINE void store_streaming(T* to, Vec<T> value) const { store(to, value); }
    // Zero beyond the row's end.
    XLAYER_INLINE Vec<T> zero_tail(Vec<T> value) const {
        for (int64_t l = count; l < lanes<T>; ++l) value[l] = 0;
        return value;
    }
};

template <class T, class Body>
XLAYER_INLINE void for_vectors(int64_t begin, int64_t end, const Body& body) {
    int64_t e = begin;
    for (; e + lanes<T> <= end; e += lanes<T>) body(e, FullVector<T>{});
    if (e < end) body(e, TailVector<T>{end - e});
}

}  // namespace xlayer::cpu::XLAYER_ISA
