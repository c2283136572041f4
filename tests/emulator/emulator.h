// A CUDA device on a CPU, for tests. Every CUDA thread is a fiber; blocks run one after another on the calling thread.
//
// The order of blocks and the order in which fibers go on after each rendezvous come from a seed, so that results which
// depend on the schedule show. A fault (a deadlock, a wrong address, whatever the checker finds) stops the launch: it
// throws std::runtime_error from the launch, and no frame of a kernel is unwound.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace xlayer::emulator {

constexpr int kLanes = 32;                         // of a warp
constexpr int kMaxThreads = 1024;                  // of a block
constexpr size_t kSharedWithoutAsking = 48 << 10;  // bytes; more after cudaFuncSetAttribute
constexpr size_t kMaxShared = 99 << 10;            // the least that a supported device offers when asked
constexpr size_t kSharedGuard = 64 << 10;          // bytes before and after shared memory that nothing else lies in

// A line of kernel source. As a default argument, Site::here() is the line of the call.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Thread {
    int index, warp, lane;    // in its block
    uint64_t block;           // in its grid
    const char* stack_begin;  // of the fiber that runs it
    const char* stack_end;
};

// The thread that kernel code is running for; null outside kernels.
const Thread* current_thread();

// Ends the launch with a message that adds kernel, block, thread and the source line of `pc` to `what`.
[[noreturn]] void fault(const std::string& what, const void* pc);

// "csrc/cuda/hdim/routing.cu:61" for a return address in kernel code. Slow: it asks addr2line.
std::string source_line(const void* pc);

// Of all launches that follow; XLAYER_EMULATOR_SEED in the environment is the first one.
void set_seed(uint64_t seed);

// How many launches there have been in this process.
uint64_t launches();

// What the launches of a kernel asked for: threads of a block, and the most dynamic shared memory with that many.
struct LaunchedBlock {
    const void* kernel;
    unsigned threads;
    size_t shared_bytes;
};
std::vector<LaunchedBlock> launched_blocks();  // since the process began, or forget_launched_blocks()
void forget_launched_blocks();

// --- For cuda_runtime.h ---------------------------------------------------------------------------------------------

struct Grid {
    unsigned blocks[3], threads[3];
    size_t shared_bytes;
};

// Runs call(closure) once for every thread. The grid keeps the limits of a device.
void run_grid(const Grid& grid, void (*call)(void*), void* closure);

// Names the launches of its scope in messages.
class KernelName {
  public:
    explicit KernelName(const char* name);
    ~KernelName();
    KernelName(const KernelName&) = delete;
    KernelName& operator=(const KernelName&) = delete;

  private:
    const char* outer_;
};

// --- For instructions.h, called by threads of kernels ---------------------------------------------------------------

enum class MatrixKind { bfloat16_16x8x16, float16_16x8x16, tf32_16x8x8, float64_8x8x4 };

void* shared_base();
void sync_block(Site site);
void sync_warp(Site site);
unsigned ballot(bool vote, Site site);
uint64_t shuffle(uint64_t value, int lane, Site site);
uint64_t shuffle_xor(uint64_t value, int mask, Site site);
void multiply_matrices(MatrixKind kind, void* d, const void* a, const void* b, Site site);

// `pc`: where the kernel called from, for messages of the checker.
void load_matrices(uint32_t* to, int count, bool transposed, const void* row, Site site, const void* pc);
void copy_async(void* shared, const void* global, Site site, const void* pc);
void commit_copies();
void wait_copies(int may_stay);

uint32_t to_tf32(float x);
float reciprocal(float x);
uint32_t pair_fma_bfloat16(uint32_t a, uint32_t b, uint32_t c);
uint32_t pair_fma_float16(uint32_t a, uint32_t b, uint32_t c);

}  // namespace xlayer::emulator
