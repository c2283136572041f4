// What the tests call from Python, through ctypes.
#include <dlfcn.h>

#include <string>

#include "emulator.h"

#define FROM_PYTHON extern "C" __attribute__((visibility("default")))

FROM_PYTHON uint64_t xlayer_emulator_launches() { return xlayer::emulator::launches(); }
FROM_PYTHON void xlayer_emulator_set_seed(uint64_t seed) { xlayer::emulator::set_seed(seed); }

// A line for each: where in this library the kernel is, threads, bytes of shared memory. Until the next call.
FROM_PYTHON const char* xlayer_emulator_launched_blocks() {
    static std::string lines;
    lines.clear();
    for (const auto& block : xlayer::emulator::launched_blocks()) {
        Dl_info library{};
        dladdr(block.kernel, &library);
        const auto place = static_cast<const char*>(block.kernel) - static_cast<const char*>(library.dli_fbase);
        lines += std::to_string(place) + " " + std::to_string(block.threads) + " " +
                 std::to_string(block.shared_bytes) + "\n";
    }
    return lines.c_str();
}
FROM_PYTHON void xlayer_emulator_forget_launched_blocks() { xlayer::emulator::forget_launched_blocks(); }
