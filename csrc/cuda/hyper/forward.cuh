// One token of hyper's forward, computed by a block: see forward.cu.
#pragma once

#include "cuda/hyper/common.cuh"

namespace xlayer::cuda::hyper {

constexpr int kForwardWarps = 8;
constexpr int kForwardThreads = kForwardWarps * kWarpSize;
constexpr int64_t kSharedBytes = 80 * 1024;  // at most: two blocks on a multiprocessor

// Elements of d of a thread, and columns of the weight in one pass over them, limited by the registers.
template <class T, int N>
constexpr int kForwardElements = N == 0 ? 1 : (N == 8 ? 8 : 16) / sizeof(T);
template <int N>
constexpr int kColumns = N == 0   ? 1
                         : N == 4 ? 2
                                  : (N + 2) / 2;

// Blocks on a multiprocessor: so many that a thread has the registers that it needs.
template <class T, int N>
constexpr int kForwardBlocks = sizeof(T) == 8 || N == 8 ? 1 : 2;

constexpr int64_t kForwardGrid = 264;  // blocks of a launch whose blocks loop over several tokens each

struct ForwardPlan {
    HyperForward args;
    bool post, dynamic, has_logits;  // has_logits: z and statistics are there already
    bool vec_in, vec_out, vec_branch, vec_rest;
    int64_t pitch;  // of rows in shared memory
    int64_t shared_bytes;
    bool staged;              // h' is kLaneSums in shared memory
    int64_t prefetch_offset;  // where in it lies what is copied ahead for the next token, h and y: bytes; 0: nowhere
};

template <class A, int N>
struct ForwardShared {
    static constexpr int kSums = kMaxStreamsOf<N> * (kColumns<N> + 2);
    A post[kMaxCoefficientsOf<N>], z[kMaxCoefficientsOf<N>], c[kMaxCoefficientsOf<N>];
    A mean[kMaxStreamsOf<N>], inverse[kMaxStreamsOf<N>];
    A partial[kForwardWarps * kSums], sum[kSums];
    A matrix[kMaxStreamsOf<N> * kMaxStreamsOf<N>];
};
template <class A, int N>
constexpr int64_t kForwardShared = (sizeof(ForwardShared<A, N>) + 127) / 128 * 128;

template <class T, int N>
class ForwardToken {
    using A = Accumulator<T>;
    static constexpr int V = kForwardElements<T, N>;
    static constexpr int kStep = kForwardThreads * V;

  public:
    static constexpr bool kCopies = sizeof(Vector<T, V>) == 16;

    __device__ __forceinline__ ForwardToken(const ForwardPlan& plan, int64_t token)
        : plan_(plan), args_(plan.args), token_(token), n_(streams_of<N>(plan.args.size)), d_(plan.args.size.width) {
        const HyperStreams<const void*>& in = args_.in;
        in_ = static_cast<const T*>(in.data) + token_offset(args_.size, in.stride, token);
        if (plan.post) out_ = static_cast<T*>(args_.out.data) + token_offset(args_.size, args_.out.stride, token);
        if (plan.staged) {
            rows_ = reinterpret_cast<T*>(shared_memory<char>() + kForwardShared<A, N>);
            pitch_ = plan.pitch;
            vec_rows_ = true;
        } else {
            rows_ = plan.post ? out_ : const_cast<T*>(in_);
            pitch_ = plan.post ? args_.out.stride[2] : in.stride[2];
            vec_rows_ = plan.post ? plan.vec_out : plan.vec_in;
        }
    }

    // Has the thread's elements of h and y at e copied to shared memory.
    __device__ __forceinline__ void prefetch(int64_t e) const {
        if constexpr (kCopies) {
            T* const to = prefetched() + e;
#pragma unroll
            for (int j = 0; j < kMaxStreamsOf<N>; ++j)
                copy_async(to + j * plan_.pitch, in_ + j * args_.in.stride[2] + e);
            if (!plan_.post) return;
            const T* y = static_cast<const T*>(args_.post.branch.data) +
                         token_offset(args_.size, args_.post.branch.stride, token_);
            copy_async(to + kMaxStreamsOf<N> * plan_.pitch, y + e);
        }
    }
    __device__ __forceinline__ void prefetch() const {
        for (int64_t e = static_cast<int64_t>(threadIdx.x) * V; e < d_; e += kStep) prefetch(e);
        commit_copies();
    }

    __device__ __forceinline__ void run() {
        load_coefficients();
        const bool layer = plan_.dynamic && args_.connection.norm == HyperNorm::layer;
        if (plan_.post || layer || plan_.staged) mix_streams(layer);
        if (!args_.pre) return;
        if (plan_.dynamic) {
            if (!plan_.has_logits) products();
            if (threadIdx.x < kWarpSize) coefficients();
            sync_block();
        }
        branch_input();
    }

  private:
    __device__ __forceinline__ static ForwardShared<A, N>& shared() { return *shared_memory<ForwardShared<A, N>>(); }
    __device__ __forceinline__ T* prefetched() const {
        return reinterpret_cast<T*>(shared_memory<char>() + plan_.prefetch_offset);
    }
    __device__ __forceinline__ bool real(int j) const { return N != 0 || j < n_; }

    // The numbers that the token comes with: post's coefficients, z, or what is static.
    __device__ __forceinline__ void load_coefficients() {
        const int num_coefficients = n_ * (n_ + 2);
        sync_block();  // the token before is done with them
        const A* post = static_cast<const A*>(args_.post.coefficients);
        if (plan_.post && !args_.post.shared) post += token_ * num_coefficients;
        for (int at = static_cast<int>(threadIdx.x); at < num_coefficients; at += kForwardThreads) {
            if (plan_.post) shared().post[at] = post[at];
            if (args_.pre && !plan_.dynamic) shared().c[at] = static_cast<const A*>(args_.connection.base)[at];
            if (plan_.has_logits) shared().z[at] = static_cast<const A*>(args_.logits)[token_ * num_coefficients + at];
        }
        sync_block();
    }

    // The thread's elements of h and y at e, copied ahead or not.
    __device__ __forceinline__ void read_token(int64_t e, Vector<T, V> (&h)[kMaxStreamsOf<N>], A (&y)[V]) const {
        const int64_t count = d_ - e;
        if (kCopies && plan_.prefetch_offset > 0) {
#pragma unroll
            for (int j = 0; j < kMaxStreamsOf<N>; ++j) {
                if (real(j)) h[j] = load_vec<V>(prefetched() + j * plan_.pitch + e);
            }
            if (!plan_.post) return;
            const Vector<T, V> some = load_vec<V>(prefetched() + n_ * plan_.pitch + e);
#pragma unroll
            for (int v = 0; v < V; ++v) y[v] = widen(some.at[v]);
            return;
        }
#pragma unroll
        for (int j = 0; j < kMaxStreamsOf<N>; ++j) {
            if (real(j)) h[j] = read<V>(in_ + j * args_.in.stride[2] + e, count, plan_.vec_in);
        }
        if (!plan_.post) return;
        read_branch<T>(args_.size.branch_dtype, args_.post.branch.data,
                       token_offset(args_.size, args_.post.branch.stride, token_) + e, count, plan_.vec_branch, y);
    }

    // h' to memory and to shared memory, and the means of its rows.
    __device__ __forceinline__ void mix_streams(bool layer) {
        A sum[kMaxStreamsOf<N>] = {};
        const int64_t next = token_ + gridDim.x;
        if (plan_.prefetch_offset > 0) wait_copies<0>();
        for (int64_t begin = 0; begin < d_; begin += kStep) {
            sync_warp();  // keeps the compiler from hoisting the loads of the coefficients: too many registers
            const int64_t e = begin + static_cast<int64_t>(threadIdx.x) * V;
            if (e >= d_) continue;
            const int64_t count = d_ - e;
            Vector<T, V> h[kMaxStreamsOf<N>];
            A y[V] = {};
            read_token(e, h, y);
#pragma unroll
            for (int k = 0; k < kMaxStreamsOf<N>; ++k) {
                if (!real(k)) continue;
                const Vector<T, V> mixed = plan_.post ? mix<T, N>(n_, k, shared().post, h, y) : h[k];
                if (plan_.post) write(out_ + k * args_.out.stride[2] + e, mixed, count, plan_.vec_out);
                if (plan_.staged) store_vec<Space::generic>(rows_ + k * pitch_ + e, mixed);
#pragma unroll
                for (int v = 0; v < V; ++v) sum[k] += widen(mixed.at[v]);
            }
        }
        // Only now, when what lay there has been used.
        if (plan_.prefetch_offset > 0 && next < tokens_of(args_.size)) ForwardToken(plan_, next).prefetch();
        if (!layer) return;
        sum_over_block<kMaxStreamsOf<N>, kForwardWarps>(sum, shared().partial, shared().sum);
        sync_block();
        if (static_cast<int>(threadIdx.x) < n_)
            shared().mean[threadIdx.x] = shared().sum[threadIdx.x] / static_cast<A>(d_);
        sync_block();
    }

    // z = norm(h') · weight, for norms of each stream.
    __device__ __forceinline__ void products() {
        const bool layer = args_.connection.norm == HyperNorm::layer;
        A mean[kMaxStreamsOf<N>];
#pragma unroll
        for (int j = 0; j < kMaxStreamsOf<N>; ++j) mean[j] = layer && real(j) ? shared().mean[j] : A(0);
        for (int first = 0; first < n_ + 2; first += kColumns<N>) {
            A sum[kMaxStreamsOf<N> * (kColumns<N> + 2)] = {};  // of products, then of h' − mean and its squares
            for (int64_t begin = 0; begin < d_; begin += kStep) {
                sync_warp();  // and of the means
                const int64_t e = begin + static_cast<int64_t>(threadIdx.x) * V;
                if (e >= d_) continue;
                const int64_t count = d_ - e;
                A h[kMaxStreamsOf<N>][V];
#pragma unroll
                for (int j = 0; j < kMaxStreamsOf<N>; ++j) {
                    if (!real(j)) continue;
                    const Vector<T, V> row = read<V>(rows_ + j * pitch_ + e, count, vec_rows_);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        h[j][v] = v < count ? widen(row.at[v]) - mean[j] : A(0);
                        sum[kMaxStreamsOf<N> * kColumns<N> + j] += h[j][v];
                        A& squares = sum[kMaxStreamsOf<N> * (kColumns<N> + 1) + j];
                        squares = fma(h[j][v], h[j][v], squares);
                    }
                }
#pragma unroll
                for (int m = 0; m < kColumns<N>; ++m) {
                    const A* weight = static_cast<const A*>(args_.connection.weight) + (first + m) * d_ + e;
                    const Vector<A, V> w = read<V>(weight, count, plan_.vec_rest);
#pragma unroll
                    for (int j = 0; j < kMaxStreamsOf<N>; ++j) {
                        if (!real(j)) continue;
#pragma unroll
                        for (int v = 0; v < V; ++v) {
                            A& product = sum[j * kColumns<N> + m];
                            product = fma(h[j][v], w.at[v], product);
                        }
                    }
                }
            }
            sum_over_block<kMaxStreamsOf<N>*(kColumns<N> + 2), kForwardWarps>(sum, shared().partial, shared().sum);
            sync_block();
            finish_products(first);
            sync_block();
        }
    }

    __device__ __forceinline__ void finish_products(int first) {
        const int thread = static_cast<int>(threadIdx.x), j = thread / kColumns<N>, m = first + thread % kColumns<N>;
        if (thread >= kMaxStreamsOf<N> * kColumns<N> || j >= n_) return;
        const A width = static_cast<A>(d_);
        A mean = 0, off = 0, level = 0;  // off: by how much the mean had been rounded, level: what it adds to z
        if (args_.connection.norm == HyperNorm::layer) {
            off = shared().sum[kMaxStreamsOf<N> * kColumns<N> + j] / width;
            mean = shared().mean[j];
            level = off * static_cast<const A*>(args_.workspace)[m];
        }
        const A squares = shared().sum[kMaxStreamsOf<N> * (kColumns<N> + 1) + j];
        const A inverse = A(1) / sqrt(squares / width - off * off + static_cast<A>(args_.connection.eps));
        shared().z[j * (n_ + 2) + m] = inverse * (shared().sum[thread] - level);
        if (m > 0) return;
        A* statistics = static_cast<A*>(args_.statistics) + (token_ * n_ + j) * kHyperStatistics;
        statistics[0] = mean, statistics[1] = off, statistics[2] = inverse;
    }

    // c from z, by the first warp.
    __device__ __forceinline__ void coefficients() {
        const HyperConnection& connection = args_.connection;
        const int columns = n_ + 2, num_coefficients = n_ * columns;
        const bool constrained = is_constrained(connection);
        A* const c = static_cast<A*>(args_.coefficients) + token_ * num_coefficients;
        for (int at = lane_id(); at < num_coefficients; at += kWarpSize) {
            const A z = shared().z[at];
            if (!plan_.has_logits) static_cast<A*>(args_.logits)[token_ * num_coefficients + at] = z;
            const CoefficientParameters<A> params(connection, at, columns);
            const int j = at / columns, m = at % columns;
            A number;
            if (!constrained) {
                const A in = z + params.bias;
                number = params.base + params.scale * (connection.form == HyperForm::tanh ? tanh(in) : in);
            } else {
                number = params.base + params.scale * z;
                if (m > 0 && m <= n_) {
                    shared().matrix[j * n_ + m - 1] = number;
                    continue;
                }
                number = (m == 0 ? A(1) : A(2)) * sigmoid(number);
            }
            shared().c[at] = c[at] = number;
        }
        if (!constrained) return;
        Sinkhorn<A>(connection, n_, lane_id(), true).forward(shared().matrix);
        for (int at = lane_id(); at < n_ * n_; at += kWarpSize) {
            const int to = at / n_ * columns + 1 + at % n_;
            shared().c[to] = c[to] = shared().matrix[at];
        }
    }

    __device__ __forceinline__ void branch_input() {
        T* const x = static_cast<T*>(args_.branch_input) + token_ * d_;
        for (int64_t e = static_cast<int64_t>(threadIdx.x) * V; e < d_; e += kStep) {
            const int64_t count = d_ - e;
            A sum[V] = {};
#pragma unroll
            for (int j = 0; j < kMaxStreamsOf<N>; ++j) {
                if (!real(j)) continue;
                const A factor = shared().c[j * (n_ + 2)];
                const Vector<T, V> row = read<V>(rows_ + j * pitch_ + e, count, vec_rows_);
#pragma unroll
                for (int v = 0; v < V; ++v) sum[v] = fma(factor, widen(row.at[v]), sum[v]);
            }
            Vector<T, V> out;
#pragma unroll
            for (int v = 0; v < V; ++v) out.at[v] = narrow<T>(sum[v]);
            write(x + e, out, count, plan_.vec_rest);
        }
    }

    const ForwardPlan& plan_;
    const HyperForward& args_;
    int64_t token_;
    int n_;
    int64_t d_;
    const T* in_;
    T* out_ = nullptr;
    T* rows_;  // h', for a thread's own elements
    int64_t pitch_;
    bool vec_rows_;
};

}  // namespace xlayer::cuda::hyper
