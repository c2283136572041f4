// The one file with launches, intrinsics and PTX. Kernels are written against it and use nothing else of CUDA but
// __global__, __device__, __launch_bounds__, threadIdx, blockIdx, blockDim and gridDim; shared memory is dynamic, from
// shared_memory(). So the same source also runs on a CPU: with XLAYER_EMULATED, tests/emulator stands in for the
// instructions below and for the CUDA runtime.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "xlayer/profiler.h"
#include "xlayer/types.h"

namespace xlayer::cuda {

constexpr int kWarpSize = 32;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The thread's lane in its warp, in a block of one dimension.
__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// --- Elements -------------------------------------------------------------------------------------------------------

// float32 whose products may be made of factors rounded to tf32.
struct tf32 {
    float value;
    tf32() = default;
    __host__ __device__ __forceinline__ tf32(float x) : value(x) {}
    __host__ __device__ __forceinline__ operator float() const { return value; }
};

template <class T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(tf32 x) { return x.value; }
__device__ __forceinline__ float widen(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(Accumulator<T> x) {
    return x;
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ float16 narrow<float16>(float x) {
    return __float2half_rn(x);
}

// Calls f with a value of the element type that `dtype` names.
template <class F>
void dispatch_dtype(DType dtype, const F& f) {
    switch (dtype) {
        case DType::float64:
            return f(double{});
        case DType::float32:
            return f(float{});
        case DType::bfloat16:
            return f(bfloat16{});
        case DType::float16:
            return f(float16{});
    }
}

// --- Vectors: loaded and stored in one instruction; the address must be a multiple of their size ---------------------

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T at[N];
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vec(const T* from) {
    return *reinterpret_cast<const Vector<T, N>*>(from);
}

// State space of a store's address; generic: shared memory, or either.
enum class Space { global, generic };

// Stores a vector. In global memory vectors of 4, 8 and 16 bytes take one instruction for sure: where a loop is
// unrolled or a value selected, the compiler forgets that the address is aligned and stores the elements one by one.
template <Space S = Space::global, int N, class T>
__device__ __forceinline__ void store_vec(T* to, const Vector<T, N>& value) {
    static_assert(sizeof(value) <= 16, "no instruction stores more than 16 bytes");
#ifndef XLAYER_EMULATED
    constexpr int kWords = sizeof(value) / 4;
    if constexpr (S == Space::global && kWords > 0) {
        union {
            Vector<T, N> value;
            uint32_t at[kWords];
        } bits{value};
        if constexpr (kWords == 4) {
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.at[0]), "r"(bits.at[1]),
                         "r"(bits.at[2]), "r"(bits.at[3])
                         : "memory");
        } else if constexpr (kWords == 2) {
            asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(bits.at[0]), "r"(bits.at[1]) : "memory");
        } else {
            static_assert(kWords == 1, "a vector has 1, 2, 4, 8 or 16 bytes");
            asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(bits.at[0]) : "memory");
        }
        return;
    }
#endif
    *reinterpret_cast<Vector<T, N>*>(to) = value;
}

// The most elements that one access may take: 16 bytes' worth if the address and every stride allow it, else one.
template <class T, class... Strides>
int vector_length(const void* address, Strides... strides) {
    constexpr int full = 16 / sizeof(T);
    const bool aligned = reinterpret_cast<uintptr_t>(address) % 16 == 0 && ((strides % full == 0) && ...);
    return aligned ? full : 1;
}

}  // namespace xlayer::cuda

// --- Instructions ---------------------------------------------------------------------------------------------------

#ifdef XLAYER_EMULATED
#include "instructions.h"  // tests/emulator: everything of this section, on a CPU
#else

namespace xlayer::cuda {

// The block's dynamic shared memory, as many bytes as the launch asked for, aligned to 128. Nothing is in it at first.
template <class T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return reinterpret_cast<T*>(bytes);
}

// Barriers. Every live thread of the block, or of the warp, must arrive at the same one; what they wrote before it is
// seen by the others after it. Shuffles, votes and matrix instructions need all 32 lanes too, but order no memory.
__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Bit l is set where lane l's vote is true.
__device__ __forceinline__ unsigned ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }
__device__ __forceinline__ int popcount(unsigned bits) { return __popc(bits); }

// Lane `lane`'s value; the value of the lane whose number differs in the bits of `mask`. V: int, unsigned, float,
// double.
template <class V>
__device__ __forceinline__ V shuffle(V value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
template <class V>
__device__ __forceinline__ V shuffle_xor(V value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes (both addresses multiples of 16) while the thread goes on. What the thread started before its n-th
// last commit_copies() has landed after its wait_copies<n>(); other threads see it after a barrier that follows.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// N (1, 2 or 4) matrices of 8×8 16-bit elements from shared memory. Lane 8n + r gives the address of row r of matrix n,
// a multiple of 16 (lanes from 8N on give any such address). Lane 4g + t gets elements (g, 2t) and (g, 2t+1) of matrix
// n in to[n], the first in the low half; transposed, elements (2t, g) and (2t+1, g).
template <int N>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[N], const void* row) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
    const unsigned from = shared_address(row);
    if constexpr (N == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(from) : "memory");
    } else if constexpr (N == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1])
                     : "r"(from)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(from)
                     : "memory");
    }
}
template <int N>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[N], const void* row) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
    const unsigned from = shared_address(row);
    if constexpr (N == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(from) : "memory");
    } else if constexpr (N == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1])
                     : "r"(from)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(from)
                     : "memory");
    }
}

// d += a · b on the tensor cores. With g = lane / 4, t = lane % 4, a lane holds of the 16×8 d: (g, 2t), (g, 2t+1),
// (g+8, 2t), (g+8, 2t+1); of the 16×16 a, two to a register: (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..); of the
// 16×8 b: (2t.., g), (2t+8.., g). T says what the registers hold: bfloat16 or float16. Products are exact, sums
// float32.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, bfloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// The same for tf32 operands: a lane holds of the 16×8 a: (g, t), (g+8, t), (g, t+4), (g+8, t+4); of the 8×8 b: (t, g),
// (t+4, g). The registers are float32 bits, of which the hardware reads the upper 19.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// x rounded to tf32 (to nearest, ties away from zero), as float32 bits.
__device__ __forceinline__ uint32_t to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// The same for float64: a lane holds of the 8×8 d: (g, 2t), (g, 2t+1); of the 8×4 a: (g, t); of the 4×8 b: (t, g).
__device__ __forceinline__ void mma_8x8x4(double& d0, double& d1, double a, double b) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+d"(d0), "+d"(d1)
                 : "d"(a), "d"(b));
}

// max(x, 0), NaN if x is: one instruction, where a comparison takes two.
__device__ __forceinline__ float clamp_min_zero(float x) {
    float out;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(out) : "f"(x));
    return out;
}
__device__ __forceinline__ double clamp_min_zero(double x) { return x < 0 ? 0 : x; }

// 1/x within an ulp, where a division takes ten instructions; 0 where it is below the smallest normal number.
__device__ __forceinline__ float reciprocal(float x) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

// a·b + c, rounded once, of two 16-bit elements in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pair_fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out;
    if constexpr (std::is_same_v<T, bfloat16>) {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    } else {
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    }
    return out;
}

// Names the launch to profilers for as long as it lives; to the emulator, in its messages.
using LaunchName = ProfilerRange;

}  // namespace xlayer::cuda

#endif  // XLAYER_EMULATED

namespace xlayer::cuda {

// A float's bits and back, and two elements in one register and back.
__device__ __forceinline__ uint32_t bits_of(float number) {
    union {
        float number;
        uint32_t bits;
    } same{number};
    return same.bits;
}
__device__ __forceinline__ float float_of(uint32_t bits) {
    union {
        uint32_t bits;
        float number;
    } same{bits};
    return same.number;
}
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
    union {
        T at[2];
        uint32_t bits;
    } pair{{narrow<T>(first), narrow<T>(second)}};
    return pair.bits;
}
template <class T>
__device__ __forceinline__ T pair_element(uint32_t pair, int which) {
    union {
        uint32_t bits;
        T at[2];
    } both{pair};
    return both.at[which];
}

// --- Launches -------------------------------------------------------------------------------------------------------

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Shared memory that a block may have on the current device.
inline int max_shared_bytes(const char* what) {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), what);
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
    return bytes;
}

struct Launch {
    int64_t blocks;  // x; of more than 2^31 − 1 the kernel must loop over the rest
    int threads;
    void* stream;
    size_t shared_bytes = 0;
    int64_t blocks_y = 1;
};

// Queues kernel(args). No blocks, no launch.
template <class Args>
void launch(const char* name, void (*kernel)(Args), const Launch& how, const Args& args) {
    if (how.blocks == 0 || how.blocks_y == 0) return;
    constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;
    constexpr size_t kDefaultSharedBytes = 48 * 1024;
    const LaunchName named(name);
    if (how.shared_bytes > kDefaultSharedBytes) {
        // Always as much as there is: the attribute is the kernel's, and another thread may launch it meanwhile.
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   max_shared_bytes(name)),
              name);
    }
    cudaLaunchConfig_t config{};
    config.gridDim =
        dim3(static_cast<unsigned>(how.blocks < kMaxGrid ? how.blocks : kMaxGrid), static_cast<unsigned>(how.blocks_y));
    config.blockDim = dim3(static_cast<unsigned>(how.threads));
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = static_cast<cudaStream_t>(how.stream);
    check(cudaLaunchKernelEx(&config, kernel, args), name);
}

}  // namespace xlayer::cuda
