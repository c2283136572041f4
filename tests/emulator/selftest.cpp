// The emulator against what CUDA says of instructions, barriers and launches, on random values.
//   emulator_selftest [seed]
#include "selftest.h"

#include <cstdio>
#include <cstdlib>

// The frames of a kernel that a fault abandons may own memory: the texts of messages.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() { return "detect_leaks=0"; }

int main(int count, char** arguments) {
    const uint64_t seed = count > 1 ? strtoull(arguments[1], nullptr, 0) : std::random_device()();
    printf("seed %llu\n", static_cast<unsigned long long>(seed));
    for (const auto& test : xlayer::selftest::tests) {
        xlayer::selftest::Random random(seed);
        try {
            test.run(random);
            printf("ok %s\n", test.name.c_str());
        } catch (const std::exception& error) {
            printf("FAILED %s: %s\n", test.name.c_str(), error.what());
            return 1;
        }
        fflush(stdout);
    }
    return 0;
}
