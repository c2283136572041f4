// A kernel that does what it is told, so that a test can tell it anything.
#include "fault.h"

namespace xlayer::faults {
namespace {

constexpr int kThreads = 2 * kWarpSize, kBytes = 16;

enum class Do : int32_t { read, write, sync_warp, sync_block };

struct Step {
    int32_t who;  // a thread; of sync_warp a warp
    Do what;
    int32_t at, bytes;  // `at` a multiple of `bytes`
};

struct Program {
    const Step* steps;
    int count;
    uint32_t* out;
};

template <class T>
__device__ uint32_t access(unsigned char* at, bool write) {
    T& value = *reinterpret_cast<T*>(at);
    if (write) value = 1;
    return write ? 0 : value;
}

__global__ void run(Program program) {
    auto* shared = shared_memory<unsigned char>();
    const int self = threadIdx.x;
    if (self < kBytes) shared[self] = 0;
    sync_block();
    uint32_t sum = 0;
    for (int i = 0; i < program.count; ++i) {
        const Step step = program.steps[i];
        if (step.what == Do::sync_block) {
            sync_block();
        } else if (step.what == Do::sync_warp) {
            if (step.who == self / kWarpSize) sync_warp();
        } else if (step.who == self) {
            unsigned char* at = shared + step.at;
            const bool write = step.what == Do::write;
            sum += step.bytes == 1   ? access<uint8_t>(at, write)
                   : step.bytes == 2 ? access<uint16_t>(at, write)
                                     : access<uint32_t>(at, write);
        }
    }
    program.out[self] = sum;
}

}  // namespace
}  // namespace xlayer::faults

// As run_fault.
XLAYER_EXPORT int run_program(const void* steps, int count, char* message, size_t size) {
    using namespace xlayer::faults;
    const auto launch_it = [=] {
        auto out = output<uint32_t>("out", kThreads);
        xlayer::emulator::allow_memory(steps, count * sizeof(Step), false, "steps");
        launch("program", run, {1, kThreads, nullptr, kBytes}, {static_cast<const Step*>(steps), count, out.data()});
    };
    return message_of(launch_it, message, size);
}
