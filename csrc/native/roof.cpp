#include "roof.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>

namespace xlayer::roof {

namespace {

constexpr int64_t kPage = 4096;
constexpr double kMaxSeconds = 0.03;      // of one call: on a busy machine threads wait long for one another
constexpr int64_t kTimedBytes = 4 << 20;  // a block moves at least so much, or the clock's own cost would count

const Kernels* kernels_of(const std::string& isa) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == "avx2" && avx2) return &avx2::kKernels;
    if (isa == "avx512" && avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return &avx512::kKernels;
    }
#endif
    return isa == "baseline" ? &baseline::kKernels : nullptr;
}

const Kernels& kernels_or_throw(const std::string& isa) {
    const Kernels* found = kernels_of(isa);
    if (found == nullptr) throw std::invalid_argument("isa: this processor cannot run " + isa);
    return *found;
}

bool is_double(const std::string& dtype) {
    if (dtype != "float32" && dtype != "float64") {
        throw std::invalid_argument("dtype: expected float32 or float64, got " + dtype);
    }
    return dtype == "float64";
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Register to register: some processors add a small constant while they rename registers, in no time.
void add_dependent(int64_t additions) {
    constexpr int kUnroll = 64;
    uint64_t sum = 0, term = 3;
    for (int64_t done = 0; done < additions; done += kUnroll) {
#pragma GCC unroll 64
        for (int i = 0; i < kUnroll; ++i) {
            sum += term;
            asm volatile("" : "+r"(sum), "+r"(term));
        }
    }
}

struct Span {
    double start, end;
};
struct Block {
    double together, shortest;  // seconds from the first start to the last end, and of the thread that took least
};

// Runs work(thread, block) on every thread, all of them starting a block at the same time, for as many blocks as are
// asked for or go into kMaxSeconds, in pairs. Threads are not tied to processors, as those of the kernels are not: on
// a busy machine they could not step aside.
template <class Work>
std::vector<Block> timed(int threads, int blocks, Work work) {
    std::vector<Span> spans(static_cast<size_t>(threads) * blocks);
    std::atomic<int64_t> arrived{0};
    std::atomic<int> done{blocks};
    const double begin = now();
    const auto run = [&](int thread) {
        for (int block = 0; block < blocks; ++block) {
            if (thread == 0 && block >= 2 && block % 2 == 0 && now() - begin > kMaxSeconds) done.store(block);
            arrived.fetch_add(1);
            const int64_t all = static_cast<int64_t>(threads) * (block + 1);
            for (int64_t spins = 0; arrived.load(std::memory_order_acquire) < all; ++spins) {
                if (spins > 2000) std::this_thread::yield();
            }
            if (block >= done.load(std::memory_order_acquire)) break;
            Span& span = spans[static_cast<size_t>(block) * threads + thread];
            span.start = now();
            work(thread, block);
            span.end = now();
        }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
    run(0);
    for (std::thread& other : others) other.join();
    std::vector<Block> found(done.load());
    for (int block = 0; block < done.load(); ++block) {
        const Span* first = &spans[static_cast<size_t>(block) * threads];
        double start = first->start, end = first->end, shortest = first->end - first->start;
        for (int thread = 1; thread < threads; ++thread) {
            start = std::min(start, first[thread].start);
            end = std::max(end, first[thread].end);
            shortest = std::min(shortest, first[thread].end - first[thread].start);
        }
        found[block] = {end - start, shortest};
    }
    return found;
}

}  // namespace

std::vector<std::string> supported_isas() {
    std::vector<std::string> found;
    for (const char* isa : {"avx512", "avx2", "baseline"}) {
        if (kernels_of(isa) != nullptr) found.emplace_back(isa);
    }
    return found;
}

Roof::Roof(const std::string& isa, int threads) : isa_(isa), kernels_(kernels_or_throw(isa)), threads_(threads) {
    if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
}

Roof::~Roof() {
    if (buffer_ != nullptr) munmap(buffer_, buffer_bytes_);
}

int Roof::lanes(const std::string& dtype) const {
    return kernels_.vector_bytes / static_cast<int>(is_double(dtype) ? sizeof(double) : sizeof(float));
}

int64_t Roof::flops_per_step(const std::string& dtype) const {
    return int64_t{2} * lanes(dtype) * kernels_.chains * threads_;
}

std::vector<std::pair<double, double>> Roof::multiply_adds(const std::string& dtype, int64_t steps, int64_t additions,
                                                           int blocks) {
    const auto kernel = is_double(dtype) ? kernels_.multiply_adds_double : kernels_.multiply_adds_float;
    if (steps < 1 || additions < 1 || blocks < 1) {
        throw std::invalid_argument("steps, additions and blocks: expected at least 1 of each");
    }
    // In turns within a millisecond: the clock that wide vectors slow down stays slow for as long.
    const std::vector<Block> taken = timed(threads_, 2 * blocks, [&](int, int block) {
        if (block % 2 == 0) {
            kernel(steps);
        } else {
            add_dependent(additions);
        }
    });
    std::vector<std::pair<double, double>> found(taken.size() / 2);
    for (size_t block = 0; block < found.size(); ++block) {
        found[block] = {taken[2 * block].together, taken[2 * block + 1].shortest};
    }
    return found;
}

std::pair<int64_t, std::vector<double>> Roof::move(const std::string& kind, int64_t footprint, int blocks) {
    const bool copies =
        kind == "copy" || kind == "streaming copy" || kind == "copy in streams" || kind == "library copy";
    const bool reads = kind == "read" || kind == "read in streams";
    if (!copies && !reads && kind != "write" && kind != "streaming write")
        throw std::invalid_argument("kind: got unknown " + kind);
    if (footprint < 1 || footprint > (int64_t{1} << 46) || blocks < 1) {
        throw std::invalid_argument("footprint and blocks: expected at least 1 of each, and at most 2^46 bytes");
    }
    // One slice per thread of the source, and for copies one of the target as well.
    const int64_t slices = threads_ * (copies ? 2 : 1);
    const int64_t slice = std::max(footprint / slices / kPage, int64_t{1}) * kPage;
    const int64_t repeats = std::max(kTimedBytes / (slice * slices), int64_t{1});
    char* buffer = reserve(slice * slices);
    const std::vector<Block> taken = timed(threads_, blocks, [&](int thread, int) {
        char* from = buffer + thread * slice;
        char* to = from + threads_ * slice;
        for (int64_t repeat = 0; repeat < repeats; ++repeat) {
            if (kind == "copy") {
                kernels_.copy(to, from, slice);
            } else if (kind == "streaming copy") {
                kernels_.copy_past_caches(to, from, slice);
            } else if (kind == "copy in streams") {
                kernels_.copy_streams(to, from, slice);
            } else if (kind == "library copy") {
                std::memcpy(to, from, slice);
            } else if (kind == "read") {
                kernels_.read(from, slice);
            } else if (kind == "read in streams") {
                kernels_.read_streams(from, slice);
            } else if (kind == "write") {
                kernels_.write(from, slice);
            } else {
                kernels_.write_past_caches(from, slice);
            }
        }
    });
    std::vector<double> seconds;
    for (const Block& block : taken) seconds.push_back(block.together);
    return {slice * slices * repeats, seconds};
}

// Grows the buffer; its pages are touched here, and never while the clock runs.
char* Roof::reserve(int64_t bytes) {
    if (bytes <= buffer_bytes_) return buffer_;
    if (buffer_ != nullptr) munmap(buffer_, buffer_bytes_);
    buffer_ = nullptr;
    buffer_bytes_ = 0;
    void* made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(made, bytes, MADV_HUGEPAGE);  // looking pages up is no part of the limit
#endif
    std::memset(made, 1, bytes);
    buffer_ = static_cast<char*>(made);
    buffer_bytes_ = bytes;
    return buffer_;
}

}  // namespace xlayer::roof
