// Second half of hyper's backward: all gradients as long as d.
//
// A block takes a tile of d and loops over a run of tokens. A warp has one stream of the tile; h and ∂L/∂h' are
// exchanged through shared memory. A warp's elements of the weight, and the sums of their gradients, stay in registers.
#include "cuda/hyper/backward.cuh"

namespace xlayer::cuda::hyper {
namespace {

template <int N>
constexpr int kStreamThreads = kWarpSize * kMaxStreamsOf<N> * kStreamGroups<N>;

struct StreamsCall {
    BackwardPlan plan;
    bool vec_in, vec_branch, vec_out, vec_x, vec_weight, vec_grad, vec_grad_branch;
};

template <class T, int N>
struct StreamsShared {
    using A = Accumulator<T>;
    static constexpr int V = kStreamElements<T, N>;
    Vector<A, V> grad[kStreamGroups<N>][kMaxStreamsOf<N>][kWarpSize];
    A products[kStreamGroups<N>][kMaxStreamsOf<N>][kMaxStreamsOf<N> + 1];
    Vector<T, V> h[kStreamGroups<N>][kMaxStreamsOf<N>][kWarpSize];
};

// One thread's elements of one stream, over a run of tokens.
template <class T, int N, bool All>
class StreamThread {
    using A = Accumulator<T>;
    static constexpr int V = kStreamElements<T, N>;
    static constexpr int kGroups = kStreamGroups<N>;
    static constexpr int kWeights = All ? 1 : kMaxStreamsOf<N> + 2;  // rows of the weight in registers
    static constexpr int kProducts = N;                              // sums of products in registers, but for one
    static constexpr bool kKeepWeight = !All && sizeof(T) < 8 && N != 0 && V * N < 16;  // else from the L1

  public:
    __device__ __forceinline__ explicit StreamThread(const StreamsCall& streams)
        : flags_(streams), plan_(streams.plan), args_(streams.plan.args), n_(streams_of<N>(args_.size)) {
        const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
        j_ = warp % n_, group_ = warp / n_;
        e_ = (static_cast<int64_t>(blockIdx.x) * kGroups + group_) * kWarpSize * V + lane_id() * V;
        count_ = args_.size.width - e_;
        weight_at_ = All ? j_ * args_.size.width + e_ : e_;
        weight_row_ = All ? n_ * args_.size.width : args_.size.width;
#pragma unroll
        for (int m = 0; m < kWeights; ++m) {
            if (kKeepWeight && plan_.dynamic && used(m)) weight_[m] = weight(m);
        }
    }

    __device__ __forceinline__ void run(int64_t first, int64_t last) {
        Rows rows = fetch(first);
        for (int64_t token = first; token < last; ++token) {
            if constexpr (N == 0) {  // no registers are left for the next token's
                if (token > first) rows = fetch(token);
                add(token, first, rows);
            } else {
                const Rows next = token + 1 < last ? fetch(token + 1) : rows;
                add(token, first, rows);
                rows = next;
            }
        }
        if (plan_.post && args_.post.shared) {
            stage_products();
            sync_block();
            write_products(static_cast<int64_t>(blockIdx.y) * plan_.tiles + blockIdx.x);
        } else if (plan_.post) {
            sync_block();
            write_products((last - 1) * plan_.tiles + blockIdx.x);
        }
        if constexpr (!All) {
            if (plan_.dynamic) write_weight();
        }
    }

  private:
    struct Rows {  // a token's inputs
        Vector<T, V> h, out, x;
        A y[V];
    };

    __device__ __forceinline__ static StreamsShared<T, N>& shared() { return *shared_memory<StreamsShared<T, N>>(); }
    __device__ __forceinline__ bool used(int m) const { return N != 0 || m < n_ + 2; }
    __device__ __forceinline__ bool real(int k) const { return N != 0 || k < n_; }

    __device__ __forceinline__ Vector<A, V> weight(int64_t row) const {
        const A* from = static_cast<const A*>(args_.connection.weight) + row * weight_row_ + weight_at_;
        return read<V>(from, count_, flags_.vec_weight && count_ > 0);
    }

    template <class Pointer>
    __device__ __forceinline__ int64_t offset(const HyperStreams<Pointer>& streams, int64_t token) const {
        return token_offset(args_.size, streams.stride, token) + j_ * streams.stride[2] + e_;
    }

    __device__ __forceinline__ Rows fetch(int64_t token) const {
        Rows rows{};
        const bool inside = count_ > 0;
        rows.h =
            read<V>(static_cast<const T*>(args_.in.data) + offset(args_.in, token), count_, flags_.vec_in && inside);
        if (args_.grad_out.data != nullptr) {
            rows.out = read<V>(static_cast<const T*>(args_.grad_out.data) + offset(args_.grad_out, token), count_,
                               flags_.vec_out && inside);
        }
        if (args_.pre) {
            const HyperRows<const void*>& x = args_.grad_branch_input;
            rows.x = read<V>(static_cast<const T*>(x.data) + token_offset(args_.size, x.stride, token) + e_, count_,
                             flags_.vec_x && inside);
        }
        if (plan_.post) {
            read_branch<T>(args_.size.branch_dtype, args_.post.branch.data,
                           token_offset(args_.size, args_.post.branch.stride, token) + e_, count_,
                           flags_.vec_branch && inside, rows.y);
        }
        return rows;
    }

    __device__ __forceinline__ const A* post_coefficients(int64_t token) const {
        return static_cast<const A*>(args_.post.coefficients) +
               (args_.post.shared ? 0 : token * plan_.num_coefficients);
    }

    // h'_j, from what the warps of the group have of h.
    __device__ __forceinline__ Vector<T, V> stream_read(int64_t token, const Rows& rows) {
        if (!plan_.post || !plan_.dynamic) return rows.h;
        shared().h[group_][j_][lane_id()] = rows.h;
        sync_block();
        Vector<T, V> h[kMaxStreamsOf<N>];
#pragma unroll
        for (int i = 0; i < kMaxStreamsOf<N>; ++i) {
            if (real(i)) h[i] = shared().h[group_][i][lane_id()];
        }
        return mix<T, N>(n_, j_, post_coefficients(token), h, rows.y);
    }

    // ∂L/∂h'_j; adds the token's term to the weight's gradient.
    __device__ __forceinline__ void stream_gradient(int64_t token, const Rows& rows, const Vector<T, V>& next,
                                                    A (&grad)[V]) {
        const A* const record = static_cast<const A*>(plan_.records) + token * record_size(n_);
        A sum[V] = {};
        if (plan_.dynamic) {
            const A mean = All ? A(0) : record[kMean * n_ + j_], rest = All ? A(0) : record[kRest * n_ + j_];
            const A slope = record[kSlope * n_ + j_], level = record[kLevel * n_ + j_];
            const A* const logits = record + kLogits * n_ + (All ? 0 : j_ * (n_ + 2));
            A centred[V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
                centred[v] = widen(next.at[v]) - mean - rest;
                sum[v] = slope * centred[v] + level;
            }
            if constexpr (All) {
#pragma unroll(N == 0 ? 2 : 4)  // of a number that is not known more would take too many registers
                for (int m = 0; m < plan_.num_coefficients; ++m) {
                    const A factor = logits[m];
                    const Vector<A, V> w = weight(m);
#pragma unroll
                    for (int v = 0; v < V; ++v) sum[v] = fma(factor, w.at[v], sum[v]);
                }
            } else {
#pragma unroll
                for (int m = 0; m < kWeights; ++m) {
                    if (!used(m)) continue;
                    if (N == 0) sync_warp();  // as below
                    const A factor = logits[m];
                    const Vector<A, V> w = kKeepWeight ? weight_[m] : weight(m);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        sum[v] = fma(factor, w.at[v], sum[v]);
                        weight_sum_[m][v] = fma(factor, centred[v], weight_sum_[m][v]);
                    }
                }
            }
        }
        // The many small terms first, so that they are not rounded to the size of these.
        const A pre = record[kPre * n_ + j_];
#pragma unroll
        for (int v = 0; v < V; ++v) grad[v] = widen(rows.out.at[v]) + fma(pre, widen(rows.x.at[v]), sum[v]);
    }

    __device__ __forceinline__ void add(int64_t token, int64_t first, const Rows& rows) {
        A grad[V];
        const Vector<T, V> next = stream_read(token, rows);
        if (args_.pre) {
            stream_gradient(token, rows, next, grad);
        } else {
#pragma unroll
            for (int v = 0; v < V; ++v) grad[v] = widen(rows.out.at[v]);
        }
        if (plan_.post) {
            if (!args_.post.shared && token > first) {
                if (!plan_.dynamic) sync_block();  // else stream_read() had a barrier
                write_products((token - 1) * plan_.tiles + blockIdx.x);
            } else if (!plan_.dynamic) {
                sync_block();  // the token before is done with the gradients in shared memory
            }
            post_gradient(token, first, rows, grad);
        }
        Vector<T, V> out;
#pragma unroll
        for (int v = 0; v < V; ++v) out.at[v] = narrow<T>(grad[v]);
        if (count_ > 0)
            write(static_cast<T*>(args_.grad_in.data) + offset(args_.grad_in, token), out, count_, flags_.vec_grad);
    }

    // grad: in ∂L/∂h'_j, out ∂L/∂h_j. The warps of a group alternate, token by token, in computing
    // ∂L/∂y.
    __device__ __forceinline__ void post_gradient(int64_t token, int64_t first, const Rows& rows, A (&grad)[V]) {
        const A* const c = post_coefficients(token);
        Vector<A, V> local;
#pragma unroll
        for (int v = 0; v < V; ++v) local.at[v] = count_ > v ? grad[v] : A(0);
        shared().grad[group_][j_][lane_id()] = local;
        if (!args_.post.shared) {
#pragma unroll
            for (int k = 0; k <= kProducts; ++k) products_[k] = 0;
        }
        const bool reset = !args_.post.shared || token == first;
        sync_block();
        const bool with_branch = token % n_ == j_;
        A branch[V] = {};
#pragma unroll
        for (int v = 0; v < V; ++v) {
            grad[v] = 0;
            products_[kProducts] = fma(local.at[v], rows.y[v], products_[kProducts]);
        }
        if constexpr (N == 0) add_product(kMaxStreamsOf<N>, reset);
#pragma unroll
        for (int k = 0; k < kMaxStreamsOf<N>; ++k) {
            if (!real(k)) continue;
            sync_warp();  // holds the loads, which would take too many registers
            const Vector<A, V> g = shared().grad[group_][k][lane_id()];
            const A factor = c[post_index(n_, j_, k)], of_y = with_branch ? c[post_index(n_, n_, k)] : A(0);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                grad[v] = fma(factor, g.at[v], grad[v]);
                branch[v] = fma(of_y, g.at[v], branch[v]);
                products_[N == 0 ? 0 : k] = fma(g.at[v], widen(rows.h.at[v]), products_[N == 0 ? 0 : k]);
            }
            if constexpr (N == 0) add_product(k, reset);
        }
        if (with_branch && count_ > 0) {
            write_branch<T>(args_.size.branch_dtype, args_.grad_branch, token * args_.size.width + e_, count_,
                            flags_.vec_grad_branch, branch);
        }
        if (!args_.post.shared) stage_products();
    }

    // Stores the warp's sums ⟨∂L/∂h'_k, h_j⟩ and ⟨∂L/∂h'_j, y⟩ in shared memory; write_products() reads them after a
    // barrier.
    __device__ __forceinline__ void stage_products() {
        if constexpr (N != 0) {
            A sum[kMaxStreamsOf<N> + 1];
#pragma unroll
            for (int k = 0; k <= kMaxStreamsOf<N>; ++k) sum[k] = products_[k];
            sum_over_lanes<kMaxStreamsOf<N> + 1>(sum);
            const int k = lane_sum_index<kMaxStreamsOf<N> + 1>(0);
            if (k >= 0) shared().products[group_][j_][k] = sum[0];
        }
    }

    // The same, one by one, where there are no registers for all of them.
    __device__ __forceinline__ void add_product(int k, bool reset) {
#pragma unroll
        for (int mask = kWarpSize / 2; mask > 0; mask /= 2) products_[0] += shuffle_xor(products_[0], mask);
        A& sum = shared().products[group_][j_][k];
        if (lane_id() == 0) sum = products_[0] + (reset ? A(0) : sum);
        products_[0] = 0;
    }

    // [n+1, n]: element (j, k) for j < n, (n, j) for y.
    __device__ __forceinline__ void write_products(int64_t place) {
        A* const to = static_cast<A*>(plan_.post_partials) + place * n_ * (n_ + 1);
        for (int at = static_cast<int>(threadIdx.x); at < n_ * (n_ + 1); at += static_cast<int>(blockDim.x)) {
            const int j = at / n_, k = at % n_;
            A sum = 0;
#pragma unroll
            for (int g = 0; g < kGroups; ++g)
                sum += j < n_ ? shared().products[g][j][k] : shared().products[g][k][kMaxStreamsOf<N>];
            to[at] = sum;
        }
    }

    // Stores the run's gradient of the weight: the streams' sums, added in order.
    __device__ __forceinline__ void write_weight() {
        A* const to = static_cast<A*>(plan_.weight_partials) +
                      static_cast<int64_t>(blockIdx.y) * (n_ + 2) * args_.size.width + e_;
#pragma unroll
        for (int m = 0; m < kWeights; ++m) {
            if (!used(m)) continue;
            sync_block();
            Vector<A, V> local;
#pragma unroll
            for (int v = 0; v < V; ++v) local.at[v] = weight_sum_[m][v];
            shared().grad[group_][j_][lane_id()] = local;
            sync_block();
            if (j_ > 0) continue;
            for (int k = 1; k < n_; ++k) {
                const Vector<A, V> other = shared().grad[group_][k][lane_id()];
#pragma unroll
                for (int v = 0; v < V; ++v) local.at[v] += other.at[v];
            }
            if (count_ > 0) write(to + m * args_.size.width, local, count_, flags_.vec_weight);
        }
    }

    const StreamsCall& flags_;
    const BackwardPlan& plan_;
    const HyperBackward& args_;
    int n_, j_, group_;
    int64_t e_, count_;  // the thread's first element of d, and how many there are from it on; may be negative
    int64_t weight_at_, weight_row_;
    Vector<A, V> weight_[kKeepWeight ? kWeights : 1];
    A weight_sum_[kWeights][V] = {};
    A products_[kProducts + 1] = {};
};

// resources: hyper_backward_streams_kernel<*, 0, *> threads 512, registers 128, shared 10496, occupancy 0.25
// resources: hyper_backward_streams_kernel threads 256, registers 128, shared 8192, occupancy 0.25
// sass: hyper_backward_streams_kernel LDG, STG
template <class T, int N, bool All>
__global__ void __launch_bounds__(kStreamThreads<N>, N == 0 ? 1 : 2)
    hyper_backward_streams_kernel(StreamsCall streams) {
    const int64_t first = blockIdx.y * streams.plan.run_tokens, tokens = tokens_of(streams.plan.args.size);
    const int64_t last = first + streams.plan.run_tokens < tokens ? first + streams.plan.run_tokens : tokens;
    StreamThread<T, N, All>(streams).run(first, last);
}

template <class T, int N>
void launch_streams(const BackwardPlan& plan, void* stream) {
    using A = Accumulator<T>;
    constexpr int V = kStreamElements<T, N>;
    const HyperBackward& args = plan.args;
    const bool vectorized = args.size.width % V == 0;
    const size_t branch = element_size(args.size.branch_dtype);
    const StreamsCall streams{plan,
                              vectorized && aligned(args.in, sizeof(T), V),
                              vectorized && aligned(args.post.branch, branch, V),
                              vectorized && aligned(args.grad_out, sizeof(T), V),
                              vectorized && aligned(args.grad_branch_input, sizeof(T), V),
                              vectorized && aligned(args.connection.weight, sizeof(A), V, {}),
                              vectorized && aligned(args.grad_in, sizeof(T), V),
                              vectorized && aligned(args.grad_branch, branch, V, {})};
    const int64_t warps = args.size.streams * kStreamGroups<N>;
    launch("hyper_backward_streams",
           plan.all ? hyper_backward_streams_kernel<T, N, true> : hyper_backward_streams_kernel<T, N, false>,
           {plan.tiles, static_cast<int>(warps * kWarpSize), stream, sizeof(StreamsShared<T, N>), plan.runs}, streams);
}

}  // namespace

void backward_streams(const BackwardPlan& plan, void* stream) {
    dispatch_dtype(plan.args.size.dtype, [&](auto element) {
        using T = decltype(element);
        dispatch_streams(plan.args.size.streams, [&](auto n) { launch_streams<T, decltype(n)::value>(plan, stream); });
    });
}

}  // namespace xlayer::cuda::hyper
