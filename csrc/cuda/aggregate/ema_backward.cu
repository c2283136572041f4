// ema_scan backward (xlayer/aggregate.h). With the adjoint A_l = ∂L/∂S_l,
//   A_l = grad_l + (1 − σ(a_{l+1}))·A_{l+1},  ∂L/∂n_l = σ(a_l)·A_l,  ∂L/∂a_l = σ'(a_l)·Σ ⟨A_l, n_l − S_{l−1}⟩,
// where n_l is the tap or its norm. A thread has one vector: a scan down the layers reads grad and stores A; a scan up
// reads x, has S in registers and writes grad_x.
//
// A stays in shared memory; where a block's A does not fit, it goes through the workspace.
//
// With norm, ema_norm_backward.cu has whole rows. Where they do not fit, the rows' statistics and means come first
// (ema_rows.cu) and the kernel here follows.
#include "cuda/aggregate/common.cuh"

namespace xlayer::cuda::aggregate {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPrefetch = 4;             // layers whose rows are on their way together
constexpr int64_t kTargetBlocks = 1056;  // of all launches, so that sums fall the same way on every device

// One thread's vector, over one token (without norm) or a run of them.
template <class T, int V, bool kNorm>
class VectorThread {
    using A = Accumulator<T>;

  public:
    __device__ __forceinline__ VectorThread(const EmaBackwardPlan& plan, A* shared)
        : plan_(plan),
          s_(plan.args.scan),
          gate_sums_(shared + threadIdx.x / kWarpSize * s_.layers),
          gates_(reinterpret_cast<Gate<A>*>(shared + round_up(kWarps * s_.layers, 2))) {
        for (int64_t i = threadIdx.x; i < kWarps * s_.layers; i += kThreads) shared[i] = 0;
        stage_gates(s_, gates_);
        A* const stored_adjoint = plan.adjoints == nullptr
                                      ? shared + round_up((kWarps + 2) * s_.layers + 1, 16)
                                      : static_cast<A*>(plan.adjoints) + blockIdx.x * s_.layers * kThreads * V;
        adjoints_ = stored_adjoint + static_cast<int>(threadIdx.x) * kSplit<A, V>;
        sync_block();
    }

    // All of the block's: item by item, which are 128 vectors of the tokens, or 128 vectors of a row and a run of
    // tokens.
    __device__ __forceinline__ void run() {
        const int64_t vectors = s_.width / V, tiles = ceil_div(kNorm ? vectors : s_.tokens * vectors, kThreads);
        for (int64_t item = blockIdx.x; item < tiles * plan_.runs; item += gridDim.x) {
            const int64_t at = item % tiles * kThreads + threadIdx.x, run = item / tiles;
            if constexpr (kNorm) {
                inside_ = at < vectors, e_ = at * V;
                begin_norm();
                const int64_t first = run * plan_.run_tokens, last = first + plan_.run_tokens;
                for (token_ = first; token_ < last && token_ < s_.tokens; ++token_) scan_adjoints(), scan_states();
                finish_norm(run);
            } else {
                inside_ = at < s_.tokens * vectors;
                token_ = at / vectors, e_ = at % vectors * V;
                scan_adjoints();
                scan_states();
            }
        }
    }

  private:
    __device__ __forceinline__ const T* place(const LayerRows& rows, int64_t layer) const {
        return static_cast<const T*>(rows.data) + layer * rows.layer_stride + token_ * rows.token_stride + e_;
    }
    __device__ __forceinline__ A* stored_adjoint(int64_t layer) const { return adjoints_ + layer * (kThreads * V); }

    __device__ __forceinline__ void begin_norm() {
#pragma unroll
        for (int v = 0; v < V; ++v) weight_[v] = bias_[v] = weight_sum_[v] = bias_sum_[v] = 0;
        if (!inside_) return;
        load_split<V>(static_cast<const A*>(s_.norm_weight) + e_, kSplit<A, V>, weight_);
        if (s_.norm_bias != nullptr) load_split<V>(static_cast<const A*>(s_.norm_bias) + e_, kSplit<A, V>, bias_);
    }
    __device__ __forceinline__ void finish_norm(int64_t run) const {
        if (!inside_) return;
        A* const to = static_cast<A*>(plan_.norm_partials) + run * 2 * s_.width + e_;
        store_split<V>(to, kSplit<A, V>, weight_sum_);
        store_split<V>(to + s_.width, kSplit<A, V>, bias_sum_);
    }

    __device__ __forceinline__ void scan_adjoints() {
        A adjoint[V] = {}, keep = 0;  // keep: of the layer above
        for (int64_t first = s_.layers - 1; first >= 0; first -= kPrefetch) {
            Vector<T, V> grads[kPrefetch];
#pragma unroll
            for (int i = 0; i < kPrefetch; ++i) {
                const bool given = inside_ && first >= i && (!s_.last_only || first - i == s_.layers - 1);
                grads[i] = Vector<T, V>{};
                if (given) grads[i] = load_vec<V>(place(plan_.args.grad, first - i));
            }
#pragma unroll
            for (int i = 0; i < kPrefetch; ++i) {
                if (first < i) break;
#pragma unroll
                for (int v = 0; v < V; ++v) adjoint[v] = fma(keep, adjoint[v], widen(grads[i].at[v]));
                store_split<V>(stored_adjoint(first - i), kThreads * kSplit<A, V>, adjoint);
                keep = gates_[first - i].keep;
            }
        }
        if (plan_.args.grad_initial_state == nullptr || !inside_) return;
#pragma unroll
        for (int v = 0; v < V; ++v) adjoint[v] *= keep;
        store_narrow<T, V>(static_cast<T*>(plan_.args.grad_initial_state) + token_ * s_.width + e_, adjoint);
    }

    __device__ __forceinline__ void scan_states() {
        A state[V];
        load_wide<T, V>(static_cast<const T*>(s_.initial_state) + token_ * s_.width + e_,
                        s_.initial_state != nullptr && inside_, state);
        for (int64_t first = 0; first < s_.layers; first += kPrefetch) {
            Vector<T, V> taps[kPrefetch];
#pragma unroll
            for (int i = 0; i < kPrefetch; ++i) {
                taps[i] = Vector<T, V>{};
                if (inside_ && first + i < s_.layers) taps[i] = load_vec<V>(place(s_.x, first + i));
            }
#pragma unroll
            for (int i = 0; i < kPrefetch; ++i) {
                if (first + i >= s_.layers) break;
                step_state(first + i, taps[i], state);
            }
        }
    }

    __device__ __forceinline__ void step_state(int64_t layer, const Vector<T, V>& tap, A (&state)[V]) {
        const Gate<A> gate = gates_[layer];
        A adjoint[V], value[V], product = 0;
        load_split<V>(stored_adjoint(layer), kThreads * kSplit<A, V>, adjoint);
        widen_all<T, V>(tap, value);
        if constexpr (kNorm) {
            normalize(layer, gate.take, value, adjoint, product, state);
        } else {
#pragma unroll
            for (int v = 0; v < V; ++v) product = fma(adjoint[v], value[v] - state[v], product);
        }
        if (!inside_) product = 0;
#pragma unroll
        for (int mask = kWarpSize / 2; mask > 0; mask /= 2) product += shuffle_xor(product, mask);
        if (threadIdx.x % kWarpSize == 0) gate_sums_[layer] += product;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            state[v] = fma(gate.keep, state[v], gate.take * value[v]);
            if constexpr (!kNorm) adjoint[v] *= gate.take;
        }
        if (!inside_) return;
        T* const to = static_cast<T*>(plan_.args.grad_x) + (layer * s_.tokens + token_) * s_.width + e_;
        store_narrow<T, V>(to, adjoint);
    }

    // value: in the tap, out its norm; adjoint: in A, out ∂L/∂x.
    __device__ __forceinline__ void normalize(int64_t layer, A take, A (&value)[V], A (&adjoint)[V], A& product,
                                              const A (&state)[V]) {
        const int64_t row = layer * s_.tokens + token_;
        const RowNorm<A> norm = RowNorm<A>::load_of(plan_.statistics, row);
        const Vector<A, 2> means = load_vec<2>(static_cast<const A*>(plan_.row_means) + row * 2);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A normal = norm(value[v]), incoming = take * adjoint[v];
            value[v] = fma(normal, weight_[v], bias_[v]);
            product = fma(adjoint[v], value[v] - state[v], product);
            weight_sum_[v] = fma(incoming, normal, weight_sum_[v]);
            bias_sum_[v] += incoming;
            adjoint[v] = norm.inverse * (incoming * weight_[v] - means.at[0] - normal * means.at[1]);
        }
    }

    const EmaBackwardPlan& plan_;
    const EmaScan& s_;
    A *const gate_sums_, *adjoints_;
    Gate<A>* const gates_;
    int64_t token_ = 0, e_ = 0;
    bool inside_ = false;
    A weight_[V], bias_[V], weight_sum_[V], bias_sum_[V];
};

// The block's partial sums of the gates' gradients, from what its warps have.
template <class A>
__device__ __forceinline__ void write_gates(const EmaBackwardPlan& plan, const A* sums) {
    sync_block();
    const int64_t layers = plan.args.scan.layers;
    for (int64_t layer = threadIdx.x; layer < layers; layer += kThreads) {
        A sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += sums[w * layers + layer];
        static_cast<A*>(plan.gate_partials)[blockIdx.x * layers + layer] = sum;
    }
}

// resources: ema_scan_backward_kernel threads 128, registers 128, shared 101376, occupancy 0.0625
// sass: ema_scan_backward_kernel<*, [!1], *> LDG.128, STG.128
template <class T, int V, bool kNorm>
__global__ void __launch_bounds__(kThreads, 4) ema_scan_backward_kernel(EmaBackwardPlan plan) {
    using A = Accumulator<T>;
    A* const shared = shared_memory<A>();
    VectorThread<T, V, kNorm>(plan, shared).run();
    write_gates(plan, shared);
}

// --- Launches --------------------------------------------------------------------------------------------------------

// Sizes of the call as the kernels see them, and its arrays.
template <class T, int V>
EmaBackwardPlan make_plan(const EmaScanBackward& args, Workspace& space) {
    using A = Accumulator<T>;
    EmaBackwardPlan plan{};
    plan.args = args;
    const EmaScan& s = args.scan;
    plan.runs = 1, plan.run_tokens = s.tokens;
    plan.whole_rows = s.normalize && ema_norm_backward_fits(&plan);
    if (!plan.whole_rows) {
        const int64_t tiles = ceil_div((s.normalize ? 1 : s.tokens) * (s.width / V), kThreads);
        if (s.normalize) {
            plan.runs = min_size(ceil_div(kTargetBlocks, tiles), s.tokens);
            plan.run_tokens = ceil_div(s.tokens, plan.runs);
            plan.runs = ceil_div(s.tokens, plan.run_tokens);
            plan.statistics = space.take<A>(s.layers, s.tokens, kStatistics);
            plan.row_means = space.take<A>(s.layers, s.tokens, 2);
        }
        plan.blocks = min_size(tiles * plan.runs, kTargetBlocks);
        plan.shared_bytes = round_up((kWarps + 2) * s.layers + 1, 16) * sizeof(A);
        const int64_t adjoints = s.layers * kThreads * V * static_cast<int64_t>(sizeof(A));
        if (static_cast<int64_t>(plan.shared_bytes) + adjoints <= max_shared_bytes("ema_scan_backward")) {
            plan.shared_bytes += adjoints;
        } else {
            plan.adjoints = space.take<char>(plan.blocks, adjoints);
            if (space.base == nullptr) plan.adjoints = nullptr;
        }
    }
    plan.gate_partials = space.take<A>(plan.blocks, s.layers);
    if (s.normalize) plan.norm_partials = space.take<A>(plan.runs, 2, s.width);
    return plan;
}

template <class T, int V>
void backward(const EmaScanBackward& args, void* stream) {
    Workspace space(args.workspace);
    const EmaBackwardPlan plan = make_plan<T, V>(args, space);
    const EmaScan& s = args.scan;
    if (plan.whole_rows) {
        ema_norm_backward(plan, stream);
    } else {
        if (s.normalize) ema_statistics(s, plan.statistics, stream), ema_row_means(plan, stream);
        launch("ema_scan_backward",
               s.normalize ? ema_scan_backward_kernel<T, V, true> : ema_scan_backward_kernel<T, V, false>,
               {plan.blocks, kThreads, stream, plan.shared_bytes}, plan);
    }
    const DType wide = s.dtype == DType::float64 ? DType::float64 : DType::float32;
    using A = Accumulator<T>;
    finish_columns({wide, plan.gate_partials, plan.blocks, s.layers, s.layers, s.gate_logits, args.grad_gate_logits},
                   stream);
    const A* const norm = static_cast<const A*>(plan.norm_partials);
    if (args.grad_norm_weight != nullptr)
        finish_columns({wide, norm, plan.runs, s.width, 2 * s.width, nullptr, args.grad_norm_weight}, stream);
    if (args.grad_norm_bias != nullptr)
        finish_columns({wide, norm + s.width, plan.runs, s.width, 2 * s.width, nullptr, args.grad_norm_bias}, stream);
}

// Calls f(arguments, V) with V a type of so many elements that every access may take.
template <class F>
void dispatch_vector_length(EmaScanBackward args, const F& f) {
    EmaScan& s = args.scan;
    // Without norm a layer's tokens that follow each other are one long row.
    if (!s.normalize && s.x.token_stride == s.width && args.grad.token_stride == s.width)
        s.width *= s.tokens, s.tokens = 1;
    dispatch_dtype(s.dtype, [&](auto element) {
        using T = decltype(element);
        using A = Accumulator<T>;
        constexpr int full = 16 / sizeof(T);
        const bool vectors = vector_length<T>(s.x.data, s.x.layer_stride, s.x.token_stride, s.width) > 1 &&
                             vector_length<T>(args.grad.data, args.grad.layer_stride, args.grad.token_stride) > 1 &&
                             vector_length<T>(s.initial_state) > 1 && vector_length<A>(s.norm_weight) > 1 &&
                             vector_length<A>(s.norm_bias) > 1;
        vectors ? f(args, Vector<T, full>{}) : f(args, Vector<T, 1>{});
    });
}

}  // namespace

int64_t ema_scan_backward_workspace(const EmaScanBackward& args) {
    Workspace space(nullptr);
    dispatch_vector_length(args, [&](const EmaScanBackward& seen, auto vector) {
        using T = std::decay_t<decltype(vector.at[0])>;
        make_plan<T, sizeof(vector) / sizeof(T)>(seen, space);
    });
    return space.bytes;
}

void ema_scan_backward(const EmaScanBackward& args, void* stream) {
    dispatch_vector_length(args, [&](const EmaScanBackward& seen, auto vector) {
        using T = std::decay_t<decltype(vector.at[0])>;
        backward<T, sizeof(vector) / sizeof(T)>(seen, stream);
    });
}

}  // namespace xlayer::cuda::aggregate
