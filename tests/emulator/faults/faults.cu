// What tests/test_emulator.py calls.
#include <cstring>

#include "fault.h"

#define XLAYER_EXPORT extern "C" __attribute__((visibility("default")))

// 0: it went through. 1: it ended with `message`. −1: there is none of that name.
XLAYER_EXPORT int run_fault(const char* name, int fixed, char* message, size_t size) {
    const auto* fault = xlayer::faults::Fault::find(name);
    if (fault == nullptr) return -1;
    int ended = 0;
    try {
        fault->run(fault->name.c_str(), fixed != 0);
    } catch (const std::exception& error) {
        strncpy(message, error.what(), size - 1);
        ended = 1;
    }
    xlayer::emulator::forget_memory();
    return ended;
}
