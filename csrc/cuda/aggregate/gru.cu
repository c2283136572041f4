// depth_gru (xlayer/aggregate.h): one layer's gates between matrix products, elementwise, and their backward. A thread
// per vector of a token.
#include "cuda/aggregate/common.cuh"

namespace xlayer::cuda::aggregate {
namespace {

constexpr int kThreads = 256;

// resources: gru_step_kernel threads 256, registers 128, shared 0, occupancy 0.25
// sass: gru_step_kernel<*, [!1]> LDG.128, only STG.128
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) gru_step_kernel(GruStep args) {
    using A = Accumulator<T>;
    const int64_t d = args.width, vectors = d / V, step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < args.tokens * vectors;
         at += step) {
        const int64_t token = at / vectors, e = at % vectors * V;
        const T* const from_input = static_cast<const T*>(args.from_input) + token * args.input_stride + e;
        const T* const from_state = static_cast<const T*>(args.from_state) + token * 3 * d + e;
        A input[3][V], state[3][V], previous[V], bias[V];
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) {
            load_wide<T, V>(from_input + gate * d, true, input[gate]);
            load_wide<T, V>(from_state + gate * d, args.from_state != nullptr, state[gate]);
        }
        load_wide<T, V>(static_cast<const T*>(args.previous) + token * d + e, args.previous != nullptr, previous);
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) {
            load_wide<T, V>(static_cast<const T*>(args.bias_ih) + gate * d + e, true, bias);
#pragma unroll
            for (int v = 0; v < V; ++v) input[gate][v] += bias[v];
            load_wide<T, V>(static_cast<const T*>(args.bias_hh) + gate * d + e, true, bias);
#pragma unroll
            for (int v = 0; v < V; ++v) state[gate][v] += bias[v];
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
            input[0][v] = sigmoid(input[0][v] + state[0][v]);
            input[1][v] = sigmoid(input[1][v] + state[1][v]);
            input[2][v] = tanh(fma(input[0][v], state[2][v], input[2][v]));
            previous[v] = fma(1 - input[1][v], input[2][v], input[1][v] * previous[v]);
        }
        store_narrow<T, V>(static_cast<T*>(args.state) + token * d + e, previous);
        if (args.gates == nullptr) continue;
        T* const gates = static_cast<T*>(args.gates) + token * 4 * d + e;
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) store_narrow<T, V>(gates + gate * d, input[gate]);
        store_narrow<T, V>(gates + 3 * d, state[2]);
    }
}

// resources: gru_step_backward_kernel threads 256, registers 64, shared 0, occupancy 0.5
// sass: gru_step_backward_kernel<*, [!1]> LDG.128, only STG.128
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4) gru_step_backward_kernel(GruStepBackward args) {
    using A = Accumulator<T>;
    const int64_t d = args.width, vectors = d / V, step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < args.tokens * vectors;
         at += step) {
        const int64_t token = at / vectors, e = at % vectors * V;
        const T* const gates = static_cast<const T*>(args.gates) + token * 4 * d + e;
        T* const direct = static_cast<T*>(args.direct) + token * d + e;
        const bool above = args.product != nullptr;
        A grad[V], carry[V], product[V], previous[V], reset[V], update[V], candidate[V], inner[V];
        load_wide<T, V>(static_cast<const T*>(args.grad) + token * args.grad_stride + e, true, grad);
        load_wide<T, V>(direct, above, carry);
        load_wide<T, V>(static_cast<const T*>(args.product) + token * d + e, above, product);
        load_wide<T, V>(gates, true, reset);
        load_wide<T, V>(gates + d, true, update);
        load_wide<T, V>(gates + 2 * d, true, candidate);
        load_wide<T, V>(gates + 3 * d, true, inner);
        load_wide<T, V>(static_cast<const T*>(args.previous) + token * d + e, args.previous != nullptr, previous);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A r = reset[v], z = update[v], n = candidate[v];
            grad[v] += carry[v] + product[v];
            carry[v] = z * grad[v];
            const A of_n = (1 - z) * grad[v] * (1 - n * n);
            update[v] = grad[v] * (previous[v] - n) * z * (1 - z);
            reset[v] = of_n * inner[v] * r * (1 - r);
            inner[v] = of_n * r;
            candidate[v] = of_n;
        }
        T* const inside = static_cast<T*>(args.inside) + token * 4 * d + e;
        store_narrow<T, V>(direct, carry);
        store_narrow<T, V>(inside, candidate);
        store_narrow<T, V>(inside + d, reset);
        store_narrow<T, V>(inside + 2 * d, update);
        store_narrow<T, V>(inside + 3 * d, inner);
    }
}

template <class Args>
Launch launch_of(const Args& args, int length, void* stream) {
    return {min_size(ceil_div(args.tokens * (args.width / length), kThreads), kMaxBlocks), kThreads, stream};
}

}  // namespace

void gru_step(const GruStep& args, void* stream) {
    dispatch_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int full = 16 / sizeof(T);
        const bool vectors = vector_length<T>(args.from_input, args.input_stride, args.width) > 1 &&
                             vector_length<T>(args.from_state) > 1 && vector_length<T>(args.bias_ih) > 1 &&
                             vector_length<T>(args.bias_hh) > 1 && vector_length<T>(args.previous) > 1 &&
                             vector_length<T>(args.state) > 1 && vector_length<T>(args.gates) > 1;
        launch("gru_step", vectors ? gru_step_kernel<T, full> : gru_step_kernel<T, 1>,
               launch_of(args, vectors ? full : 1, stream), args);
    });
}

void gru_step_backward(const GruStepBackward& args, void* stream) {
    dispatch_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int full = 16 / sizeof(T);
        const bool vectors = vector_length<T>(args.grad, args.grad_stride, args.width) > 1 &&
                             vector_length<T>(args.direct) > 1 && vector_length<T>(args.product) > 1 &&
                             vector_length<T>(args.gates) > 1 && vector_length<T>(args.previous) > 1 &&
                             vector_length<T>(args.inside) > 1;
        launch("gru_step_backward", vectors ? gru_step_backward_kernel<T, full> : gru_step_backward_kernel<T, 1>,
               launch_of(args, vectors ? full : 1, stream), args);
    });
}

}  // namespace xlayer::cuda::aggregate
