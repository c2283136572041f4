// First half of hyper's backward: from ∂L/∂x and ∂L/∂c to ∂L/∂z. The products ⟨h'_j, ∂L/∂x⟩ take a block per token,
// with h' recomputed; the coefficients' gradients take one lane per token and stream.
#include "cuda/hyper/backward.cuh"
#include "cuda/hyper/logits.cuh"

namespace xlayer::cuda::hyper {
namespace {

constexpr int kDotWarps = 4;
constexpr int kDotThreads = kDotWarps * kWarpSize;
template <class T, int N>
constexpr int kDotElements = N == 0 ? 1 : (N == 8 ? 8 : 16) / sizeof(T);

template <class A, int N>
struct DotShared {
    double partial[kDotWarps * kMaxStreamsOf<N>], sum[kMaxStreamsOf<N>];
    A post[kMaxCoefficientsOf<N>];
};

struct Dots {
    BackwardPlan plan;
    bool vec_in, vec_branch, vec_x;
};

// A block per token.
// resources: hyper_backward_dots_kernel threads 128, registers 128, shared 3072, occupancy 0.25
// sass: hyper_backward_dots_kernel LDG
template <class T, int N>
__global__ void __launch_bounds__(kDotThreads, 4) hyper_backward_dots_kernel(Dots dots) {
    using A = Accumulator<T>;
    constexpr int V = kDotElements<T, N>;
    DotShared<A, N>& shared = *shared_memory<DotShared<A, N>>();
    const HyperBackward& args = dots.plan.args;
    const HyperSizes& size = args.size;
    const int n = streams_of<N>(size), thread = static_cast<int>(threadIdx.x), num_coefficients = n * (n + 2);
    for (int64_t token = blockIdx.x; token < tokens_of(size); token += gridDim.x) {
        sync_block();  // the token before is done with shared memory
        if (dots.plan.post) {
            const A* post =
                static_cast<const A*>(args.post.coefficients) + (args.post.shared ? 0 : token * num_coefficients);
            for (int at = thread; at < num_coefficients; at += kDotThreads) shared.post[at] = post[at];
            sync_block();
        }
        const T* const in = static_cast<const T*>(args.in.data) + token_offset(size, args.in.stride, token);
        const int64_t of_y = dots.plan.post ? token_offset(size, args.post.branch.stride, token) : 0;
        const T* const grad = static_cast<const T*>(args.grad_branch_input.data) +
                              token_offset(size, args.grad_branch_input.stride, token);
        A sum[kMaxStreamsOf<N>] = {};
        for (int64_t e = static_cast<int64_t>(thread) * V; e < size.width; e += kDotThreads * V) {
            const int64_t count = size.width - e;
            const Vector<T, V> x = read<V>(grad + e, count, dots.vec_x);
            Vector<T, V> h[kMaxStreamsOf<N>];
            A y[V] = {};
#pragma unroll
            for (int j = 0; j < kMaxStreamsOf<N>; ++j) {
                if (N != 0 || j < n) h[j] = read<V>(in + j * args.in.stride[2] + e, count, dots.vec_in);
            }
            if (dots.plan.post)
                read_branch<T>(size.branch_dtype, args.post.branch.data, of_y + e, count, dots.vec_branch, y);
#pragma unroll
            for (int j = 0; j < kMaxStreamsOf<N>; ++j) {
                if (N == 0 && j >= n) continue;
                const Vector<T, V> next = dots.plan.post ? mix<T, N>(n, j, shared.post, h, y) : h[j];
#pragma unroll
                for (int v = 0; v < V; ++v) sum[j] = fma(widen(next.at[v]), widen(x.at[v]), sum[j]);
            }
        }
        double wide[kMaxStreamsOf<N>];  // what cancels here is all there is of some gradients
#pragma unroll
        for (int j = 0; j < kMaxStreamsOf<N>; ++j) wide[j] = sum[j];
        sum_over_block<kMaxStreamsOf<N>, kDotWarps>(wide, shared.partial, shared.sum);
        sync_block();
        if (thread < n) static_cast<A*>(dots.plan.dots)[token * n + thread] = static_cast<A>(shared.sum[thread]);
    }
}

// One lane's row j of a token's coefficients: z_jm and its gradients, for m < n+2.
template <class A, int N>
class TokenRow {
  public:
    // Sums of gradients, of few numbers and with much that cancels.
    double base[kMaxStreamsOf<N> + 2] = {}, scale[kMaxStreamsOf<N> + 2] = {}, bias[kMaxStreamsOf<N> + 2] = {};

    __device__ __forceinline__ TokenRow(const BackwardPlan& plan)
        : plan_(plan),
          args_(plan.args),
          n_(streams_of<N>(args_.size)),
          columns_(n_ + 2),
          j_(lane_id() % kTokenLanes<N>),
          group_(static_cast<int>(threadIdx.x) / kTokenLanes<N>) {}

    // All lanes of a warp must come here together, with a token or without.
    __device__ __forceinline__ void add(int64_t token, bool has_token, CoefficientShared<A, N>& shared, A* history) {
        const bool real = has_token && j_ < n_;
        const int64_t row = (token * n_ + j_) * columns_;
        const A* const z = static_cast<const A*>(args_.logits) + row;  // read again rather than kLaneSums in registers
        A grad[kMaxStreamsOf<N> + 2] = {};
        if (real) {
            const A* const grad_c = static_cast<const A*>(args_.grad_coefficients);
#pragma unroll
            for (int m = 0; m < kMaxStreamsOf<N> + 2; ++m) {
                if (!used(m)) continue;
                if (grad_c != nullptr) grad[m] = grad_c[row + m];
            }
            grad[0] += static_cast<const A*>(plan_.dots)[token * n_ + j_];
        }
        if (plan_.dynamic && is_constrained(args_.connection)) {
            constrained(real, z, grad, shared.grad[group_], history);
        } else {
            plain(real, z, grad);
        }
        write_record(token, real, z, grad);
    }

  private:
    __device__ __forceinline__ bool used(int m) const { return N != 0 || m < columns_; }

    // grad: in ∂L/∂c, out ∂L/∂z.
    __device__ __forceinline__ void plain(bool real, const A* z, A (&grad)[kMaxStreamsOf<N> + 2]) {
        if (!real) return;
        const bool tanh_form = args_.connection.form == HyperForm::tanh;
#pragma unroll
        for (int m = 0; m < kMaxStreamsOf<N> + 2; ++m) {
            if (!used(m)) continue;
            base[m] += grad[m];
            if (!plan_.dynamic) continue;
            const CoefficientParameters<A> params(args_.connection, j_ * columns_ + m, columns_);
            const A in = z[m] + params.bias, act = tanh_form ? tanh(in) : in;
            scale[m] += static_cast<double>(grad[m]) * act;
            grad[m] *= params.scale * (tanh_form ? A(1) - act * act : A(1));
            bias[m] += grad[m];
        }
    }

    __device__ __forceinline__ void constrained(bool real, const A* z, A (&grad)[kMaxStreamsOf<N> + 2], A* matrix_grad,
                                                A* history) {
        A factor[kMaxStreamsOf<N> + 2] = {};
        if (real) {
#pragma unroll
            for (int m = 0; m < kMaxStreamsOf<N> + 2; ++m) {
                if (!used(m)) continue;
                const CoefficientParameters<A> params(args_.connection, j_ * columns_ + m, columns_);
                const A a = params.base + params.scale * z[m];
                factor[m] = params.scale;
                if (m == 0 || m == columns_ - 1) {
                    const A s = sigmoid(a);
                    grad[m] *= (m == 0 ? A(1) : A(2)) * s * (A(1) - s);
                } else {
                    history[j_ * n_ + m - 1] = a;
                    matrix_grad[j_ * n_ + m - 1] = grad[m];
                }
            }
        }
        Sinkhorn<A>(args_.connection, n_, j_, real).backward(history, matrix_grad);
        if (!real) return;
#pragma unroll
        for (int m = 0; m < kMaxStreamsOf<N> + 2; ++m) {
            if (!used(m)) continue;
            if (m > 0 && m < columns_ - 1) grad[m] = matrix_grad[j_ * n_ + m - 1];
            base[m] += grad[m];
            scale[m] += static_cast<double>(grad[m]) * z[m];
            grad[m] *= factor[m];
        }
    }

    // Stores the token's record for the streams' kernel.
    __device__ __forceinline__ void write_record(int64_t token, bool real, const A* z,
                                                 const A (&grad)[kMaxStreamsOf<N> + 2]) {
        const HyperNorm norm = args_.connection.norm;
        A* const record = static_cast<A*>(plan_.records) + token * record_size(n_);
        if (!plan_.dynamic) {
            if (real) record[kPre * n_ + j_] = static_cast<const A*>(args_.connection.base)[j_ * columns_];
            return;
        }
        A along = 0, level = 0, mean = 0, rest = 0, inverse = 0;  // ⟨∂L/∂norm(h), norm(h)⟩ and the sum of ∂L/∂norm(h)
        if (real) {
            const A* const statistics = static_cast<const A*>(args_.statistics) + (token * n_ + j_) * kHyperStatistics;
            mean = statistics[0], rest = statistics[1], inverse = statistics[2];
        }
#pragma unroll
        for (int m = 0; m < kMaxStreamsOf<N> + 2; ++m) {
            if (!used(m) || !real) continue;
            along = fma(grad[m], z[m], along);
            if (norm == HyperNorm::layer) level = fma(grad[m], static_cast<const A*>(plan_.weight_sum)[m], level);
            record[kLogits * n_ + j_ * columns_ + m] = grad[m] * inverse;
        }
        A width = static_cast<A>(args_.size.width);
        if (plan_.all) {
            width *= static_cast<A>(n_);
#pragma unroll
            for (int mask = kTokenLanes<N> / 2; mask > 0; mask /= 2) along += shuffle_xor(along, mask);
        }
        if (!real) return;
        record[kPre * n_ + j_] = static_cast<const A*>(args_.coefficients)[(token * n_ + j_) * columns_];
        record[kMean * n_ + j_] = mean;
        record[kRest * n_ + j_] = rest;
        record[kSlope * n_ + j_] = -inverse * inverse * along / width;
        record[kLevel * n_ + j_] = norm == HyperNorm::layer ? -inverse * level / width : A(0);
    }

    const BackwardPlan& plan_;
    const HyperBackward& args_;
    int n_, columns_, j_, group_;
};

// Sums one gradient over the warp's lanes with the same j; the lanes of the first token store it.
template <int N>
__device__ __forceinline__ void add_tokens(const double (&sum)[kMaxStreamsOf<N> + 2], int n, double* to) {
    const int j = lane_id() % kTokenLanes<N>;
#pragma unroll
    for (int m = 0; m < kMaxStreamsOf<N> + 2; ++m) {
        double total = sum[m];
#pragma unroll
        for (int mask = kTokenLanes<N>; mask < kWarpSize; mask *= 2) total += shuffle_xor(total, mask);
        if (lane_id() < n && (N != 0 || m < n + 2)) to[j * (n + 2) + m] = total;
    }
}

// resources: hyper_backward_coefficients_kernel threads 128, registers 255, shared 94208, occupancy 0.0625
// sass: hyper_backward_coefficients_kernel LDG, STG
template <class A, int N>
__global__ void __launch_bounds__(kCoefficientWarps* kWarpSize, N == 0 ? 1 : 2)
    hyper_backward_coefficients_kernel(BackwardPlan plan) {
    CoefficientShared<A, N>& shared = *shared_memory<CoefficientShared<A, N>>();
    const int n = streams_of<N>(plan.args.size), warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int group = static_cast<int>(threadIdx.x) / kTokenLanes<N>;
    A* history =
        static_cast<A*>(plan.histories) + static_cast<int64_t>(blockIdx.x) * kCoefficientTokens<N> * plan.history;
    if (plan.history_shared) history = reinterpret_cast<A*>(shared_memory<char>() + sizeof(CoefficientShared<A, N>));
    history += group * plan.history;

    TokenRow<A, N> row(plan);
    const int64_t first = blockIdx.x * plan.coefficient_run_tokens, tokens = tokens_of(plan.args.size);
    const int64_t last = first + plan.coefficient_run_tokens < tokens ? first + plan.coefficient_run_tokens : tokens;
    for (int64_t token = first; token < last; token += kCoefficientTokens<N>)
        row.add(token + group, token + group < last, shared, history);

    double* const partial = shared.partial[warp];
    const int num_coefficients = n * (n + 2);
    add_tokens<N>(row.base, n, partial);
    add_tokens<N>(row.scale, n, partial + num_coefficients);
    add_tokens<N>(row.bias, n, partial + 2 * num_coefficients);
    sync_block();
    double* const to =
        static_cast<double*>(plan.coefficient_partials) + static_cast<int64_t>(blockIdx.x) * 3 * num_coefficients;
    for (int at = static_cast<int>(threadIdx.x); at < 3 * num_coefficients; at += kCoefficientWarps * kWarpSize) {
        double sum = 0;
        for (int w = 0; w < kCoefficientWarps; ++w) sum += shared.partial[w][at];
        to[at] = sum;
    }
}

template <class T, int N>
void launch_dots(const BackwardPlan& plan, void* stream) {
    constexpr int V = kDotElements<T, N>;
    const HyperBackward& args = plan.args;
    const bool vectorized = args.size.width % V == 0;
    const Dots dots{plan, vectorized && aligned(args.in, sizeof(T), V),
                    vectorized && aligned(args.post.branch, element_size(args.size.branch_dtype), V),
                    vectorized && aligned(args.grad_branch_input, sizeof(T), V)};
    launch("hyper_backward_dots", hyper_backward_dots_kernel<T, N>,
           {args.size.tokens(), kDotThreads, stream, sizeof(DotShared<Accumulator<T>, N>)}, dots);
}

template <class A, int N>
void launch_coefficients(const BackwardPlan& plan, void* stream) {
    const int64_t history = plan.history_shared ? kCoefficientTokens<N> * plan.history * sizeof(A) : 0;
    launch("hyper_backward_coefficients", hyper_backward_coefficients_kernel<A, N>,
           {plan.coefficient_runs, kCoefficientWarps * kWarpSize, stream,
            sizeof(CoefficientShared<A, N>) + static_cast<size_t>(history)},
           plan);
}

}  // namespace

void backward_coefficients(const BackwardPlan& plan, void* stream) {
    const HyperBackward& args = plan.args;
    if (plan.dynamic && args.connection.norm == HyperNorm::layer)
        sum_weights(args.size, args.connection.weight, plan.weight_sum, stream);
    dispatch_dtype(args.size.dtype, [&](auto element) {
        using T = decltype(element);
        dispatch_streams(args.size.streams, [&](auto n) { launch_dots<T, decltype(n)::value>(plan, stream); });
    });
    const auto num_coefficients = [&](auto accumulator) {
        using A = decltype(accumulator);
        dispatch_streams(args.size.streams, [&](auto n) { launch_coefficients<A, decltype(n)::value>(plan, stream); });
    };
    args.size.dtype == DType::float64 ? num_coefficients(double{}) : num_coefficients(float{});
}

}  // namespace xlayer::cuda::hyper
