// Softmax of the rows of logits, and its backward from ∂L/∂P to ∂L/∂logit. A warp takes a row and passes over it three
// times (backward in float32 and float64 four).
//
// Backward sums a row's weights again instead of reading the statistics: it passes over the row for Σ_j P_ij ∂L/∂P_ij
// anyway.
#include "cuda/hdim/backward.cuh"

namespace xlayer::cuda::hdim {
namespace {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarpSize;
constexpr int kRowBlocks = 4;  // on a multiprocessor
template <class A>
constexpr int kVec = 16 / sizeof(A);  // logits in one load

template <class A>
__device__ __forceinline__ A add_over_lanes(A x) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// NaN wins, as it must: max would drop it.
template <class A>
__device__ __forceinline__ A max_nan(A a, A b) {
    return a > b || a != a ? a : b;
}

// The largest logit of a row; −inf where no pair is allowed.
template <class A>
__device__ __forceinline__ A max_of_row(const A* logits, int64_t pitch) {
    A top = -infinity<A>();
    for (int64_t j = lane_id() * kVec<A>; j < pitch; j += kWarpSize * kVec<A>) {
        const Vector<A, kVec<A>> some = load_vec<kVec<A>>(logits + j);
#pragma unroll
        for (int n = 0; n < kVec<A>; ++n) top = max_nan(top, some.at[n]);
    }
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) top = max_nan(top, shuffle_xor(top, mask));
    return top == lowest<A>() ? not_a_number<A>() : top;  // all logits −inf: nothing to be divided by
}

template <class T>
struct Softmax {
    using A = Accumulator<T>;
    const A* logits;
    T* probability;
    A *statistics, *row_entropy;
    int64_t rows, pitch;
};

// resources: hdim_softmax_kernel threads 256, registers 64, shared 0, occupancy 0.5
// sass: hdim_softmax_kernel LDG.128
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) hdim_softmax_kernel(Softmax<T> args) {
    using A = Accumulator<T>;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kRowWarps;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize; row < args.rows;
         row += step) {
        const A* const logits = args.logits + row * args.pitch;
        T* const probability = args.probability + row * args.pitch;
        const A top = max_of_row(logits, args.pitch);
        const bool empty = top == -infinity<A>();
        A total = 0, moment = 0;  // Σ w and Σ w·log w of the weights w = exp(logit − top)
        for (int64_t j = lane_id() * kVec<A>; j < args.pitch && !empty; j += kWarpSize * kVec<A>) {
            const Vector<A, kVec<A>> some = load_vec<kVec<A>>(logits + j);
#pragma unroll
            for (int n = 0; n < kVec<A>; ++n) {
                const A shifted = some.at[n] - top, weight = exp(shifted);
                total += weight;
                moment += weight == 0 ? weight : weight * shifted;
            }
        }
        total = add_over_lanes(total);
        moment = add_over_lanes(moment);
        const A inverse = empty ? A(0) : A(1) / total, mean = moment * inverse;
        for (int64_t j = lane_id() * kVec<A>; j < args.pitch; j += kWarpSize * kVec<A>) {
            const Vector<A, kVec<A>> some = load_vec<kVec<A>>(logits + j);
            Vector<T, kVec<A>> out;
#pragma unroll
            for (int n = 0; n < kVec<A>; ++n) {
                const bool allowed = some.at[n] != -infinity<A>();  // in a row with NaN, others stay 0
                out.at[n] = narrow<T>(allowed ? exp(some.at[n] - top) * inverse : A(0));
            }
            store_vec(probability + j, out);
        }
        if (lane_id() == 0) {
            A* const statistics = args.statistics + row * kHdimStatistics;
            statistics[0] = top, statistics[1] = total, statistics[2] = mean;
            args.row_entropy[row] = empty ? A(0) : log(total) - mean;
        }
    }
}

template <class T>
struct SoftmaxBackward {
    using A = Accumulator<T>;
    A* logits;
    T* probability;
    const A* grad_row_entropy;
    int64_t rows, keys, pitch;
};

// resources: hdim_softmax_backward_kernel threads 256, registers 64, shared 0, occupancy 0.5
// sass: hdim_softmax_backward_kernel LDG.128
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) hdim_softmax_backward_kernel(SoftmaxBackward<T> args) {
    using A = Accumulator<T>;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kRowWarps;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize; row < args.rows;
         row += step) {
        A* const logits = args.logits + row * args.pitch;
        T* const probability = args.probability + row * args.keys;
        const A top = max_of_row(logits, args.pitch);
        const bool empty = top == -infinity<A>();
        A total = 0, moment = 0, mean = 0;  // of the weights, of w·log w, and of w·∂L/∂P
        for (int64_t j = lane_id(); j < args.keys && !empty; j += kWarpSize) {
            const A shifted = logits[j] - top, weight = exp(shifted);
            total += weight;
            moment += weight == 0 ? weight : weight * shifted;
            mean += weight == 0 ? weight : weight * widen(probability[j]);
        }
        total = add_over_lanes(total);
        const A inverse = empty ? A(0) : A(1) / total;
        mean = add_over_lanes(mean) * inverse;
        if constexpr (!is_half<T>) {  // what rounding has left of Σ p (∂L/∂P − mean), which is 0, belongs to the mean
            A rest = 0;
            for (int64_t j = lane_id(); j < args.keys && !empty; j += kWarpSize) {
                const A weight = exp(logits[j] - top);
                rest += weight == 0 ? weight : weight * (widen(probability[j]) - mean);
            }
            mean += add_over_lanes(rest) * inverse;
        }
        const A center = add_over_lanes(moment) * inverse;  // of logit − top
        const A grad_entropy = args.grad_row_entropy == nullptr ? A(0) : args.grad_row_entropy[row];
        sync_warp();  // logits change hands: other lanes have read what this one overwrites
        for (int64_t j = lane_id(); j < args.pitch; j += kWarpSize) {
            const A logit = logits[j];
            A p = 0, grad = 0;
            if (logit != -infinity<A>()) {
                p = exp(logit - top) * inverse;
                grad = p * (widen(probability[j]) - mean);
                if (grad_entropy != 0 && p > 0) grad -= p * (logit - top - center) * grad_entropy;
                if (p >= 1) grad = 0;  // alone in its row
            }
            logits[j] = grad;
            if (j < args.keys) probability[j] = narrow<T>(p);
        }
    }
}

}  // namespace

template <class T>
void softmax_backward(const HdimGradPairs& args, const PairSizes& s, void* stream) {
    using A = Accumulator<T>;
    const SoftmaxBackward<T> rows{static_cast<A*>(args.logits),
                                  static_cast<T*>(args.probability),
                                  static_cast<const A*>(args.grad_row_entropy),
                                  s.batch * s.queries,
                                  s.keys,
                                  s.pitch};
    launch("hdim_softmax_backward", hdim_softmax_backward_kernel<T>,
           {ceil_div(rows.rows, kRowWarps), kRowThreads, stream}, rows);
}

template void softmax_backward<double>(const HdimGradPairs&, const PairSizes&, void*);
template void softmax_backward<float>(const HdimGradPairs&, const PairSizes&, void*);
template void softmax_backward<tf32>(const HdimGradPairs&, const PairSizes&, void*);
template void softmax_backward<bfloat16>(const HdimGradPairs&, const PairSizes&, void*);
template void softmax_backward<float16>(const HdimGradPairs&, const PairSizes&, void*);

void softmax(const HdimSoftmax& args, void* stream) {
    const PairSizes s(args.in);
    dispatch_dtype(args.in.dtype, [&](auto element) {
        using T = decltype(element);
        using A = Accumulator<T>;
        const Softmax<T> rows{static_cast<const A*>(args.logits),
                              static_cast<T*>(args.probability),
                              static_cast<A*>(args.statistics),
                              static_cast<A*>(args.row_entropy),
                              s.batch * s.queries,
                              s.pitch};
        launch("hdim_softmax", hdim_softmax_kernel<T>, {ceil_div(rows.rows, kRowWarps), kRowThreads, stream}, rows);
    });
}

}  // namespace xlayer::cuda::hdim
