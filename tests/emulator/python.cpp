// What the tests call from Python, through ctypes.
#include "emulator.h"

#define FROM_PYTHON extern "C" __attribute__((visibility("default")))

FROM_PYTHON uint64_t xlayer_emulator_launches() { return xlayer::emulator::launches(); }
FROM_PYTHON void xlayer_emulator_set_seed(uint64_t seed) { xlayer::emulator::set_seed(seed); }
