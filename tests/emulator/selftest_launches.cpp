// Launches that must not go through: what a device would refuse, and kernels that would hang or destroy something.
#include "selftest.h"

namespace xlayer::selftest {
namespace {

// --- Limits ---------------------------------------------------------------------------------------------------------

struct Nothing {};

__global__ void do_nothing(Nothing) {}
__global__ void do_nothing_either(Nothing) {}

struct Shape {
    dim3 grid, block;
    size_t shared_bytes;
};

cudaError_t try_launch(const Shape& shape, void (*kernel)(Nothing) = do_nothing) {
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    return cudaLaunchKernelEx(&config, kernel, Nothing{});
}

void require_refused(const Shape& shape, cudaError_t error, const std::string& message) {
    require_equal(try_launch(shape), error, "the error instead of: " + message);
    const std::string got = cudaGetErrorString(error);
    require(got.find(message) != std::string::npos, "'" + message + "' is not in: " + got);
    require_equal(cudaGetLastError(), error, "the last error");
    require_equal(cudaGetLastError(), cudaSuccess, "the last error, asked for again");
}

void limits(Random&) {
    const auto refused = [](const dim3& grid, const dim3& block, const std::string& message) {
        require_refused({grid, block, 0}, cudaErrorInvalidConfiguration, message);
    };
    refused(dim3(0), dim3(32), "grid.x is 0");
    refused(dim3(1, 0), dim3(32), "grid.y is 0");
    refused(dim3(1u << 31), dim3(32), "grid.x is 2147483648, the most is 2147483647");
    refused(dim3(1, 70000), dim3(32), "grid.y is 70000, the most is 65535");
    refused(dim3(1, 1, 65536), dim3(32), "grid.z is 65536, the most is 65535");
    refused(dim3(1), dim3(0), "block.x is 0");
    refused(dim3(1), dim3(1025), "block.x is 1025, the most is 1024");
    refused(dim3(1), dim3(1, 1, 65), "block.z is 65, the most is 64");
    refused(dim3(1), dim3(32, 33), "the number of threads is 1056, the most is 1024");
    require_refused({dim3(1), dim3(32), 48 * 1024 + 1}, cudaErrorInvalidValue, "is 49153 bytes, the most is 49152");
    require_equal(try_launch({dim3(65536, 2), dim3(1), 0}), cudaSuccess, "a large grid");
    require_equal(try_launch({dim3(1, 1, 65535), dim3(2), 0}), cudaSuccess, "a deep grid");
    require_equal(try_launch({dim3(1), dim3(1024), 48 * 1024}), cudaSuccess, "a full block");
}

void asking_for_shared_memory(Random&) {
    const auto* kernel = reinterpret_cast<const void*>(do_nothing_either);
    const auto ask = [&](int bytes) {
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    int most = 0;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "most");
    require_equal(most, 99 * 1024, "the most shared memory");
    const auto launched = [](int bytes) {
        return try_launch({dim3(1), dim3(1), static_cast<size_t>(bytes)}, do_nothing_either);
    };
    require_equal(launched(most), cudaErrorInvalidValue, "a launch that did not ask");
    require_equal(ask(most + 1), cudaErrorInvalidValue, "asking for too much");
    require_equal(ask(60000), cudaSuccess, "asking");
    require_equal(launched(60000), cudaSuccess, "a launch that asked");
    require_equal(launched(60001), cudaErrorInvalidValue, "a launch with more than it asked for");
    require_equal(try_launch({dim3(1), dim3(1), 60000}), cudaErrorInvalidValue, "another kernel");
    require_error([&] { launch("greedy", do_nothing, {1, 32, nullptr, 100 * 1024}, Nothing{}); },
                  {"greedy: dynamic shared memory is 102400 bytes, the most is 101376"});
}

// --- Kernels that would hang ----------------------------------------------------------------------------------------

enum class Mistake {
    two_barriers,
    barrier_and_shuffle,
    lane_left_before_ballot,
    warp_not_full,
    two_shuffles,
    two_warp_barriers,
    product_and_barrier,
    none,
};

template <Mistake mistake>
__global__ void hang(Nothing) {
    const unsigned i = threadIdx.x;
    if constexpr (mistake == Mistake::two_barriers) {
        if (i < 40) {
            sync_block();
        } else {
            sync_block();
        }
    } else if constexpr (mistake == Mistake::barrier_and_shuffle) {
        if (i != 5) {
            sync_block();
        } else {
            shuffle(1, 0);
        }
    } else if constexpr (mistake == Mistake::lane_left_before_ballot) {
        if (i == 7 || i == 9) return;
        ballot(true);
    } else if constexpr (mistake == Mistake::warp_not_full) {
        ballot(true);
    } else if constexpr (mistake == Mistake::two_shuffles) {
        if (i % 2 == 0) {
            shuffle(1.0f, 0);
        } else {
            shuffle(2.0f, 0);
        }
    } else if constexpr (mistake == Mistake::two_warp_barriers) {
        if (i % 4 == 0) {
            sync_warp();
        } else {
            sync_warp();
        }
    } else if constexpr (mistake == Mistake::product_and_barrier) {
        double d[2] = {};
        if (i < kWarpSize) {
            mma_8x8x4(d[0], d[1], 1, 1);
            sync_block();
        } else if (i % 2 == 0) {
            mma_8x8x4(d[0], d[1], 1, 1);
        }
    }
}

template <Mistake mistake>
void require_stopped(Random& random, int threads, const std::vector<std::string>& parts) {
    with_schedules(random, [&] {
        const auto run = [&] { launch("hang", hang<mistake>, {3, threads, nullptr}, Nothing{}); };
        require_error(run, parts);
        require_error(run, {"hang: ", "(block ", ", thread ", "tests/emulator/selftest_launches.cpp:"});
        // Nothing of it is left over.
        launch("hang", hang<Mistake::none>, {3, threads, nullptr}, Nothing{});
    });
}

void hangs(Random& random) {
    require_stopped<Mistake::two_barriers>(
        random, 64, {"divergent barrier: barrier at ", " of 64 live threads, the others wait in barrier at "});
    require_stopped<Mistake::barrier_and_shuffle>(
        random, 64, {"barrier at ", "reached by 63 of 64 live threads, the others wait in shuffle at "});
    require_stopped<Mistake::lane_left_before_ballot>(
        random, 96, {"ballot at ", "reached by 30 of 32 lanes of warp 0, lane 7 and 1 more have exited"});
    require_stopped<Mistake::warp_not_full>(random, 40,
                                            {"ballot at ", "reached by 8 of 32 lanes of warp 1, which has no more"});
    require_stopped<Mistake::two_shuffles>(
        random, 32, {"shuffle at ", "reached by 16 of 32 live threads, the others wait in shuffle at "});
    require_stopped<Mistake::two_warp_barriers>(
        random, 32, {"warp barrier at ", " of 32 live threads, the others wait in warp barrier at "});
    require_stopped<Mistake::product_and_barrier>(
        random, 64, {"mma_8x8x4 at ", "reached by 16 of 32 lanes of warp 1, lane 1 and 15 more have exited"});
}

// More failures than a process could map stacks for, were any lost.
void many_hangs(Random&) {
    for (int i = 0; i < 1500; ++i) {
        const auto run = [] {
            launch("hang", hang<Mistake::lane_left_before_ballot>, {1, kWarpSize, nullptr}, Nothing{});
        };
        require_error(run, {"hang: ballot at "});
    }
}

// --- Wrong addresses ------------------------------------------------------------------------------------------------

struct Addresses {
    alignas(16) float x[8];
    float* out;
};

enum class Wrong { copy_to_global, copy_from_shared, copy_unaligned, copy_forgotten, row_in_global, row_unaligned };

template <Wrong wrong>
__global__ void use_address(Addresses* args) {
    auto* shared = shared_memory<float>();
    shared[threadIdx.x] = 0;
    sync_block();
    uint32_t loaded[1];
    if constexpr (wrong == Wrong::copy_to_global) copy_async(args->x, args->x + 4);
    if constexpr (wrong == Wrong::copy_from_shared) copy_async(shared, shared + 4);
    if constexpr (wrong == Wrong::copy_unaligned) copy_async(shared + 1, args->x);
    if constexpr (wrong == Wrong::copy_forgotten) {
        if (threadIdx.x == 3) copy_async(shared + 12, args->x);
        commit_copies();
        wait_copies<1>();
    }
    if constexpr (wrong == Wrong::row_in_global) load_matrices(loaded, args->x);
    if constexpr (wrong == Wrong::row_unaligned) load_matrices(loaded, shared + 2);
}

template <Wrong wrong>
void require_wrong(const std::vector<std::string>& parts) {
    Addresses memory{};
    const auto run = [&] {
        launch("address", use_address<wrong>, {1, kWarpSize, nullptr, kWarpSize * sizeof(float)}, &memory);
    };
    require_error(run, parts);
    require_error(run, {"address: ", "(block 0, thread ", "selftest_launches.cpp:"});
    launch("nothing", do_nothing, {1, kWarpSize, nullptr}, Nothing{});
}

void wrong_addresses(Random&) {
    require_wrong<Wrong::copy_to_global>({"copy_async with address ", "is not in shared memory"});
    require_wrong<Wrong::copy_from_shared>({"copy_async with address ", "is in shared memory, not in global"});
    require_wrong<Wrong::copy_unaligned>({"misaligned copy_async with address ", "is not a multiple of 16"});
    require_wrong<Wrong::copy_forgotten>({"1 asynchronous copy is in flight when the thread exits", "thread 3"});
    require_wrong<Wrong::row_in_global>({"load_matrices with address ", "is not in shared memory"});
    require_wrong<Wrong::row_unaligned>({"misaligned load_matrices with address ", "is not a multiple of 16"});
}

#if !XLAYER_EMULATOR_ASAN  // which ends the process at these

UNSEEN int fill_stack(int depth) {
    volatile char frame[1024];
    frame[0] = static_cast<char>(depth);
    return depth == 0 ? frame[0] : fill_stack(depth - 1) + frame[0];
}

struct Depth {
    int frames;  // of a KiB
    int* out;
};

__global__ void recurse(Depth args) {
    sync_block();
    args.out[threadIdx.x] = fill_stack(args.frames);
    sync_block();
}

void stacks(Random& random) {
    std::vector<int> out(kWarpSize);
    launch("recurse", recurse, {1, kWarpSize, nullptr}, {16, out.data()});
    require_error([&] { launch("recurse", recurse, {1, kWarpSize, nullptr}, {1000, out.data()}); },
                  {"recurse: stack overflow", "(block 0, thread ", "selftest_launches.cpp:"});
    with_schedules(random, [&] { launch("recurse", recurse, {1, kWarpSize, nullptr}, {16, out.data()}); });
}

UNSEEN void write_to(int* address) { *address = 1; }

struct Target {
    int* address;
};

__global__ void write_far(Target args) {
    if (threadIdx.x == 2) write_to(args.address);
}

void invalid_addresses(Random&) {
    const auto run = [](uintptr_t address) {
        launch("far", write_far, {1, kWarpSize, nullptr}, {reinterpret_cast<int*>(address)});
    };
    require_error([&] { run(0x10); },
                  {"far: access to invalid address 0x10 (block 0, thread 2, ", "selftest_launches"});
    int valid = 0;
    run(reinterpret_cast<uintptr_t>(&valid));
    require_equal(valid, 1, "what was written");
}

#endif

const Registered all[] = {
    {"limits of launches", limits},
    {"asking for shared memory", asking_for_shared_memory},
    {"threads that wait for what never comes", hangs},
    {"nothing is lost in many failures", many_hangs},
    {"addresses that instructions do not take", wrong_addresses},
#if !XLAYER_EMULATOR_ASAN
    {"full stacks", stacks},
    {"invalid addresses", invalid_addresses},
#endif
};

}  // namespace
}  // namespace xlayer::selftest
