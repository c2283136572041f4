// Sees every access to memory that kernel code makes, and ends the launch by fault() (emulator.h) at the first one that
// a device would not allow or that another thread's access races with.
//
// The accesses are announced by the compiler, g++. The .cu files, and no other, are compiled with
//   -fsanitize=thread,alignment -g1     (compiling only: neither sanitizer's runtime is linked, checker.cpp stands in)
// and everything else in the library without. In the link the .cu objects come last: where both sides hold the same
// inline function, the linker keeps the first, and the emulator's own code must not be checked. In a build with
// AddressSanitizer the .cu files are compiled with that instead, and no access comes here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xlayer::emulator {

// --- By the scheduler ----------------------------------------------------------------------------------------------

void launch_begins(const char* kernel, int threads);            // what earlier launches did races with nothing
void block_begins(uint64_t block, void* shared, size_t bytes);  // all of its shared memory is unwritten
void block_barrier_passed();                                    // orders what all threads of the block did before it
void warp_barrier_passed(int warp);                             // the same for one warp
void launch_ends();

// --- By instructions, in the name of current_thread() ----------------------------------------------------------------

// One access by the thread; `pc` leads fault() to the source line.
void check_access(const void* address, size_t bytes, bool write, const void* pc, size_t alignment = 1);

// A read by all lanes of the thread's warp at once (a row for load_matrices): what any lane wrote needs a barrier
// first, no matter which of them names the row.
void check_warp_read(const void* address, size_t bytes, const void* pc, size_t alignment = 1);

// An asynchronous copy's destination: written, but not to be touched by anyone until the copy has landed.
void copy_began(const void* shared, size_t bytes, const void* pc);
void copy_landed(const void* shared, size_t bytes);

// --- Global memory that kernels may touch ----------------------------------------------------------------------------

// With none allowed since forget_memory(), every address passes. `name` is what messages call it.
void allow_memory(const void* address, size_t bytes, bool writable, const char* name);
void forget_memory();

}  // namespace xlayer::emulator
