#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if XLAYER_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace xlayer::emulator {

// --- Stacks ---------------------------------------------------------------------------------------------------------

Stack Stacks::take() {
    if (free_.empty()) {
        static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
        char* const begin = static_cast<char*>(memory) + page;
        all_.push_back({begin, begin + kStackBytes});
        free_.push_back(all_.back());
    }
    const Stack stack = free_.back();
    free_.pop_back();
#if XLAYER_EMULATOR_ASAN
    __asan_unpoison_memory_region(stack.begin, kStackBytes);  // frames that were abandoned
#endif
    return stack;
}

void Stacks::take_all_back() { free_ = all_; }

bool Stacks::guards(const void* address) const {
    static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (const Stack& stack : all_) {
        if (address < stack.begin && address >= stack.begin - page) return true;
    }
    return false;
}

// --- The switch -----------------------------------------------------------------------------------------------------

namespace {

#if XLAYER_EMULATOR_ASAN
Context* left;  // what ran before the switch
#endif

#ifdef __x86_64__

// Pushes what a function must preserve, and leaves where that is. All fibers have the same floating-point modes.
extern "C" {
void xlayer_emulator_switch(void** save, void* stack_pointer);
void xlayer_emulator_begin();
}
asm(R"(
    .pushsection .text
    .p2align 4
    .local xlayer_emulator_switch
    .type xlayer_emulator_switch, @function
xlayer_emulator_switch:
    .cfi_startproc
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .cfi_endproc
    .size xlayer_emulator_switch, . - xlayer_emulator_switch

    .p2align 4
    .local xlayer_emulator_begin
    .type xlayer_emulator_begin, @function
xlayer_emulator_begin:
    .cfi_startproc
    .cfi_undefined rip
    callq *%rbx
    ud2
    .cfi_endproc
    .size xlayer_emulator_begin, . - xlayer_emulator_begin
    .popsection
)");

void exchange(Context& from, Context& to) { xlayer_emulator_switch(&from.stack_pointer, to.stack_pointer); }

#else

void exchange(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

#endif

}  // namespace

void prepare(Context& context, const Stack& stack, void (*entry)()) {
#ifdef __x86_64__
    // All stacks begin at the same offset in a page. Were their tops there too, the lines that the threads of a warp
    // use most would share a few sets of the cache.
    const size_t color = reinterpret_cast<uintptr_t>(stack.begin) / kStackBytes * 7 % 32 * 64;
    auto* top = reinterpret_cast<uint64_t*>(stack.end - 256 - color);
    *--top = reinterpret_cast<uint64_t>(&xlayer_emulator_begin);     // the switch returns there
    *--top = 0;                                                      // rbp
    *--top = reinterpret_cast<uint64_t>(entry);                      // rbx
    for (int preserved = 0; preserved < 4; ++preserved) *--top = 0;  // r12 to r15
    context.stack_pointer = top;
#else
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack.begin;
    context.registers.uc_stack.ss_size = kStackBytes;
    context.registers.uc_link = nullptr;
    makecontext(&context.registers, entry, 0);
#endif
#if XLAYER_EMULATOR_ASAN
    context.fake_stack = nullptr;
    context.stack_begin = stack.begin;
    context.stack_bytes = kStackBytes;
#endif
}

#if XLAYER_EMULATOR_ASAN

void arrived(Context& context) {
    const void* begin;
    size_t bytes;
    __sanitizer_finish_switch_fiber(context.fake_stack, &begin, &bytes);
    if (left == nullptr) return;
    left->stack_begin = begin;  // news only for the stack that the launch came on
    left->stack_bytes = bytes;
}

void switch_to(Context& from, Context& to) {
    left = &from;
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_begin, to.stack_bytes);
    exchange(from, to);
    arrived(from);
}

void leave_to(Context& to) {
    static Context nowhere;
    left = nullptr;
    __sanitizer_start_switch_fiber(nullptr, to.stack_begin, to.stack_bytes);
    exchange(nowhere, to);
    __builtin_unreachable();
}

#else

void arrived(Context&) {}
void switch_to(Context& from, Context& to) { exchange(from, to); }

void leave_to(Context& to) {
    static Context nowhere;
    exchange(nowhere, to);
    __builtin_unreachable();
}

#endif

}  // namespace xlayer::emulator
