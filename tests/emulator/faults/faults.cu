// What tests/emulator/test_emulator.py calls.
#include "fault.h"

// 0: it went through. 1: it ended with `message`. −1: there is none of that name.
XLAYER_EXPORT int run_fault(const char* name, int fixed, char* message, size_t size) {
    const auto* fault = xlayer::faults::Fault::find(name);
    if (fault == nullptr) return -1;
    return xlayer::faults::message_of([&] { fault->run(name, fixed != 0); }, message, size);
}
