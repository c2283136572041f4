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

// The matrices of a product. Every lane lays its elements down as it comes and takes its part of d as it goes on, while
// its own stack is in the cache; nobody else touches that part.
struct Product {
    double a[16 * 16], b[16 * 8];  // those of 16 bits and of tf32 widened
    union {
        float d[16 * 8];
        double wide_d[8 * 8];
    };
};

// What a lane brings to a load of matrices.
struct MatrixLoad {
    uint32_t* to;
    const void* row;
    const void* pc;
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
    // A lane may be one meeting ahead of others, that have yet to take what the last one gave them.
    int parity;
    uint64_t values[2][kLanes];  // of this meeting and the one before
    unsigned votes;
    int matrix_count;
    MatrixLoad loads[kLanes];
    alignas(64) Product product;
};

[[noreturn]] void fault(const std::string& what, Site site);

// The thread that runs, and its warp.
extern Fiber* running;
extern Warp* running_in;
inline Fiber& running_fiber() { return *running; }
inline Warp& running_warp() { return *running_in; }

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

// Returns when all 32 lanes of the warp have come; the last one calls work() if there is any.
void meet_in_warp(Operation operation, Site site, void (*work)(Warp&));

bool outside_shared(const void* address);  // and not even near it

}  // namespace xlayer::emulator
