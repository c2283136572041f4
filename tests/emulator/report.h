// The words of messages about the block that runs. Inside the emulator only.
#pragma once

#include <string>
#include <vector>

#include "scheduler.h"

namespace xlayer::emulator {

std::string describe(Site site);  // "csrc/cuda/hdim/routing.cu:61"

// Why nothing can run though threads are left.
struct Deadlock {
    std::string what;
    const Fiber* thread;  // one of those that wait
};
Deadlock explain_deadlock(const std::vector<Warp>& warps);

}  // namespace xlayer::emulator
