// ema_scan backward where x is normalized and the rows of a token fit: the two scans of ema_backward.cu by a team of
// threads per token, with the adjoints in shared memory. kPrefetch layers are normalized and summed over the team
// together, because three sums over the row depend on each other in every layer.
#include "cuda/aggregate/common.cuh"

namespace xlayer::cuda::aggregate {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kElements = 8;       // of a row in a thread
constexpr int64_t kMaxRuns = 528;  // so that the partial sums of the norm's gradients stay few
template <class T>
constexpr int kPrefetch = sizeof(T) == 2 ? 3 : 2;  // layers whose rows are on their way together

// Shared memory, in numbers: gates, weight and bias, the teams' sums, the gates' sums of each warp; then A.
__host__ __device__ __forceinline__ int64_t elements_before_adjoints(const EmaScan& s) {
    return round_up(round_up(2 * s.layers, 16) + 2 * s.width + team_elements(kThreads) + kWarps * s.layers, 16);
}

template <class T, int V>
class RowThread {
    using A = Accumulator<T>;
    static constexpr int K = kElements / V;
    struct Row {
        Vector<T, V> at[K];
    };

  public:
    __device__ __forceinline__ RowThread(const EmaBackwardPlan& plan, A* shared)
        : plan_(plan),
          s_(plan.args.scan),
          layers_(static_cast<int>(s_.layers)),
          gates_(reinterpret_cast<Gate<A>*>(shared)),
          weight_(shared + round_up(2 * layers_, 16)),
          bias_(weight_ + s_.width),
          team_(plan.lanes, bias_ + s_.width),
          gate_sums_(bias_ + s_.width + team_elements(kThreads)),
          adjoints_(shared + elements_before_adjoints(s_) + threadIdx.x * kSplit<A, V>) {
        stage_gates(s_, gates_);
        stage_row<V>(static_cast<const A*>(s_.norm_weight), s_.width, weight_);
        stage_row<V>(static_cast<const A*>(s_.norm_bias), s_.width, bias_);
        for (int64_t i = threadIdx.x; i < kWarps * layers_; i += kThreads) gate_sums_[i] = 0;
        sync_block();
    }

    __device__ __forceinline__ void run() {
        const int64_t teams = kThreads / team_.lanes;
        for (int64_t first = blockIdx.x * teams; first < s_.tokens; first += gridDim.x * teams) {
            token_ = first + team_.index;
            end_ = token_ < s_.tokens ? static_cast<int>(s_.width) : 0;
            scan_adjoints();
            scan_states();
        }
        write_gates();
        write_norm();
    }

  private:
    __device__ __forceinline__ int column(int k) const { return (k * team_.lanes + team_.lane) * V; }
    __device__ __forceinline__ bool inside(int k) const { return column(k) < end_; }
    __device__ __forceinline__ A* stored_adjoint(int layer, int k) const {
        return adjoints_ + (layer * K + k) * (kThreads * V);
    }

    __device__ __forceinline__ void fetch(const LayerRows& rows, int layer, bool given, Row& to) const {
        const T* const from = static_cast<const T*>(rows.data) + layer * rows.layer_stride + token_ * rows.token_stride;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            to.at[k] = Vector<T, V>{};
            if (given && inside(k)) to.at[k] = load_vec<V>(from + column(k));
        }
    }
    __device__ __forceinline__ void fetch_grad(int layer, Row& to) const {
        fetch(plan_.args.grad, layer, layer >= 0 && (!s_.last_only || layer == layers_ - 1), to);
    }

    __device__ __forceinline__ void scan_adjoints() {
        A adjoint[K][V] = {}, keep = 0;  // keep: of the layer above
        Row grads[kPrefetch<T>];
#pragma unroll
        for (int i = 0; i < kPrefetch<T>; ++i) fetch_grad(layers_ - 1 - i, grads[i]);
        for (int first = layers_ - 1; first >= 0; first -= kPrefetch<T>) {
#pragma unroll
            for (int i = 0; i < kPrefetch<T>; ++i) {
                const int layer = first - i;
                if (layer < 0) break;
                const Row grad = grads[i];
                fetch_grad(layer - kPrefetch<T>, grads[i]);
#pragma unroll
                for (int k = 0; k < K; ++k) {
#pragma unroll
                    for (int v = 0; v < V; ++v) adjoint[k][v] = fma(keep, adjoint[k][v], widen(grad.at[k].at[v]));
                    store_split<V>(stored_adjoint(layer, k), kThreads * kSplit<A, V>, adjoint[k]);
                }
                keep = gates_[layer].keep;
            }
        }
        if (plan_.args.grad_initial_state == nullptr) return;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (!inside(k)) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) adjoint[k][v] *= keep;
            store_narrow<T, V>(static_cast<T*>(plan_.args.grad_initial_state) + token_ * s_.width + column(k),
                               adjoint[k]);
        }
    }

    // With the states less the norm's bias, S − b, of which each is (1 − σ)·(S − b) + σ·w·x̂, and n − S is w·x̂ − (S −
    // b).
    __device__ __forceinline__ void scan_states() {
        A state[K][V], bias[V];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const T* const initial_state = static_cast<const T*>(s_.initial_state) + token_ * s_.width + column(k);
            load_wide<T, V>(initial_state, s_.initial_state != nullptr && inside(k), state[k]);
            if (!inside(k)) continue;
            load_staged<V>(bias_, s_.width, column(k), bias);
#pragma unroll
            for (int v = 0; v < V; ++v) state[k][v] -= bias[v];
        }
        Row taps[kPrefetch<T>];
#pragma unroll
        for (int i = 0; i < kPrefetch<T>; ++i) fetch(s_.x, i, i < layers_, taps[i]);
        for (int first = 0; first < layers_; first += kPrefetch<T>) {
            A normal[kPrefetch<T>][K][V], inverse[kPrefetch<T>], sums[kPrefetch<T> * 3] = {};
#pragma unroll
            for (int i = 0; i < kPrefetch<T>; ++i) {
                const int next = first + kPrefetch<T> + i;
#pragma unroll
                for (int k = 0; k < K; ++k) widen_all<T, V>(taps[i].at[k], normal[i][k]);
                fetch(s_.x, next, next < layers_, taps[i]);
            }
            normalize(normal, inverse);
#pragma unroll
            for (int i = 0; i < kPrefetch<T>; ++i) {
                if (first + i >= layers_) break;
                add_products(first + i, normal[i], state, sums + i * 3);
            }
            team_.add(sums);
#pragma unroll
            for (int i = 0; i < kPrefetch<T>; ++i) {
                if (first + i >= layers_) break;
                write_grad(first + i, normal[i], inverse[i], sums + i * 3);
                add_gate_sum(first + i, sums[i * 3 + 2]);
            }
        }
    }

    // Several layers' rows together, so that their sums over the team share the way. In the taps, 0 outside; out their
    // norm without weight and bias, of no meaning outside, and 1/deviation.
    __device__ __forceinline__ void normalize(A (&rows)[kPrefetch<T>][K][V], A (&inverse)[kPrefetch<T>]) {
        A sum[kPrefetch<T>] = {}, sums[kPrefetch<T> * 2] = {};
        for_rows([&](int i, int k, int v) { sum[i] += rows[i][k][v]; });
        team_.add(sum);
#pragma unroll
        for (int i = 0; i < kPrefetch<T>; ++i) sum[i] /= static_cast<A>(s_.width);
        for_rows([&](int i, int k, int v) {
            rows[i][k][v] = inside(k) ? rows[i][k][v] - sum[i] : A(0);
            sums[i * 2] += rows[i][k][v];
            sums[i * 2 + 1] = fma(rows[i][k][v], rows[i][k][v], sums[i * 2 + 1]);
        });
        team_.add(sums);
#pragma unroll
        for (int i = 0; i < kPrefetch<T>; ++i) {
            const Norm<A> norm = norm_of(sums[i * 2], sums[i * 2 + 1], s_.width, s_.eps);
            inverse[i] = norm.inverse, sum[i] = norm.shift;
        }
        for_rows([&](int i, int k, int v) { rows[i][k][v] = fma(rows[i][k][v], inverse[i], sum[i]); });
    }
    template <class F>
    __device__ __forceinline__ static void for_rows(const F& f) {
#pragma unroll
        for (int i = 0; i < kPrefetch<T>; ++i) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int v = 0; v < V; ++v) f(i, k, v);
            }
        }
    }

    // One layer further with the state; to `sum` what the thread has of ⟨1, w·∂L/∂n⟩, of ⟨norm, w·∂L/∂n⟩ and of
    // ⟨A, n − S⟩.
    __device__ __forceinline__ void add_products(int layer, const A (&normal)[K][V], A (&state)[K][V], A* sum) {
        const Gate<A> gate = gates_[layer];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (!inside(k)) continue;
            A adjoint[V], weight[V];
            load_split<V>(stored_adjoint(layer, k), kThreads * kSplit<A, V>, adjoint);
            load_staged<V>(weight_, s_.width, column(k), weight);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const A value = normal[k][v] * weight[v], incoming = gate.take * adjoint[v];
                const A inner = incoming * weight[v];
                sum[0] += inner;
                sum[1] = fma(inner, normal[k][v], sum[1]);
                sum[2] = fma(adjoint[v], value - state[k][v], sum[2]);
                weight_sum_[k][v] = fma(incoming, normal[k][v], weight_sum_[k][v]);
                bias_sum_[k][v] += incoming;
                state[k][v] = fma(gate.keep, state[k][v], gate.take * value);
            }
        }
    }

    __device__ __forceinline__ void write_grad(int layer, const A (&normal)[K][V], A inverse, const A* sum) const {
        T* const to = static_cast<T*>(plan_.args.grad_x) + (layer * s_.tokens + token_) * s_.width;
        const A mean = sum[0] / static_cast<A>(s_.width), slope = sum[1] / static_cast<A>(s_.width);
        const A take = gates_[layer].take;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (!inside(k)) continue;
            A grad[V], weight[V];
            load_split<V>(stored_adjoint(layer, k), kThreads * kSplit<A, V>, grad);
            load_staged<V>(weight_, s_.width, column(k), weight);
#pragma unroll
            for (int v = 0; v < V; ++v) grad[v] = inverse * (take * grad[v] * weight[v] - mean - normal[k][v] * slope);
            store_narrow<T, V>(to + column(k), grad);
        }
    }

    // A team's sum, to the gate's sum of the team's first warp, or of the warp that has several teams.
    __device__ __forceinline__ void add_gate_sum(int layer, A product) {
        for (int mask = team_.lanes; mask < kWarpSize; mask *= 2) product += shuffle_xor(product, mask);
        const int first_of = team_.lanes < kWarpSize ? kWarpSize : team_.lanes;
        if (threadIdx.x % first_of == 0) gate_sums_[threadIdx.x / kWarpSize * layers_ + layer] += product;
    }

    __device__ __forceinline__ void write_gates() {
        sync_block();
        for (int layer = threadIdx.x; layer < layers_; layer += kThreads) {
            A sum = 0;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += gate_sums_[w * layers_ + layer];
            static_cast<A*>(plan_.gate_partials)[blockIdx.x * layers_ + layer] = sum;
        }
    }

    // The block's gradients of weight and bias: the teams add what they have to the staged rows, one after another.
    __device__ __forceinline__ void write_norm() {
        A* const to = static_cast<A*>(plan_.norm_partials) + blockIdx.x * 2 * s_.width;
        const int teams = kThreads / team_.lanes;
        for (int team = 0; team < teams; ++team) {
            sync_block();
            if (team != team_.index) continue;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (column(k) >= s_.width) continue;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const int e = column(k) + v;
                    weight_[e] = (team > 0 ? weight_[e] : A(0)) + weight_sum_[k][v];
                    bias_[e] = (team > 0 ? bias_[e] : A(0)) + bias_sum_[k][v];
                }
            }
        }
        sync_block();
        for (int64_t e = threadIdx.x; e < s_.width; e += kThreads) to[e] = weight_[e], to[s_.width + e] = bias_[e];
    }

    const EmaBackwardPlan& plan_;
    const EmaScan& s_;
    const int layers_;
    Gate<A>* const gates_;
    A *const weight_, *const bias_;
    Team<A> team_;
    A *const gate_sums_, *const adjoints_;
    int64_t token_ = 0;
    int end_ = 0;  // of the row; 0 where there is no token
    A weight_sum_[K][V] = {}, bias_sum_[K][V] = {};
};

template <class T, int V>
constexpr int kBlocks = sizeof(T) == 8 || V == 1 ? 1 : 2;  // on a multiprocessor

// resources: ema_scan_norm_backward_kernel<*, 1> threads 256, registers 255, shared 101376, occupancy 0.125
// resources: ema_scan_norm_backward_kernel<double, *> threads 256, registers 255, shared 101376, occupancy 0.125
// resources: ema_scan_norm_backward_kernel threads 256, registers 128, shared 101376, occupancy 0.125
// sass: ema_scan_norm_backward_kernel<*, [!1]> LDG.128, STG.128
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<T, V>) ema_scan_norm_backward_kernel(EmaBackwardPlan plan) {
    RowThread<T, V>(plan, shared_memory<Accumulator<T>>()).run();
}

}  // namespace

bool ema_norm_backward_fits(EmaBackwardPlan* plan) {
    const EmaScan& s = plan->args.scan;
    if (s.width > kElements * kThreads) return false;
    const int64_t bytes = s.dtype == DType::float64 ? 8 : 4;
    const int64_t numbers = elements_before_adjoints(s) + s.layers * kElements * kThreads;
    if (numbers * bytes > max_shared_bytes("ema_scan_norm_backward")) return false;
    plan->shared_bytes = static_cast<size_t>(numbers * bytes);
    plan->lanes = team_lanes(s.width, kElements, kThreads);
    plan->blocks = plan->runs = min_size(ceil_div(s.tokens, kThreads / plan->lanes), kMaxRuns);
    return true;
}

void ema_norm_backward(const EmaBackwardPlan& plan, void* stream) {
    const EmaScan& s = plan.args.scan;
    const LayerRows &x = s.x, &grad = plan.args.grad;
    dispatch_dtype(s.dtype, [&](auto element) {
        using T = decltype(element);
        const bool vectors = vector_length<T>(x.data, x.layer_stride, x.token_stride, s.width) > 1 &&
                             vector_length<T>(grad.data, grad.layer_stride, grad.token_stride) > 1 &&
                             vector_length<T>(s.initial_state) > 1;
        launch("ema_scan_norm_backward",
               vectors ? ema_scan_norm_backward_kernel<T, 16 / sizeof(T)> : ema_scan_norm_backward_kernel<T, 1>,
               {plan.blocks, kThreads, stream, plan.shared_bytes}, plan);
    });
}

}  // namespace xlayer::cuda::aggregate
