// Planted faults: small kernels, each with one mistake of the kind that the emulator must find, and corrected twins of
// them that must pass. The lines at which a mistake can be noticed end in "fault:" and its name.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "checker.h"
#include "cuda/common/device.cuh"
#include "fiber.h"

namespace xlayer::faults {

using namespace xlayer::cuda;

// One of them, by the name that its launch has. run() ends by an exception if anything is wrong.
class Fault {
  public:
    Fault(const char* name, void (*run)(const char* name, bool fixed)) : name(name), run(run), next_(first_) {
        first_ = this;
    }
    static const Fault* find(const std::string& name) {
        const Fault* fault = first_;
        while (fault != nullptr && fault->name != name) fault = fault->next_;
        return fault;
    }

    const std::string name;
    void (*const run)(const char* name, bool fixed);

  private:
    static inline const Fault* first_ = nullptr;
    const Fault* next_;
};

// Global memory that the kernel may use.
template <class T>
class Buffer {
  public:
    Buffer(const char* name, size_t size, bool writable) : values_(size + kApart) {
        for (size_t i = 0; i < size; ++i) data()[i] = static_cast<T>(i % 100);
        emulator::allow_memory(data(), size * sizeof(T), writable, name);
    }
    T* data() { return values_.data() + kApart / 2; }
    T& operator[](size_t i) { return data()[i]; }

  private:
    // Elements between one buffer and the next; none where AddressSanitizer guards the ends.
    static constexpr size_t kApart = XLAYER_EMULATOR_ASAN ? 0 : 256;
    std::vector<T> values_;
};
template <class T>
Buffer<T> input(const char* name, size_t size) {
    return Buffer<T>(name, size, false);
}
template <class T>
Buffer<T> output(const char* name, size_t size) {
    return Buffer<T>(name, size, true);
}

// What most of these kernels take.
struct InOut {
    const float* x;
    float* out;
};

// Launches the kernel on x of `size` elements with an output as large.
inline void run_in_out(const char* name, void (*kernel)(InOut), size_t size, const Launch& how) {
    auto x = input<float>("x", size);
    auto out = output<float>("out", size);
    launch(name, kernel, how, {x.data(), out.data()});
}

// For the tests, which call C: whether f() ended by an exception, with its message.
template <class F>
int message_of(const F& f, char* message, size_t size) {
    int ended = 0;
    try {
        f();
    } catch (const std::exception& error) {
        strncpy(message, error.what(), size - 1);
        ended = 1;
    }
    emulator::forget_memory();
    return ended;
}

}  // namespace xlayer::faults

#define XLAYER_EXPORT extern "C" __attribute__((visibility("default")))
