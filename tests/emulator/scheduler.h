// The threads of the block that runs, and how they wait for each other. Inside the emulator only.
//
// A warp runs until all its lanes wait or have exited, then the next warp. A lane that must wait switches directly to
// another that can run; the one that completes a meeting does the work for all of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "emulator.h"
#include "fiber.h"

namespace xlayer::emulator {

enum class Operation : uint8_t {
    sync_block,
    sync_warp,
    ballot,
    shuffle,
    load_matrices,
    load_matrices_transposed,
    mma_16x8x16,
    mma_16x8x8_tf32,
    mma_8x8x4,
};

// An asynchronous copy that has not landed.
struct Copy {
    void* shared;
    const void* global;
    unsigned group;  // how many groups its thread had committed before
    Site site;
};

enum class State : uint8_t { fresh, started, waiting, exited };

struct Fiber : Thread {
    uint3 position;  // its threadIdx
    State state;
    Operation waits_in;
    Site waits_at;
    Context context;
    Stack stack;
    std::vector<Copy> copies;
    unsigned groups;  // of copies, committed so far
};

// What a lane brings to a meeting of its warp, and takes from it.
struct Operands {
    uint64_t value;
    int lane;
    void* to;
    const void* a;
    const void* b;
};

// Those who wait for each other. They can only meet if all do the same at the same line.
struct Meeting {
    int arrived = 0;
    bool together = true;
    Operation operation{};
    Site site{};

    void join(Operation new_operation, Site new_site);
};

struct Warp {
    Fiber* lanes;
    int count, live;
    Meeting meeting;
    uint8_t ready[kLanes];  // lanes that can run, in their order; those before `next` have had their turn
    int ready_count, next;
    Operands operands[kLanes];
};

[[noreturn]] void fault(const std::string& what, Site site);

Fiber& running_fiber();
Warp& running_warp();

// Lets a check find its fault in the name of another lane.
class InTheNameOf {
  public:
    explicit InTheNameOf(Fiber& lane);
    ~InTheNameOf();
    InTheNameOf(const InTheNameOf&) = delete;
    InTheNameOf& operator=(const InTheNameOf&) = delete;

  private:
    Fiber* self_;
};

// Returns when all 32 lanes of the warp have come; the last one calls work().
void meet_in_warp(Operation operation, Site site, void (*work)(Warp&));

bool outside_shared(const void* address);  // and not even near it

}  // namespace xlayer::emulator
