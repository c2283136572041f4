// ema_scan forward (xlayer/aggregate.h), the state in registers.
//
// Without norm a thread scans one vector of a row through all layers. With norm the threads of a row are a team: its
// state is in their registers, and the next tap is loaded while they normalize this one. Rows of more than
// kMaxTeamWidth numbers take two kernels, which read x twice: the rows' statistics (ema_rows.cu), then every vector
// alone.
#include "cuda/aggregate/common.cuh"

namespace xlayer::cuda::aggregate {
namespace {

constexpr int kThreads = 256;
constexpr int kPrefetch = 4;   // layers whose taps are on their way together
constexpr int kElements = 16;  // of a row in a thread of its team
constexpr int64_t kMaxTeamWidth = kElements * kThreads;

struct Forward {
    EmaScanForward args;
    const void* statistics;  // [layers, tokens, kStatistics]
    int lanes;               // of a team
};

// resources: ema_scan_kernel<*, true> threads 256, registers 128, shared 0, occupancy 0.25
// resources: ema_scan_kernel threads 256, registers 64, shared 0, occupancy 0.5
// sass: ema_scan_kernel<*, [!1], *> LDG.128, only STG.128
template <class T, int V, bool kNorm>
__global__ void __launch_bounds__(kThreads, kNorm ? 2 : 4) ema_scan_kernel(Forward call) {
    using A = Accumulator<T>;
    const EmaScan& s = call.args.scan;
    const int64_t vectors = s.width / V, step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < s.tokens * vectors; at += step) {
        const int64_t token = at / vectors, e = at % vectors * V;
        const T* const x = static_cast<const T*>(s.x.data) + token * s.x.token_stride + e;
        T* const states = static_cast<T*>(call.args.states) + token * s.width + e;
        A state[V], weight[V] = {}, bias[V] = {};
        load_wide<T, V>(static_cast<const T*>(s.initial_state) + token * s.width + e, s.initial_state != nullptr,
                        state);
        if constexpr (kNorm) {
            load_split<V>(static_cast<const A*>(s.norm_weight) + e, kSplit<A, V>, weight);
            if (s.norm_bias != nullptr) load_split<V>(static_cast<const A*>(s.norm_bias) + e, kSplit<A, V>, bias);
        }
        for (int64_t first = 0; first < s.layers; first += kPrefetch) {
            Vector<T, V> taps[kPrefetch];
#pragma unroll
            for (int i = 0; i < kPrefetch; ++i)
                if (first + i < s.layers) taps[i] = load_vec<V>(x + (first + i) * s.x.layer_stride);
#pragma unroll
            for (int i = 0; i < kPrefetch; ++i) {
                const int64_t layer = first + i;
                if (layer >= s.layers) break;
                const Gate<A> gate = gate_of<A>(s.gate_logits, layer);
                RowNorm<A> norm{};
                if constexpr (kNorm) norm = RowNorm<A>::load_of(call.statistics, layer * s.tokens + token);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    A value = widen(taps[i].at[v]);
                    if constexpr (kNorm) value = fma(norm(value), weight[v], bias[v]);
                    state[v] = fma(gate.keep, state[v], gate.take * value);
                }
                if (!s.last_only) store_narrow<T, V>(states + layer * s.tokens * s.width, state);
            }
        }
        if (s.last_only) store_narrow<T, V>(states, state);
    }
}

// A team's row: K vectors of V numbers in a thread, `lanes` vectors apart.
template <class T, int V>
class NormThread {
    using A = Accumulator<T>;
    static constexpr int K = kElements / V;

  public:
    __device__ __forceinline__ NormThread(const Forward& call, A* shared)
        : s_(call.args.scan),
          states_(static_cast<T*>(call.args.states)),
          weight_(shared),
          bias_(shared + s_.width),
          team_(call.lanes, bias_ + s_.width) {
        stage_row<V>(static_cast<const A*>(s_.norm_weight), s_.width, weight_);
        stage_row<V>(static_cast<const A*>(s_.norm_bias), s_.width, bias_);
        sync_block();
    }

    __device__ __forceinline__ void run() {
        const int64_t teams = kThreads / team_.lanes;
        for (int64_t first = blockIdx.x * teams; first < s_.tokens; first += gridDim.x * teams) {
            token_ = first + team_.index;
            end_ = token_ < s_.tokens ? static_cast<int>(s_.width) : 0;
            scan();
        }
    }

  private:
    __device__ __forceinline__ int column(int k) const { return (k * team_.lanes + team_.lane) * V; }
    __device__ __forceinline__ bool inside(int k) const { return column(k) < end_; }

    __device__ __forceinline__ void fetch(int64_t layer, Vector<T, V> (&taps)[K]) const {
        const T* const x = static_cast<const T*>(s_.x.data) + layer * s_.x.layer_stride + token_ * s_.x.token_stride;
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (inside(k) && layer < s_.layers) taps[k] = load_vec<V>(x + column(k));  // else it stays as it is
    }

    // Takes a first mean off the row, which is 0 outside.
    __device__ __forceinline__ Norm<A> center(A (&row)[K][V]) {
        A sum[1] = {}, sums[2] = {};
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int v = 0; v < V; ++v) sum[0] += row[k][v];
        }
        team_.add(sum);
        const A mean = sum[0] / static_cast<A>(s_.width);
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                row[k][v] = inside(k) ? row[k][v] - mean : A(0);
                sums[0] += row[k][v];
                sums[1] = fma(row[k][v], row[k][v], sums[1]);
            }
        }
        team_.add(sums);
        return norm_of(sums[0], sums[1], s_.width, s_.eps);
    }

    __device__ __forceinline__ void scan() {
        A state[K][V];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const T* const initial_state = static_cast<const T*>(s_.initial_state) + token_ * s_.width + column(k);
            load_wide<T, V>(initial_state, s_.initial_state != nullptr && inside(k), state[k]);
        }
        Vector<T, V> next[K] = {};
        fetch(0, next);
        for (int64_t layer = 0; layer < s_.layers; ++layer) {
            A row[K][V];
#pragma unroll
            for (int k = 0; k < K; ++k) widen_all<T, V>(next[k], row[k]);
            fetch(layer + 1, next);
            const Norm<A> norm = center(row);
            const Gate<A> gate = gate_of<A>(s_.gate_logits, layer);
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (!inside(k)) continue;
                A weight[V], bias[V];
                load_staged<V>(weight_, s_.width, column(k), weight);
                load_staged<V>(bias_, s_.width, column(k), bias);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const A value = fma(fma(row[k][v], norm.inverse, norm.shift), weight[v], bias[v]);
                    state[k][v] = fma(gate.keep, state[k][v], gate.take * value);
                }
            }
            if (!s_.last_only) write(layer, state);
        }
        if (s_.last_only) write(0, state);
    }

    __device__ __forceinline__ void write(int64_t layer, const A (&state)[K][V]) const {
        T* const to = states_ + (layer * s_.tokens + token_) * s_.width;
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (inside(k)) store_narrow<T, V>(to + column(k), state[k]);
    }

    const EmaScan& s_;
    T* const states_;
    A *const weight_, *const bias_;
    Team<A> team_;
    int64_t token_ = 0;
    int end_ = 0;  // of the row; 0 where there is no token
};

template <class T, int V>
constexpr int kNormBlocks = sizeof(T) == 8 || V == 1 ? 1 : 2;  // on a multiprocessor

// resources: ema_scan_norm_kernel<*float*, 1> threads 256, registers 255, shared 33536, occupancy 0.125
// resources: ema_scan_norm_kernel<double, *> threads 256, registers 255, shared 67072, occupancy 0.125
// resources: ema_scan_norm_kernel threads 256, registers 128, shared 33536, occupancy 0.25
// sass: ema_scan_norm_kernel<*, [!1]> LDG.128, only STG.128
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kNormBlocks<T, V>) ema_scan_norm_kernel(Forward call) {
    NormThread<T, V>(call, shared_memory<Accumulator<T>>()).run();
}

template <class T, int V>
void scan(Forward call, void* stream) {
    using A = Accumulator<T>;
    const EmaScan& s = call.args.scan;
    if (s.normalize && s.width <= kMaxTeamWidth) {
        call.lanes = team_lanes(s.width, kElements, kThreads);
        const size_t bytes = (2 * s.width + team_elements(kThreads)) * sizeof(A);
        launch("ema_scan_norm", ema_scan_norm_kernel<T, V>,
               {min_size(ceil_div(s.tokens, kThreads / call.lanes), kMaxBlocks), kThreads, stream, bytes}, call);
        return;
    }
    if (s.normalize) ema_statistics(s, call.args.workspace, stream);
    call.statistics = call.args.workspace;
    launch("ema_scan", s.normalize ? ema_scan_kernel<T, V, true> : ema_scan_kernel<T, V, false>,
           {min_size(ceil_div(s.tokens * (s.width / V), kThreads), kMaxBlocks), kThreads, stream}, call);
}

}  // namespace

int64_t ema_scan_forward_workspace(const EmaScanForward& args) {
    const EmaScan& s = args.scan;
    if (!s.normalize || s.width <= kMaxTeamWidth) return 0;
    return product_of_sizes(s.layers, s.tokens, kStatistics, s.dtype == DType::float64 ? 8 : 4);
}

void ema_scan_forward(const EmaScanForward& args, void* stream) {
    dispatch_dtype(args.scan.dtype, [&](auto element) {
        using T = decltype(element);
        using A = Accumulator<T>;
        Forward call{args, nullptr, 0};
        EmaScan& s = call.args.scan;
        // Without norm a layer's tokens that follow each other are one long row.
        if (!s.normalize && s.x.token_stride == s.width) s.width *= s.tokens, s.tokens = 1;
        const bool vectors = vector_length<T>(s.x.data, s.x.layer_stride, s.x.token_stride, s.width) > 1 &&
                             vector_length<T>(s.initial_state) > 1 && vector_length<T>(args.states) > 1 &&
                             vector_length<A>(s.norm_weight) > 1 && vector_length<A>(s.norm_bias) > 1;
        vectors ? scan<T, 16 / sizeof(T)>(call, stream) : scan<T, 1>(call, stream);
    });
}

}  // namespace xlayer::cuda::aggregate
