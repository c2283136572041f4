#include "emulator.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>

#include "checker.h"
#include "cuda_runtime.h"
#include "report.h"
#include "scheduler.h"

#if XLAYER_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace xlayer::emulator {

Fiber* running = nullptr;
Warp* running_in = nullptr;

namespace {

// --- State ----------------------------------------------------------------------------------------------------------

uint64_t first_seed() {
    const char* text = getenv("XLAYER_EMULATOR_SEED");
    return text != nullptr ? strtoull(text, nullptr, 0) : 1;
}

class Random {
  public:
    void seed(uint64_t seed) { state_ = seed; }
    uint64_t next() {
        state_ += 0x9e3779b97f4a7c15;
        uint64_t x = state_;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
        x = (x ^ x >> 27) * 0x94d049bb133111eb;
        return x ^ x >> 31;
    }
    // Four numbers below `bound` (at most 2^16) cost one step.
    template <class T>
    void shuffle(T* order, int count) {
        uint64_t bits = 0;
        for (int left = count; left > 1; --left) {
            if ((count - left) % 4 == 0) bits = next();
            std::swap(order[left - 1], order[(bits & 0xffff) * static_cast<unsigned>(left) >> 16]);
            bits >>= 16;
        }
    }

  private:
    uint64_t state_ = 0;
};

// Orders in which lanes may go on, ready to be drawn from.
class LaneOrders {
  public:
    void seed(uint64_t seed) {
        if (seeded_ && seed == seed_) return;
        seed_ = seed;
        seeded_ = true;
        Random random;
        random.seed(seed);
        for (auto& order : orders_) {
            std::iota(order, order + kLanes, uint8_t{0});
            random.shuffle(order, kLanes);
        }
    }
    const uint8_t* draw(Random& random) const { return orders_[random.next() % kCount]; }

  private:
    static constexpr int kCount = 128;
    uint8_t orders_[kCount][kLanes];
    uint64_t seed_ = 0;
    bool seeded_ = false;
};

// Kernels run with the default floating-point modes, whatever the caller has set.
class FloatingPointModes {
  public:
    FloatingPointModes() {
        fegetenv(&outer_);
        fesetenv(FE_DFL_ENV);
    }
    ~FloatingPointModes() { fesetenv(&outer_); }

  private:
    fenv_t outer_;
};

// Addresses around the block's shared memory, in which nothing else lies.
struct SharedMemory {
    char* base = nullptr;
    size_t bytes = 0;

    void resize(size_t new_bytes) {
        constexpr size_t all = kMaxShared + 2 * kSharedGuard;
        if (base == nullptr) {
            void* memory = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (memory == MAP_FAILED) throw std::bad_alloc();
            base = static_cast<char*>(memory) + kSharedGuard;
        }
        bytes = new_bytes;
#if XLAYER_EMULATOR_ASAN
        __asan_poison_memory_region(base - kSharedGuard, all);
        __asan_unpoison_memory_region(base, bytes);
#endif
    }
};

struct Failure {
    bool found = false;
    std::string what;
    const void* pc = nullptr;  // where, or
    Site site{};               // where
    const Fiber* thread = nullptr;
};

uint64_t seed = first_seed();
uint64_t launch_count = 0;
const char* kernel_name = "kernel";

Random random_order;
LaneOrders lane_orders;
Stacks stacks;
Context scheduler;
SharedMemory shared;
Failure failure;
pthread_t launching_thread;

void (*call_kernel)(void*);
void* kernel_closure;

std::vector<Fiber> fibers;
std::vector<Warp> warps;
int live;               // threads of the block
Meeting block_meeting;  // in sync_block
uint8_t warp_order[kMaxThreads / kLanes];
int warps_begun;  // how many of warp_order have had their turn since the last barrier of the block

// --- Who runs -------------------------------------------------------------------------------------------------------

void make_ready(Warp& warp) {
    warp.meeting = {};
    warp.ready_count = warp.next = 0;
    const uint8_t* order = lane_orders.draw(random_order);
    if (warp.live == kLanes) {
        memcpy(warp.ready, order, kLanes);
        warp.ready_count = kLanes;
        return;
    }
    for (int i = 0; i < kLanes; ++i) {
        const int lane = order[i];
        if (lane < warp.count && warp.lanes[lane].state != State::exited) {
            warp.ready[warp.ready_count++] = order[i];
        }
    }
}

void make_all_ready() {
    block_meeting = {};
    for (Warp& warp : warps) make_ready(warp);
    std::iota(warp_order, warp_order + warps.size(), uint8_t{0});
    random_order.shuffle(warp_order, static_cast<int>(warps.size()));
    warps_begun = 0;
    running_in = &warps[warp_order[warps_begun++]];
}

Fiber* next_to_run() {
    while (running_in->next == running_in->ready_count) {
        if (warps_begun == static_cast<int>(warps.size())) return nullptr;
        running_in = &warps[warp_order[warps_begun++]];
    }
    return &running_in->lanes[running_in->ready[running_in->next++]];
}

void run_on(Fiber& fiber, const Stack& stack) {
    fiber.stack = stack;
    fiber.stack_begin = stack.begin;
    fiber.stack_end = stack.end;
}

void thread_main();

// Makes `fiber` the running one and says where it goes on.
Context& enter(Fiber& fiber) {
    if (fiber.state == State::fresh) {
        run_on(fiber, stacks.take());
        prepare(fiber.context, fiber.stack, thread_main);
    }
    fiber.state = State::started;
    running = &fiber;
    threadIdx = fiber.position;
    return fiber.context;
}

void wait() {
    Fiber& self = *running;
    Fiber* next = next_to_run();
    if (next == &self) {
        self.state = State::started;
    } else if (next != nullptr) {
        switch_to(self.context, enter(*next));
    } else {
        leave_to(scheduler);
    }
}

void wait_in(Operation operation, Site site) {
    running->state = State::waiting;
    running->waits_in = operation;
    running->waits_at = site;
}

bool complete(const Meeting& meeting, int expected) { return meeting.arrived == expected && meeting.together; }

void pass_warp_barrier(Warp& warp) {
    warp_barrier_passed(static_cast<int>(&warp - warps.data()));
    make_ready(warp);
}
void pass_block_barrier() {
    block_barrier_passed();
    make_all_ready();
}

// After the running thread's last instruction. The others no longer wait for it.
void exit_thread() {
    Fiber& self = *running;
    if (!self.copies.empty()) {
        const size_t count = self.copies.size();
        fault(std::to_string(count) + (count == 1 ? " asynchronous copy is" : " asynchronous copies are") +
                  " in flight when the thread exits (missing wait_copies)",
              self.copies.front().site);
    }
    self.state = State::exited;
    Warp& warp = warps[self.warp];
    --warp.live;
    --live;
    if (live == 0) return;
    if (warp.live > 0 && warp.meeting.operation == Operation::sync_warp && complete(warp.meeting, warp.live)) {
        pass_warp_barrier(warp);
    } else if (complete(block_meeting, live)) {
        pass_block_barrier();
    }
}

// A stack's whole life. Threads that never wait follow one another on the same one.
void thread_main() {
    arrived(running->context);
    for (;;) {
        call_kernel(kernel_closure);
        exit_thread();
        Fiber& last = *running;
        Fiber* next = next_to_run();
        if (next == nullptr) {
            stacks.give(last.stack);
            leave_to(scheduler);
        }
        if (next->state != State::fresh) {
            stacks.give(last.stack);
            leave_to(enter(*next));
        }
        next->context = last.context;
        run_on(*next, last.stack);
        next->state = State::started;
        running = next;
        threadIdx = next->position;
    }
}

// --- Invalid addresses ----------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !XLAYER_EMULATOR_ASAN

const void* invalid_address;
const void* invalid_pc;

[[noreturn]] void report_invalid_address() {
    if (stacks.guards(invalid_address)) {
        fault("stack overflow: more than " + std::to_string(kStackBytes >> 10) + " KiB of local variables", invalid_pc);
    }
    char address[32];
    snprintf(address, sizeof address, "%p", invalid_address);
    fault(std::string("access to invalid address ") + address, invalid_pc);
}

// While a kernel runs, turns a segmentation fault of its thread into a fault of the launch.
class SignalHandler {
  public:
    SignalHandler() {
        stack_t stack{};
        stack.ss_sp = signal_stack;
        stack.ss_size = sizeof signal_stack;
        sigaltstack(&stack, &outer_stack_);
        struct sigaction action{};
        action.sa_sigaction = handle;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &outer);
    }
    ~SignalHandler() {
        sigaction(SIGSEGV, &outer, nullptr);
        sigaltstack(&outer_stack_, nullptr);
    }

  private:
    static void handle(int, siginfo_t* info, void* context) {
        if (running == nullptr || !pthread_equal(pthread_self(), launching_thread)) {
            sigaction(SIGSEGV, &outer, nullptr);  // not ours: it happens again, for whoever handled it before
            return;
        }
        invalid_address = info->si_addr;
        auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
        invalid_pc = reinterpret_cast<const char*>(registers[REG_RIP]) + 1;  // as if a call had stood there
        // The handler returns into the report, on a stack of its own: that of the thread may be full.
        registers[REG_RSP] = reinterpret_cast<greg_t>(report_stack + sizeof report_stack - 8);
        registers[REG_RIP] = reinterpret_cast<greg_t>(report_invalid_address);
    }

    alignas(16) static char signal_stack[32 << 10];
    alignas(16) static char report_stack[32 << 10];
    static struct sigaction outer;
    stack_t outer_stack_{};
};
char SignalHandler::signal_stack[];
char SignalHandler::report_stack[];
struct sigaction SignalHandler::outer;

#else

class SignalHandler {
  public:
    SignalHandler() {}  // AddressSanitizer reports both itself
};

#endif

// --- Launches -------------------------------------------------------------------------------------------------------

void set_up_threads(const Grid& grid) {
    const unsigned* size = grid.threads;
    const int count = static_cast<int>(size[0] * size[1] * size[2]);
    fibers.resize(static_cast<size_t>(count));
    warps.resize(static_cast<size_t>((count + kLanes - 1) / kLanes));
    for (int index = 0; index < count; ++index) {
        Fiber& fiber = fibers[static_cast<size_t>(index)];
        fiber.index = index;
        fiber.warp = index / kLanes;
        fiber.lane = index % kLanes;
        const auto i = static_cast<unsigned>(index);
        fiber.position = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    }
    for (size_t i = 0; i < warps.size(); ++i) {
        warps[i].lanes = &fibers[i * kLanes];
        warps[i].count = std::min(kLanes, count - static_cast<int>(i) * kLanes);
    }
}

void run_block(uint64_t block) {
    blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
                static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    memset(shared.base, 0xff, shared.bytes);
    block_begins(block, shared.base, shared.bytes);
    for (Fiber& fiber : fibers) {
        fiber.block = block;
        fiber.state = State::fresh;
        fiber.groups = 0;
    }
    for (Warp& warp : warps) {
        warp.live = warp.count;
        warp.parity = 0;
    }
    live = static_cast<int>(fibers.size());
    make_all_ready();
    switch_to(scheduler, enter(*next_to_run()));
    if (!failure.found && live > 0) {
        const Deadlock deadlock = explain_deadlock(warps);
        failure = {true, deadlock.what, nullptr, deadlock.thread->waits_at, deadlock.thread};
    }
    running = nullptr;
}

// What a failure leaves behind must not show in the next launch.
void abandon_threads() {
    for (Fiber& fiber : fibers) fiber.copies.clear();
    stacks.take_all_back();
}

std::string describe_block() {
    if (gridDim.y == 1 && gridDim.z == 1) return std::to_string(blockIdx.x);
    return "(" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) +
           ")";
}

std::string describe_failure() {
    const std::string line = failure.pc != nullptr ? source_line(failure.pc) : describe(failure.site);
    return std::string(kernel_name) + ": " + failure.what + " (block " + describe_block() + ", thread " +
           std::to_string(failure.thread->index) + ", " + line + ")";
}

}  // namespace

// --- For the checker and the tests ----------------------------------------------------------------------------------

const Thread* current_thread() { return running; }

void set_seed(uint64_t new_seed) { seed = new_seed; }

uint64_t launches() { return launch_count; }

void fault(const std::string& what, const void* pc) {
    if (running == nullptr) throw std::runtime_error(what);
    failure = {true, what, pc, {}, running};
    leave_to(scheduler);
}
void fault(const std::string& what, Site site) {
    failure = {true, what, nullptr, site, running};
    leave_to(scheduler);
}

KernelName::KernelName(const char* name) : outer_(kernel_name) { kernel_name = name; }
KernelName::~KernelName() { kernel_name = outer_; }

void run_grid(const Grid& grid, void (*call)(void*), void* closure) {
    static std::mutex one_launch;
    const std::lock_guard<std::mutex> lock(one_launch);
    ++launch_count;
    call_kernel = call;
    kernel_closure = closure;
    launching_thread = pthread_self();
    gridDim = dim3(grid.blocks[0], grid.blocks[1], grid.blocks[2]);
    blockDim = dim3(grid.threads[0], grid.threads[1], grid.threads[2]);
    shared.resize(grid.shared_bytes);
    set_up_threads(grid);
    random_order.seed(seed);
    lane_orders.seed(seed);

    // Blocks in an order that takes no memory: steps of a length that has no factor in common with their number.
    const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    uint64_t step, block = random_order.next() % blocks;
    do step = random_order.next() % blocks;
    while (std::gcd(step, blocks) != 1);

    failure = {};
    launch_begins(kernel_name, static_cast<int>(fibers.size()));
    {
        const SignalHandler handler;
        const FloatingPointModes modes;
        for (uint64_t i = 0; i < blocks && !failure.found; ++i) {
            run_block(block);
            block = static_cast<uint64_t>((static_cast<unsigned __int128>(block) + step) % blocks);
        }
    }
    launch_ends();
    if (failure.found) {
        abandon_threads();
        throw std::runtime_error(describe_failure());
    }
}

// --- For instructions -----------------------------------------------------------------------------------------------

void Meeting::join(Operation new_operation, Site new_site) {
    if (arrived++ == 0) {
        operation = new_operation;
        site = new_site;
    } else if (operation != new_operation || site.line != new_site.line ||
               (site.file != new_site.file && strcmp(site.file, new_site.file) != 0)) {
        together = false;
    }
}

InTheNameOf::InTheNameOf(Fiber& lane) : self_(running) { running = &lane; }
InTheNameOf::~InTheNameOf() { running = self_; }

void meet_in_warp(Operation operation, Site site, void (*work)(Warp&)) {
    Warp& warp = running_warp();
    wait_in(operation, site);
    warp.meeting.join(operation, site);
    if (complete(warp.meeting, kLanes)) {
        if (work != nullptr) work(warp);
        warp.parity ^= 1;
        make_ready(warp);
    }
    wait();
}

void sync_warp(Site site) {
    Warp& warp = running_warp();
    wait_in(Operation::sync_warp, site);
    warp.meeting.join(Operation::sync_warp, site);
    if (complete(warp.meeting, warp.live)) pass_warp_barrier(warp);
    wait();
}

void sync_block(Site site) {
    wait_in(Operation::sync_block, site);
    block_meeting.join(Operation::sync_block, site);
    if (complete(block_meeting, live)) pass_block_barrier();
    wait();
}

void* shared_base() { return shared.base; }

bool outside_shared(const void* address) {
    return address < shared.base - kSharedGuard || address >= shared.base + shared.bytes + kSharedGuard;
}

}  // namespace xlayer::emulator
