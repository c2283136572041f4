// ema_scan's backward where x is normalized and the rows of a token fit: the walks of aggregate_ema_backward.cu, taken
// by a team of threads per token. A row's A stays in shared memory, 32 bytes of float32 a thread and layer (8 KB a
// block), so L = 24 leaves an H100 or H200 one block, 8 warps, to a multiprocessor. Bytes as without norm, 3L·d. A
// layer takes three sums over the team one after another, some 800 cycles, in which two blocks read and write 16
// KB: 4.8 TB/s over all multiprocessors with two blocks each, 2.4 TB/s with one. Predicted, of the limit: 0.75 and more
// up to L = 13; at L = 24 0.8 on an H100, 0.6 on an H200.
#include "aggregate.cuh"

namespace xlayer::cuda {
namespace {

using namespace aggregate;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kElements = 8;          // of a row in a thread
constexpr int64_t kRunsAtMost = 528;  // so that the partial sums of the norm's gradients stay few
template <class T>
constexpr int kAhead = sizeof(T) == 2 ? 4 : 2;  // layers whose rows are on their way together

template <class T, int V>
class RowThread {
    using A = Accumulator<T>;
    static constexpr int K = kElements / V;
    struct Row {
        Vector<T, V> at[K];
    };

  public:
    // shared: weight and bias [width], the teams' sums, the gates' sums [warps, layers], A
    __device__ __forceinline__ RowThread(const EmaBackward& with, A* shared)
        : with_(with),
          s_(with.args.scan),
          weight_(shared),
          bias_(weight_ + s_.width),
          team_(with.lanes, bias_ + s_.width),
          gate_sums_(bias_ + s_.width + team_numbers(kThreads)),
          adjoints_(shared + round_up(2 * s_.width + team_numbers(kThreads) + kWarps * s_.layers, 16)) {
        stage_row<V>(static_cast<const A*>(s_.norm_weight), s_.width, weight_);
        stage_row<V>(static_cast<const A*>(s_.norm_bias), s_.width, bias_);
        for (int64_t i = threadIdx.x; i < kWarps * s_.layers; i += kThreads) gate_sums_[i] = 0;
        sync_block();
    }

    __device__ __forceinline__ void run() {
        const int64_t teams = kThreads / team_.lanes;
        for (int64_t first = blockIdx.x * teams; first < s_.tokens; first += gridDim.x * teams) {
            token_ = first + team_.index;
            end_ = token_ < s_.tokens ? static_cast<int>(s_.width) : 0;
            walk_down();
            walk_up();
        }
        write_gates();
        write_norm();
    }

  private:
    __device__ __forceinline__ int column(int k) const { return (k * team_.lanes + team_.lane) * V; }
    __device__ __forceinline__ bool inside(int k) const { return column(k) < end_; }
    __device__ __forceinline__ A* kept(int64_t layer, int k) const {
        return adjoints_ + (layer * K + k) * (kThreads * V) + static_cast<int>(threadIdx.x) * kPiece<A, V>;
    }

    __device__ __forceinline__ void fetch(const LayerRows& rows, int64_t layer, bool given, Row& to) const {
        const T* const from = static_cast<const T*>(rows.data) + layer * rows.layer_stride + token_ * rows.token_stride;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            to.at[k] = Vector<T, V>{};
            if (given && inside(k)) to.at[k] = load<V>(from + column(k));
        }
    }
    __device__ __forceinline__ void fetch_grad(int64_t layer, Row& to) const {
        fetch(with_.args.grad, layer, layer >= 0 && (!s_.last_only || layer == s_.layers - 1), to);
    }

    __device__ __forceinline__ void walk_down() {
        A adjoint[K][V] = {}, keep = 0;  // keep: of the layer above
        Row grads[kAhead<T>];
#pragma unroll
        for (int i = 0; i < kAhead<T>; ++i) fetch_grad(s_.layers - 1 - i, grads[i]);
        for (int64_t first = s_.layers - 1; first >= 0; first -= kAhead<T>) {
#pragma unroll
            for (int i = 0; i < kAhead<T>; ++i) {
                const int64_t layer = first - i;
                if (layer < 0) break;
                const Row grad = grads[i];
                fetch_grad(layer - kAhead<T>, grads[i]);
#pragma unroll
                for (int k = 0; k < K; ++k) {
#pragma unroll
                    for (int v = 0; v < V; ++v) adjoint[k][v] = fma(keep, adjoint[k][v], widen(grad.at[k].at[v]));
                    store_pieces<V>(kept(layer, k), kThreads * kPiece<A, V>, adjoint[k]);
                }
                keep = gate_of<A>(s_.gate_logits, layer).keep;
            }
        }
        if (with_.args.grad_initial == nullptr) return;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (!inside(k)) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) adjoint[k][v] *= keep;
            store_narrow<T, V>(static_cast<T*>(with_.args.grad_initial) + token_ * s_.width + column(k), adjoint[k]);
        }
    }

    __device__ __forceinline__ void walk_up() {
        A state[K][V];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const T* const initial = static_cast<const T*>(s_.initial) + token_ * s_.width + column(k);
            load_wide<T, V>(initial, s_.initial != nullptr && inside(k), state[k]);
        }
        Row taps[kAhead<T>];
#pragma unroll
        for (int i = 0; i < kAhead<T>; ++i) fetch(s_.x, i, i < s_.layers, taps[i]);
        for (int64_t first = 0; first < s_.layers; first += kAhead<T>) {
#pragma unroll
            for (int i = 0; i < kAhead<T>; ++i) {
                const int64_t layer = first + i;
                if (layer >= s_.layers) break;
                const Row tap = taps[i];
                fetch(s_.x, layer + kAhead<T>, layer + kAhead<T> < s_.layers, taps[i]);
                step_up(layer, tap, state);
            }
        }
    }

    // The normalized row, 0 outside of it; returns 1/deviation.
    __device__ __forceinline__ A normalize(const Row& tap, A (&normal)[K][V]) {
        A sum[1] = {};
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int v = 0; v < V; ++v) sum[0] += normal[k][v] = widen(tap.at[k].at[v]);
        }
        team_.add(sum);
        const A count = static_cast<A>(s_.width), mean = sum[0] / count;
        sum[0] = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                normal[k][v] = inside(k) ? normal[k][v] - mean : A(0);
                sum[0] = fma(normal[k][v], normal[k][v], sum[0]);
            }
        }
        team_.add(sum);
        const A inverse = 1 / sqrt(sum[0] / count + static_cast<A>(s_.eps));
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int v = 0; v < V; ++v) normal[k][v] *= inverse;
        }
        return inverse;
    }

    __device__ __forceinline__ void step_up(int64_t layer, const Row& tap, A (&state)[K][V]) {
        const Gate<A> gate = gate_of<A>(s_.gate_logits, layer);
        A normal[K][V], inner[K][V];  // inner: w·∂L/∂n
        const A inverse = normalize(tap, normal);
        A sum[3] = {};  // of inner, of inner · normal, and of A·(n − S)
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (!inside(k)) continue;
            A adjoint[V], weight[V], bias[V];
            load_pieces<V>(kept(layer, k), kThreads * kPiece<A, V>, adjoint);
            load_staged<V>(weight_, s_.width, column(k), weight);
            load_staged<V>(bias_, s_.width, column(k), bias);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const A value = fma(normal[k][v], weight[v], bias[v]), incoming = gate.take * adjoint[v];
                sum[2] = fma(adjoint[v], value - state[k][v], sum[2]);
                weight_sum_[k][v] = fma(incoming, normal[k][v], weight_sum_[k][v]);
                bias_sum_[k][v] += incoming;
                inner[k][v] = incoming * weight[v];
                sum[0] += inner[k][v];
                sum[1] = fma(inner[k][v], normal[k][v], sum[1]);
                state[k][v] = fma(gate.keep, state[k][v], gate.take * value);
            }
        }
        add_to_gate(layer, sum);
        T* const to = static_cast<T*>(with_.args.grad_x) + (layer * s_.tokens + token_) * s_.width;
        const A mean = sum[0] / static_cast<A>(s_.width), slope = sum[1] / static_cast<A>(s_.width);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (!inside(k)) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) inner[k][v] = inverse * (inner[k][v] - mean - normal[k][v] * slope);
            store_narrow<T, V>(to + column(k), inner[k]);
        }
    }

    // Sums over the team, and the third to the gate's sum of its first warp, or of the warp that has several teams.
    __device__ __forceinline__ void add_to_gate(int64_t layer, A (&sum)[3]) {
        team_.add(sum);
        A product = sum[2];
        for (int mask = team_.lanes; mask < kWarp; mask *= 2) product += shuffle_xor(product, mask);
        const int first_of = team_.lanes < kWarp ? kWarp : team_.lanes;
        if (threadIdx.x % first_of == 0) gate_sums_[threadIdx.x / kWarp * s_.layers + layer] += product;
    }

    __device__ __forceinline__ void write_gates() {
        sync_block();
        for (int64_t layer = threadIdx.x; layer < s_.layers; layer += kThreads) {
            A sum = 0;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += gate_sums_[w * s_.layers + layer];
            static_cast<A*>(with_.gate_partials)[blockIdx.x * s_.layers + layer] = sum;
        }
    }

    // The block's gradients of weight and bias: the teams add what they have to the staged rows, one after another.
    __device__ __forceinline__ void write_norm() {
        A* const to = static_cast<A*>(with_.norm_partials) + blockIdx.x * 2 * s_.width;
        const int teams = kThreads / team_.lanes;
        for (int turn = 0; turn < teams; ++turn) {
            sync_block();
            if (turn != team_.index) continue;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (column(k) >= s_.width) continue;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const int e = column(k) + v;
                    weight_[e] = (turn > 0 ? weight_[e] : A(0)) + weight_sum_[k][v];
                    bias_[e] = (turn > 0 ? bias_[e] : A(0)) + bias_sum_[k][v];
                }
            }
        }
        sync_block();
        for (int64_t e = threadIdx.x; e < s_.width; e += kThreads) to[e] = weight_[e], to[s_.width + e] = bias_[e];
    }

    const EmaBackward& with_;
    const EmaScan& s_;
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
__global__ void __launch_bounds__(kThreads, (kBlocks<T, V>)) ema_scan_norm_backward_kernel(EmaBackward with) {
    RowThread<T, V>(with, shared_memory<Accumulator<T>>()).run();
}

}  // namespace

bool aggregate::ema_norm_backward_fits(EmaBackward* with) {
    const EmaScan& s = with->args.scan;
    if (s.width > kElements * kThreads) return false;
    const int64_t bytes = s.dtype == DType::float64 ? 8 : 4;
    const int64_t numbers =
        round_up(2 * s.width + team_numbers(kThreads) + kWarps * s.layers, 16) + s.layers * kElements * kThreads;
    if (numbers * bytes > most_shared("ema_scan_norm_backward")) return false;
    with->shared_bytes = static_cast<size_t>(numbers * bytes);
    with->lanes = team_lanes(s.width, kElements, kThreads);
    with->blocks = with->runs = at_most(ceil_div(s.tokens, kThreads / with->lanes), kRunsAtMost);
    return true;
}

void aggregate::ema_norm_backward(const EmaBackward& with, void* stream) {
    const EmaScan& s = with.args.scan;
    const LayerRows &x = s.x, &grad = with.args.grad;
    with_element(s.dtype, [&](auto element) {
        using T = decltype(element);
        const bool vectors = vector_length<T>(x.data, x.layer_stride, x.token_stride, s.width) > 1 &&
                             vector_length<T>(grad.data, grad.layer_stride, grad.token_stride) > 1 &&
                             vector_length<T>(s.initial) > 1;
        launch("ema_scan_norm_backward",
               vectors ? ema_scan_norm_backward_kernel<T, 16 / sizeof(T)> : ema_scan_norm_backward_kernel<T, 1>,
               {with.blocks, kThreads, stream, with.shared_bytes}, with);
    });
}

}  // namespace xlayer::cuda
