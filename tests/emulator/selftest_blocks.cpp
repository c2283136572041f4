// Threads of a block: what they are told, how they wait for each other, their shared memory and its asynchronous
// copies.
#include <algorithm>
#include <cfenv>
#include <cstring>
#include <numeric>
#include <set>

#include "selftest.h"

namespace xlayer::selftest {
namespace {

// --- What a thread knows --------------------------------------------------------------------------------------------

struct Place {
    unsigned at[6], size[6];
};
struct Places {
    Place* out;
    int changed;  // by every thread, in its own copy
};

__global__ void tell_places(Places args) {
    args.changed += static_cast<int>(threadIdx.x) + 1;
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    Place& place = args.out[block * (blockDim.x * blockDim.y * blockDim.z) + thread];
    place = {{blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z},
             {gridDim.x, gridDim.y, gridDim.z, blockDim.x, blockDim.y, blockDim.z}};
    if (args.changed != static_cast<int>(threadIdx.x) + 1) place.at[0] = 1u << 31;
}

void places(Random& random) {
    unsigned size[6];
    for (unsigned& x : size) x = static_cast<unsigned>(random.between(1, 7));
    const size_t threads = size[3] * size[4] * size[5], all = size[0] * size[1] * size[2] * threads;
    with_schedules(random, [&] {
        std::vector<Place> out(all);
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(size[0], size[1], size[2]);
        config.blockDim = dim3(size[3], size[4], size[5]);
        check(cudaLaunchKernelEx(&config, tell_places, Places{out.data(), 0}), "places");
        for (size_t i = 0; i < all; ++i) {
            size_t rest = i;
            for (int axis : {3, 4, 5, 0, 1, 2}) {
                require_equal(out[i].size[axis], size[axis], "a size");
                require_equal(out[i].at[axis], rest % size[axis], "a place");
                rest /= size[axis];
            }
        }
    });
}

// --- Barriers -------------------------------------------------------------------------------------------------------

struct Sum {
    const float* x;  // [blocks, each]
    float* out;      // [blocks, 2]: the sum, and the sum of squared distances from the mean
    int64_t each;
};

__device__ float block_sum(float value, float* shared) {
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    sync_block();
    if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
    sync_block();
    float sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / kWarpSize; ++warp) sum += shared[warp];
    return sum;
}

__global__ void reduce(Sum args) {
    auto* shared = shared_memory<float>();
    const float* x = args.x + blockIdx.x * args.each;
    float sum = 0;
    for (int64_t i = threadIdx.x; i < args.each; i += blockDim.x) sum += x[i];
    const float mean = block_sum(sum, shared) / static_cast<float>(args.each);
    float squares = 0;
    for (int64_t i = threadIdx.x; i < args.each; i += blockDim.x) squares += (x[i] - mean) * (x[i] - mean);
    squares = block_sum(squares, shared);
    if (threadIdx.x > 1) return;
    args.out[blockIdx.x * 2 + threadIdx.x] = threadIdx.x == 0 ? mean * static_cast<float>(args.each) : squares;
}

void reductions(Random& random) {
    for (const int warps : {1, random.between(2, 31), 32}) {
        const int blocks = random.between(1, 5), each = random.between(1, 3000);
        std::vector<float> x(static_cast<size_t>(blocks * each)), first;
        for (float& value : x) value = static_cast<float>(random.unit() + 0.5);
        with_schedules(random, [&] {
            std::vector<float> out(static_cast<size_t>(blocks) * 2);
            const auto shared = static_cast<size_t>(warps) * sizeof(float);
            launch("reduce", reduce, {blocks, warps * kWarpSize, nullptr, shared}, {x.data(), out.data(), each});
            for (int block = 0; block < blocks; ++block) {
                const auto begin = x.begin() + block * each, end = begin + each;
                const double sum = std::accumulate(begin, end, 0.0), mean = sum / each;
                const auto add = [&](double total, float value) { return total + (value - mean) * (value - mean); };
                const double squares = std::accumulate(begin, end, 0.0, add);
                const auto at = static_cast<size_t>(block) * 2;
                require(std::fabs(out[at] - sum) <= 1e-4 * each, "a sum");
                require(std::fabs(out[at + 1] - squares) <= 1e-4 * each, "a sum of squares");
            }
            if (first.empty()) first = out;
            require(memcmp(out.data(), first.data(), out.size() * sizeof(float)) == 0, "the schedule changed a sum");
        });
    }
}

// Threads leave before barriers, which do not wait for them.
struct Leaving {
    const int* turns;  // of each thread
    int *out, *of_warp;
};

__global__ void leave_early(Leaving args) {
    auto* shared = shared_memory<int>();
    const int turns = args.turns[threadIdx.x];
    shared[threadIdx.x] = 0;
    shared[blockDim.x + threadIdx.x] = 0;
    if (turns < 0) return;
    sync_warp();
    for (int turn = 0;; ++turn) {
        sync_block();
        if (turn == turns) return;
        ++shared[threadIdx.x];
        sync_block();
        int sum = 0;
        for (unsigned i = 0; i < blockDim.x; ++i) sum += shared[i];
        args.out[threadIdx.x] = sum;
        sync_warp();
        shared[blockDim.x + threadIdx.x] = turn;
        sync_warp();
        const unsigned warp = threadIdx.x / kWarpSize * kWarpSize;
        int most = 0;
        for (unsigned i = warp; i < warp + kWarpSize && i < blockDim.x; ++i) {
            most = shared[blockDim.x + i] > most ? shared[blockDim.x + i] : most;
        }
        args.of_warp[threadIdx.x] = most;
    }
}

void early_exits(Random& random) {
    const auto threads = static_cast<size_t>(random.between(1, 300));
    std::vector<int> turns(threads);
    for (int& count : turns) count = random.between(-1, 5);
    with_schedules(random, [&] {
        std::vector<int> out(threads), of_warp(threads);
        launch("leave_early", leave_early, {1, static_cast<int>(threads), nullptr, 2 * threads * sizeof(int)},
               {turns.data(), out.data(), of_warp.data()});
        for (size_t i = 0; i < threads; ++i) {
            int sum = 0;
            for (int count : turns) sum += std::max(std::min(count, turns[i]), 0);
            require_equal(out[i], turns[i] <= 0 ? 0 : sum, "what all did until the thread's last turn");
            require_equal(of_warp[i], std::max(turns[i] - 1, 0), "the last turn of a lane");
        }
    });
}

// --- Shared memory --------------------------------------------------------------------------------------------------

// Not even written to by the block before.
struct Fresh {
    int64_t bytes;
    int* wrong;
};

UNSEEN int count_unlike(const unsigned char* bytes, int64_t count, unsigned char expected) {
    int unlike = 0;
    for (int64_t i = 0; i < count; ++i) unlike += bytes[i] != expected;
    return unlike;
}

__global__ void look_at_fresh_memory(Fresh args) {
    auto* shared = shared_memory<unsigned char>();
    int wrong = count_unlike(shared, args.bytes, 0xff);
    if (reinterpret_cast<uintptr_t>(shared) % 128 != 0) ++wrong;
    sync_block();
    for (int64_t i = threadIdx.x; i < args.bytes; i += blockDim.x) shared[i] = 1;
    args.wrong[blockIdx.x * blockDim.x + threadIdx.x] = wrong;
}

void fresh_memory(Random& random) {
    for (const int64_t bytes : {int64_t{0}, int64_t{random.between(1, 40000)}, int64_t{99 * 1024}}) {
        constexpr int blocks = 3, threads = 40;
        std::vector<int> wrong(blocks * threads, 1);
        launch("fresh", look_at_fresh_memory, {blocks, threads, nullptr, static_cast<size_t>(bytes)},
               {bytes, wrong.data()});
        for (int count : wrong) require_equal(count, 0, "bytes that are not fresh");
    }
}

// --- Asynchronous copies --------------------------------------------------------------------------------------------

constexpr int kGroups = 4;

struct Copies {
    const Vector<float, 4>* x;  // [kGroups, threads]
    Vector<float, 4>* out;
    int* wrong;
};

// Each group must be untouched memory until it is waited for, and there after that.
template <int may_stay>
__device__ int wait_and_look(const Vector<float, 4>* own, const Copies& args) {
    wait_copies<may_stay>();
    int wrong = 0;
    for (int group = 0; group < kGroups; ++group) {
        const auto* bytes = reinterpret_cast<const unsigned char*>(own + group * blockDim.x);
        const auto* source = reinterpret_cast<const unsigned char*>(args.x + group * blockDim.x + threadIdx.x);
        for (int i = 0; i < 16; ++i) {
            wrong += count_unlike(bytes + i, 1, group < kGroups - may_stay ? source[i] : 0xff);
        }
    }
    return wrong;
}

__global__ void copy(Copies args) {
    auto* own = shared_memory<Vector<float, 4>>() + threadIdx.x;
    for (int group = 0; group < kGroups; ++group) {
        copy_async(own + group * blockDim.x, args.x + group * blockDim.x + threadIdx.x);
        commit_copies();
    }
    int wrong = wait_and_look<kGroups>(own, args);
    wrong += wait_and_look<3>(own, args);
    wrong += wait_and_look<2>(own, args);
    wrong += wait_and_look<0>(own, args);
    sync_block();
    const unsigned other = blockDim.x - 1 - threadIdx.x;
    for (int group = 0; group < kGroups; ++group) {
        args.out[group * blockDim.x + threadIdx.x] = shared_memory<Vector<float, 4>>()[group * blockDim.x + other];
    }
    args.wrong[threadIdx.x] = wrong;
}

void copies(Random& random) {
    const auto threads = static_cast<size_t>(random.between(1, 100)), all = threads * kGroups;
    std::vector<Vector<float, 4>> x(all), out(all);
    for (auto& vector : x) {
        for (float& value : vector.at) value = static_cast<float>(random.unit());
    }
    with_schedules(random, [&] {
        std::vector<int> wrong(threads, 1);
        launch("copy", copy, {1, static_cast<int>(threads), nullptr, all * 16}, {x.data(), out.data(), wrong.data()});
        for (size_t i = 0; i < threads; ++i) {
            require_equal(wrong[i], 0, "bytes that landed too early or too late");
            for (size_t group = 0; group < kGroups; ++group) {
                const auto &got = out[group * threads + i], &expected = x[group * threads + threads - 1 - i];
                require(memcmp(&got, &expected, 16) == 0, "a copy has other bytes");
            }
        }
    });
}

// --- The schedule ---------------------------------------------------------------------------------------------------

struct Tickets {
    int *next, *before, *after;  // the next number; what each thread drew before and after a barrier
};

UNSEEN int draw(int* next) { return (*next)++; }

__global__ void take_tickets(Tickets args) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    args.before[i] = draw(args.next);
    sync_block();
    args.after[i] = draw(args.next);
}

// The positions of the values in ascending order.
std::vector<int> ranking(const int* values, int count) {
    std::vector<int> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int a, int b) { return values[a] < values[b]; });
    return order;
}

void orders(Random& random) {
    constexpr int blocks = 7, warps = 3, threads = warps * kWarpSize;
    const auto run = [&](uint64_t seed) {
        std::vector<int> tickets(2 * blocks * threads);
        int next = 0;
        emulator::set_seed(seed);
        launch("take_tickets", take_tickets, {blocks, threads, nullptr},
               {&next, tickets.data(), tickets.data() + blocks * threads});
        return tickets;
    };
    std::set<std::vector<int>> of_blocks, of_warps, of_lanes;
    for (int i = 0; i < 12; ++i) {
        const uint64_t seed = random.bits();
        const std::vector<int> tickets = run(seed);
        require(tickets == run(seed), "one seed, two orders");
        std::vector<int> first_of_blocks, first_of_warps;
        for (auto block = tickets.begin(); block != tickets.end(); block += threads) {
            first_of_blocks.push_back(*std::min_element(block, block + threads));
            for (auto warp = block; warp != block + threads; warp += kWarpSize) {
                of_lanes.insert(ranking(&*warp, kWarpSize));
                first_of_warps.push_back(*std::min_element(warp, warp + kWarpSize));
            }
            of_warps.insert(ranking(first_of_warps.data() + first_of_warps.size() - warps, warps));
        }
        for (auto before = tickets.begin(); before != tickets.begin() + blocks * threads; before += threads) {
            require(*std::max_element(before, before + threads) <
                        *std::min_element(before + blocks * threads, before + (blocks + 1) * threads),
                    "a thread passed the barrier before another came");
        }
        std::vector<int> order = ranking(first_of_blocks.data(), blocks);
        std::rotate(order.begin(), std::find(order.begin(), order.end(), 0), order.end());
        of_blocks.insert(order);
    }
    require(of_blocks.size() > 1, "blocks always follow in one order");
    require_equal(of_warps.size(), size_t{6}, "the number of orders of warps");
    require(of_lanes.size() > 50, "lanes follow in few orders");
}

// --- Floating-point modes -------------------------------------------------------------------------------------------

struct Quotient {
    const float* x;
    float* out;
};

__global__ void divide(Quotient args) {
    args.out[0] = args.x[0] / args.x[1];
    sync_block();
    args.out[1] = args.x[0] / args.x[1];
}

void modes(Random&) {
    const float x[2] = {1, 3};
    float out[2] = {};
    fesetround(FE_DOWNWARD);
    launch("divide", divide, {1, 1, nullptr}, {x, out});
    const int after = fegetround();
    fesetround(FE_TONEAREST);
    require_equal(after, FE_DOWNWARD, "the caller's rounding mode after a launch");
    require(out[0] == 0x1.555556p-2f && out[1] == out[0], "the caller's rounding mode shows in a kernel");
    const volatile float one = 1, three = 3;
    require(one / three == out[0], "rounding to nearest");
}

const Registered all[] = {
    {"places of threads and blocks", places},
    {"sums over blocks, in several orders", reductions},
    {"threads that leave before barriers", early_exits},
    {"fresh shared memory", fresh_memory},
    {"asynchronous copies land when waited for", copies},
    {"the seed decides the order", orders},
    {"floating-point modes", modes},
};

}  // namespace
}  // namespace xlayer::selftest
