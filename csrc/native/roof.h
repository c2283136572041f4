// The roof of a processor: how fast threads multiply and add, and move bytes, when nothing else holds them up.
// The kernels are compiled once per instruction set (roof_kernels.cpp); Roof runs and times them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace xlayer::roof {

struct Kernels {
    int vector_bytes;
    int chains;  // multiply-adds of one step, none of which needs another of the same step
    void (*multiply_adds_float)(int64_t steps);
    void (*multiply_adds_double)(int64_t steps);
    // Sizes are multiples of 1024 bytes, addresses of 64. `streams`: of four places at once.
    void (*copy)(char* to, const char* from, int64_t bytes);
    void (*copy_past_caches)(char* to, const char* from, int64_t bytes);
    void (*copy_streams)(char* to, const char* from, int64_t bytes);
    void (*read)(const char* from, int64_t bytes);
    void (*read_streams)(const char* from, int64_t bytes);
    void (*write)(char* to, int64_t bytes);
    void (*write_past_caches)(char* to, int64_t bytes);
};

namespace baseline {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

// Instruction sets that this processor has kernels for, the widest first.
std::vector<std::string> supported_isas();

class Roof {
  public:
    // Throws std::invalid_argument where the processor lacks `isa`, or for less than one thread.
    Roof(const std::string& isa, int threads);
    ~Roof();
    Roof(const Roof&) = delete;
    Roof& operator=(const Roof&) = delete;

    const std::string& isa() const { return isa_; }
    int threads() const { return threads_; }
    int lanes(const std::string& dtype) const;
    // Operations of all threads in one step of `multiply_adds`: two for each multiply-add.
    int64_t flops_per_step(const std::string& dtype) const;

    // Seconds of `steps` of multiply-adds, all threads together, and of `additions` that need one another, of the
    // thread that was disturbed least, block after block. The additions tell the clock at which the multiply-adds
    // beside them ran: one takes one cycle.
    std::vector<std::pair<double, double>> multiply_adds(const std::string& dtype, int64_t steps, int64_t additions,
                                                         int blocks);

    // (bytes read and written by all threads in one block, seconds of each block). `kind` is "copy", "streaming copy",
    // "copy in streams", "library copy", "read", "read in streams", "write" or "streaming write"; the bytes touched are
    // about `footprint`, copies included.
    std::pair<int64_t, std::vector<double>> move(const std::string& kind, int64_t footprint, int blocks);

  private:
    char* reserve(int64_t bytes);

    std::string isa_;
    const Kernels& kernels_;
    int threads_;
    char* buffer_ = nullptr;
    int64_t buffer_bytes_ = 0;
};

}  // namespace xlayer::roof
