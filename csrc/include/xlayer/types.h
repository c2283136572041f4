// Types of every kernel contract: element types and the thread pool.
// Nothing here, and nothing below csrc/cpu and csrc/cuda, knows torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xlayer {

enum class DType { float64, float32, bfloat16, float16 };

inline size_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// The caller's thread pool. `run` splits [begin, end) into ranges of at least `grain` and calls body(b, e, context)
// on each, returning when all are done. A kernel must give the same bits however the ranges fall.
struct ThreadPool {
    using Body = void (*)(int64_t begin, int64_t end, void* context);
    void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
    int64_t threads;  // how many may run at once, at least 1
};

// Runs f(index) for every index in [0, count) on the pool.
template <class F>
inline void parallel_for_each(const ThreadPool& pool, int64_t count, const F& f) {
    if (count <= 0) return;
    pool.run(
        0, count, 1,
        [](int64_t begin, int64_t end, void* context) {
            for (int64_t index = begin; index < end; ++index) (*static_cast<const F*>(context))(index);
        },
        const_cast<F*>(&f));
}

// Runs f(worker, task) for every task in [0, count), workers taking tasks as they become free; worker is below
// pool.threads and no two calls with the same worker overlap, so that each may own scratch memory.
template <class F>
inline void parallel_tasks(const ThreadPool& pool, int64_t count, const F& f) {
    int64_t next = 0;
    parallel_for_each(pool, pool.threads < count ? pool.threads : count, [&](int64_t worker) {
        for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) f(worker, task);
    });
}

}  // namespace xlayer
