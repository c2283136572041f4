#include <sys/mman.h>

#include "fault.h"

namespace xlayer::faults {
namespace {

constexpr int kSize = 98, kThreads = 128;

template <bool fixed>
__global__ void copy_one_more(InOut args) {
    const int i = threadIdx.x;
    if (fixed ? i < kSize : i <= kSize) args.out[i] = 1;  // fault: off_by_one_in_global_memory
}

template <bool fixed>
__global__ void fill_one_more(InOut) {
    const int i = threadIdx.x;
    if (fixed ? i < kSize : i <= kSize) shared_memory<float>()[i] = 1;  // fault: off_by_one_in_shared_memory
}

// kSize is no multiple of a vector's length.
template <bool fixed>
__global__ void copy_vectors(InOut args) {
    const int i = threadIdx.x * 4;
    if (fixed ? i + 4 <= kSize : i < kSize)
        store_vec(args.out + i, load_vec<4>(args.x + i));  // fault: vector_past_the_end
}

template <bool fixed>
__global__ void stage_vectors(InOut args) {
    const int i = threadIdx.x * 4;
    float* shared = shared_memory<float>();
    if (fixed ? i + 4 <= kSize : i < kSize) copy_async(shared + i, args.x + i);  // fault: copy_past_the_end
    commit_copies();
    wait_copies<0>();
}

template <bool fixed>
__global__ void write_input(InOut args) {
    const int i = threadIdx.x;
    float* x = fixed ? args.out : const_cast<float*>(args.x);
    if (i < kSize) x[i] = 1;  // fault: write_to_input
}

void run(const char* name, void (*kernel)(InOut)) {
    run_in_out(name, kernel, kSize, {1, kThreads, nullptr, kSize * sizeof(float)});
}

const Fault in_global("off_by_one_in_global_memory", [](const char* name, bool fixed) {
    run(name, fixed ? copy_one_more<true> : copy_one_more<false>);
});
const Fault in_shared("off_by_one_in_shared_memory", [](const char* name, bool fixed) {
    run(name, fixed ? fill_one_more<true> : fill_one_more<false>);
});
const Fault past_the_end("vector_past_the_end", [](const char* name, bool fixed) {
    run(name, fixed ? copy_vectors<true> : copy_vectors<false>);
});
const Fault staged("copy_past_the_end",
                   [](const char* name, bool fixed) { run(name, fixed ? stage_vectors<true> : stage_vectors<false>); });
const Fault to_input("write_to_input",
                     [](const char* name, bool fixed) { run(name, fixed ? write_input<true> : write_input<false>); });

// --- Indices beyond 2^31 ---------------------------------------------------------------------------------------------

struct Rows {
    const uint8_t* x;
    unsigned width;
    uint8_t* out;
};

template <class Index>
__global__ void first_of_each_row(Rows args) {
    const Index index = static_cast<Index>(blockIdx.x) * args.width;
    args.out[blockIdx.x] = args.x[index];  // fault: index_overflow
}

// Addresses of 4 GiB, almost none of which is ever memory.
class Sparse {
  public:
    Sparse()
        : data_(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
        if (data_ == MAP_FAILED) throw std::runtime_error("no addresses for 4 GiB");
        emulator::allow_memory(data_, kBytes, false, "x");
    }
    ~Sparse() { munmap(data_, kBytes); }
    Sparse(const Sparse&) = delete;
    Sparse& operator=(const Sparse&) = delete;
    const uint8_t* data() const { return static_cast<const uint8_t*>(data_); }

    static constexpr unsigned kRows = 4, kWidth = 1u << 30;

  private:
    static constexpr size_t kBytes = size_t{kRows} * kWidth;
    void* data_;
};

const Fault overflow("index_overflow", [](const char* name, bool fixed) {
    const Sparse x;
    auto out = output<uint8_t>("out", Sparse::kRows);
    launch(name, fixed ? first_of_each_row<int64_t> : first_of_each_row<int>, {Sparse::kRows, 1, nullptr},
           {x.data(), Sparse::kWidth, out.data()});
});

}  // namespace
}  // namespace xlayer::faults
