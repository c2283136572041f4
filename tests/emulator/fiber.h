// Stacks, and the switch from one to another.
#pragma once

#include <cstddef>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define XLAYER_EMULATOR_ASAN 1
#else
#define XLAYER_EMULATOR_ASAN 0
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace xlayer::emulator {

#if XLAYER_EMULATOR_ASAN
constexpr size_t kStackBytes = 256 << 10;  // red zones make frames larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// Usable bytes; below `begin` lies a page that must not be touched.
struct Stack {
    char* begin = nullptr;
    char* end = nullptr;
};

// All stacks ever made. The one given back last is taken first, since it is in the cache.
class Stacks {
  public:
    Stack take();
    void give(const Stack& stack) { free_.push_back(stack); }
    void take_all_back();  // whoever had one will not run again
    bool guards(const void* address) const;

  private:
    std::vector<Stack> all_, free_;
};

// Where something that does not run will go on.
struct Context {
#ifdef __x86_64__
    void* stack_pointer = nullptr;
#else
    ucontext_t registers;
#endif
#if XLAYER_EMULATOR_ASAN
    void* fake_stack = nullptr;
    const void* stack_begin = nullptr;
    size_t stack_bytes = 0;
#endif
};

// `context` will begin with entry(), which must first call arrived() and never return.
void prepare(Context& context, const Stack& stack, void (*entry)());
void arrived(Context& context);

void switch_to(Context& from, Context& to);
[[noreturn]] void leave_to(Context& to);  // what runs now never goes on

}  // namespace xlayer::emulator
