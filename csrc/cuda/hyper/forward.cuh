// A token of hyper's forward, as a block computes it: see forward.cu.
#pragma once

#include "cuda/hyper/common.cuh"

namespace xlayer::cuda::hyper {

constexpr int kForwardWarps = 8;
constexpr int kForwardThreads = kForwardWarps * kWarp;
constexpr int64_t kSharedBytes = 80 * 1024;  // at most: two blocks on a multiprocessor

// Elements of d that a thread has at a time, and columns of the weight in one pass over them: what registers hold.
template <class T, int N>
constexpr int kForwardElements = N == 0 ? 1 : (N == 8 ? 8 : 16) / sizeof(T);
template <int N>
constexpr int kColumns = N == 0   ? 1
                         : N == 4 ? 2
                                  : (N + 2) / 2;

// Blocks on a multiprocessor: so many that a thread has the registers that it needs.
template <class T, int N>
constexpr int kForwardBlocks = sizeof(T) == 8 || N == 8 ? 1 : 2;

constexpr int64_t kForwardGrid = 264;  // blocks that are there at once on an H200, where each has several tokens

struct Forward {
    HyperForward args;
    bool post, dynamic, has_logits;  // has_logits: z and statistics are there already
    bool whole_in, whole_out, whole_branch, whole_rest;
    int64_t pitch;  // of rows in shared memory
    int64_t shared_bytes;
    bool staged;    // h' is kept in shared memory
    int64_t ahead;  // where in it lies what is copied ahead for the next token, h and y: bytes; 0: nowhere
};

template <class A, int N>
struct ForwardShared {
    static constexpr int kSums = kMost<N> * (kColumns<N> + 2);
    A post[kMostNumbers<N>], z[kMostNumbers<N>], c[kMostNumbers<N>];
    A mean[kMost<N>], inverse[kMost<N>];
    A partial[kForwardWarps * kSums], sum[kSums];
    A matrix[kMost<N> * kMost<N>];
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

    __device__ __forceinline__ ForwardToken(const Forward& with, int64_t token)
        : with_(with), args_(with.args), token_(token), n_(streams_of<N>(with.args.size)), d_(with.args.size.width) {
        const HyperStreams<const void*>& in = args_.in;
        in_ = static_cast<const T*>(in.data) + token_offset(args_.size, in.stride, token);
        if (with.post) out_ = static_cast<T*>(args_.out.data) + token_offset(args_.size, args_.out.stride, token);
        if (with.staged) {
            rows_ = reinterpret_cast<T*>(shared_memory<char>() + kForwardShared<A, N>);
            pitch_ = with.pitch;
            whole_rows_ = true;
        } else {
            rows_ = with.post ? out_ : const_cast<T*>(in_);
            pitch_ = with.post ? args_.out.stride[2] : in.stride[2];
            whole_rows_ = with.post ? with.whole_out : with.whole_in;
        }
    }

    // Has the thread's elements of h and y at e copied to shared memory.
    __device__ __forceinline__ void copy_ahead(int64_t e) const {
        if constexpr (kCopies) {
            T* const to = ahead() + e;
#pragma unroll
            for (int j = 0; j < kMost<N>; ++j) copy_async(to + j * with_.pitch, in_ + j * args_.in.stride[2] + e);
            if (!with_.post) return;
            const T* y = static_cast<const T*>(args_.post.branch.data) +
                         token_offset(args_.size, args_.post.branch.stride, token_);
            copy_async(to + kMost<N> * with_.pitch, y + e);
        }
    }
    __device__ __forceinline__ void copy_ahead() const {
        for (int64_t e = static_cast<int64_t>(threadIdx.x) * V; e < d_; e += kStep) copy_ahead(e);
        commit_copies();
    }

    __device__ __forceinline__ void run() {
        load_numbers();
        const bool layer = with_.dynamic && args_.connection.norm == HyperNorm::layer;
        if (with_.post || layer || with_.staged) mix_streams(layer);
        if (!args_.pre) return;
        if (with_.dynamic) {
            if (!with_.has_logits) products();
            if (threadIdx.x < kWarp) coefficients();
            sync_block();
        }
        branch_input();
    }

  private:
    __device__ __forceinline__ static ForwardShared<A, N>& shared() { return *shared_memory<ForwardShared<A, N>>(); }
    __device__ __forceinline__ T* ahead() const { return reinterpret_cast<T*>(shared_memory<char>() + with_.ahead); }
    __device__ __forceinline__ bool real(int j) const { return N != 0 || j < n_; }

    // The numbers that the token comes with: post's coefficients, z, or what is static.
    __device__ __forceinline__ void load_numbers() {
        const int numbers = n_ * (n_ + 2);
        sync_block();  // the token before is done with them
        const A* post = static_cast<const A*>(args_.post.coefficients);
        if (with_.post && !args_.post.shared) post += token_ * numbers;
        for (int at = static_cast<int>(threadIdx.x); at < numbers; at += kForwardThreads) {
            if (with_.post) shared().post[at] = post[at];
            if (args_.pre && !with_.dynamic) shared().c[at] = static_cast<const A*>(args_.connection.base)[at];
            if (with_.has_logits) shared().z[at] = static_cast<const A*>(args_.logits)[token_ * numbers + at];
        }
        sync_block();
    }

    // The thread's elements of h and y at e, copied ahead or not.
    __device__ __forceinline__ void read_token(int64_t e, Vector<T, V> (&h)[kMost<N>], A (&y)[V]) const {
        const int64_t count = d_ - e;
        if (kCopies && with_.ahead > 0) {
#pragma unroll
            for (int j = 0; j < kMost<N>; ++j) {
                if (real(j)) h[j] = load_vec<V>(ahead() + j * with_.pitch + e);
            }
            if (!with_.post) return;
            const Vector<T, V> some = load_vec<V>(ahead() + n_ * with_.pitch + e);
#pragma unroll
            for (int v = 0; v < V; ++v) y[v] = widen(some.at[v]);
            return;
        }
#pragma unroll
        for (int j = 0; j < kMost<N>; ++j) {
            if (real(j)) h[j] = read<V>(in_ + j * args_.in.stride[2] + e, count, with_.whole_in);
        }
        if (!with_.post) return;
        read_branch<T>(args_.size.branch_dtype, args_.post.branch.data,
                       token_offset(args_.size, args_.post.branch.stride, token_) + e, count, with_.whole_branch, y);
    }

    // h' to memory and to shared memory, and the means of its rows.
    __device__ __forceinline__ void mix_streams(bool layer) {
        A sum[kMost<N>] = {};
        const int64_t next = token_ + gridDim.x;
        if (with_.ahead > 0) wait_copies<0>();
        for (int64_t begin = 0; begin < d_; begin += kStep) {
            sync_warp();  // holds the loads of the coefficients: they would take too
                          // many registers
            const int64_t e = begin + static_cast<int64_t>(threadIdx.x) * V;
            if (e >= d_) continue;
            const int64_t count = d_ - e;
            Vector<T, V> h[kMost<N>];
            A y[V] = {};
            read_token(e, h, y);
#pragma unroll
            for (int k = 0; k < kMost<N>; ++k) {
                if (!real(k)) continue;
                const Vector<T, V> mixed = with_.post ? mix<T, N>(n_, k, shared().post, h, y) : h[k];
                if (with_.post) write(out_ + k * args_.out.stride[2] + e, mixed, count, with_.whole_out);
                if (with_.staged) store_vec<Space::generic>(rows_ + k * pitch_ + e, mixed);
#pragma unroll
                for (int v = 0; v < V; ++v) sum[k] += widen(mixed.at[v]);
            }
        }
        // Only now, when what lay there has been used.
        if (with_.ahead > 0 && next < tokens_of(args_.size)) ForwardToken(with_, next).copy_ahead();
        if (!layer) return;
        sum_over_block<kMost<N>, kForwardWarps>(sum, shared().partial, shared().sum);
        sync_block();
        if (static_cast<int>(threadIdx.x) < n_)
            shared().mean[threadIdx.x] = shared().sum[threadIdx.x] / static_cast<A>(d_);
        sync_block();
    }

    // z = norm(h') · weight, for norms of each stream.
    __device__ __forceinline__ void products() {
        const bool layer = args_.connection.norm == HyperNorm::layer;
        A mean[kMost<N>];
#pragma unroll
        for (int j = 0; j < kMost<N>; ++j) mean[j] = layer && real(j) ? shared().mean[j] : A(0);
        for (int first = 0; first < n_ + 2; first += kColumns<N>) {
            A sum[kMost<N> * (kColumns<N> + 2)] = {};  // of products, then of h' − mean and its squares
            for (int64_t begin = 0; begin < d_; begin += kStep) {
                sync_warp();  // and of the means
                const int64_t e = begin + static_cast<int64_t>(threadIdx.x) * V;
                if (e >= d_) continue;
                const int64_t count = d_ - e;
                A h[kMost<N>][V];
#pragma unroll
                for (int j = 0; j < kMost<N>; ++j) {
                    if (!real(j)) continue;
                    const Vector<T, V> row = read<V>(rows_ + j * pitch_ + e, count, whole_rows_);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        h[j][v] = v < count ? widen(row.at[v]) - mean[j] : A(0);
                        sum[kMost<N> * kColumns<N> + j] += h[j][v];
                        A& squares = sum[kMost<N> * (kColumns<N> + 1) + j];
                        squares = fma(h[j][v], h[j][v], squares);
                    }
                }
#pragma unroll
                for (int m = 0; m < kColumns<N>; ++m) {
                    const A* weight = static_cast<const A*>(args_.connection.weight) + (first + m) * d_ + e;
                    const Vector<A, V> w = read<V>(weight, count, with_.whole_rest);
#pragma unroll
                    for (int j = 0; j < kMost<N>; ++j) {
                        if (!real(j)) continue;
#pragma unroll
                        for (int v = 0; v < V; ++v) {
                            A& product = sum[j * kColumns<N> + m];
                            product = fma(h[j][v], w.at[v], product);
                        }
                    }
                }
            }
            sum_over_block<kMost<N>*(kColumns<N> + 2), kForwardWarps>(sum, shared().partial, shared().sum);
            sync_block();
            finish_products(first);
            sync_block();
        }
    }

    __device__ __forceinline__ void finish_products(int first) {
        const int thread = static_cast<int>(threadIdx.x), j = thread / kColumns<N>, m = first + thread % kColumns<N>;
        if (thread >= kMost<N> * kColumns<N> || j >= n_) return;
        const A width = static_cast<A>(d_);
        A mean = 0, off = 0, level = 0;  // off: by how much the mean had been rounded, level: what it adds to z
        if (args_.connection.norm == HyperNorm::layer) {
            off = shared().sum[kMost<N> * kColumns<N> + j] / width;
            mean = shared().mean[j];
            level = off * static_cast<const A*>(args_.workspace)[m];
        }
        const A squares = shared().sum[kMost<N> * (kColumns<N> + 1) + j];
        const A inverse = A(1) / sqrt(squares / width - off * off + static_cast<A>(args_.connection.eps));
        shared().z[j * (n_ + 2) + m] = inverse * (shared().sum[thread] - level);
        if (m > 0) return;
        A* statistics = static_cast<A*>(args_.statistics) + (token_ * n_ + j) * kHyperStatistics;
        statistics[0] = mean, statistics[1] = off, statistics[2] = inverse;
    }

    // c from z, by the first warp.
    __device__ __forceinline__ void coefficients() {
        const HyperConnection& connection = args_.connection;
        const int columns = n_ + 2, numbers = n_ * columns;
        const bool constrained = is_constrained(connection);
        A* const c = static_cast<A*>(args_.coefficients) + token_ * numbers;
        for (int at = lane_of_warp(); at < numbers; at += kWarp) {
            const A z = shared().z[at];
            if (!with_.has_logits) static_cast<A*>(args_.logits)[token_ * numbers + at] = z;
            const NumberParameters<A> with(connection, at, columns);
            const int j = at / columns, m = at % columns;
            A number;
            if (!constrained) {
                const A in = z + with.bias;
                number = with.base + with.scale * (connection.form == HyperForm::tanh ? tanh(in) : in);
            } else {
                number = with.base + with.scale * z;
                if (m > 0 && m <= n_) {
                    shared().matrix[j * n_ + m - 1] = number;
                    continue;
                }
                number = (m == 0 ? A(1) : A(2)) * sigmoid(number);
            }
            shared().c[at] = c[at] = number;
        }
        if (!constrained) return;
        Sinkhorn<A>(connection, n_, lane_of_warp(), true).forward(shared().matrix);
        for (int at = lane_of_warp(); at < n_ * n_; at += kWarp) {
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
            for (int j = 0; j < kMost<N>; ++j) {
                if (!real(j)) continue;
                const A factor = shared().c[j * (n_ + 2)];
                const Vector<T, V> row = read<V>(rows_ + j * pitch_ + e, count, whole_rows_);
#pragma unroll
                for (int v = 0; v < V; ++v) sum[v] = fma(factor, widen(row.at[v]), sum[v]);
            }
            Vector<T, V> out;
#pragma unroll
            for (int v = 0; v < V; ++v) out.at[v] = narrow<T>(sum[v]);
            write(x + e, out, count, with_.whole_rest);
        }
    }

    const Forward& with_;
    const HyperForward& args_;
    int64_t token_;
    int n_;
    int64_t d_;
    const T* in_;
    T* out_ = nullptr;
    T* rows_;  // h', for a thread's own elements
    int64_t pitch_;
    bool whole_rows_;
};

}  // namespace xlayer::cuda::hyper
