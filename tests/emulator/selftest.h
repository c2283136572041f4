// What the parts of the emulator's own test share. Each part registers its tests; selftest.cpp runs them all.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/common/device.cuh"
#include "fiber.h"

namespace xlayer::selftest {

using namespace xlayer::cuda;

// Around code that looks at memory in ways which the checker would rightly report.
#define UNSEEN __attribute__((noinline, no_sanitize("thread", "address", "undefined")))

class Random {
  public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    uint64_t bits() { return engine_(); }
    int below(int bound) { return static_cast<int>(bits() % static_cast<uint64_t>(bound)); }
    int between(int first, int last) { return first + below(last - first + 1); }
    double unit() { return static_cast<double>(bits() >> 11) * 0x1p-53 * 2 - 1; }  // in [-1, 1)

  private:
    std::mt19937_64 engine_;
};

struct Test {
    std::string name;
    std::function<void(Random&)> run;
};
inline std::vector<Test> tests;
struct Registered {
    Registered(const char* name, std::function<void(Random&)> run) { tests.push_back({name, std::move(run)}); }
};

inline void require(bool holds, const std::string& otherwise) {
    if (!holds) throw std::runtime_error(otherwise);
}
template <class A, class B>
void require_equal(const A& got, const B& expected, const std::string& what) {
    require(got == expected, what + " is " + std::to_string(got) + ", not " + std::to_string(expected));
}

// The message with which f() ends; it must end with one that contains all `parts`.
inline void require_error(const std::function<void()>& f, const std::vector<std::string>& parts) {
    std::string message;
    try {
        f();
    } catch (const std::runtime_error& error) {
        message = error.what();
    }
    require(!message.empty(), "no error, expected: " + parts.front());
    for (const std::string& part : parts) {
        require(message.find(part) != std::string::npos, "'" + part + "' is not in: " + message);
    }
}

// Runs f() with several orders of blocks and threads.
inline void with_schedules(Random& random, const std::function<void()>& f) {
    for (int i = 0; i < 3; ++i) {
        emulator::set_seed(random.bits());
        f();
    }
}

}  // namespace xlayer::selftest
