// depth_attention (xlayer/aggregate.h): one layer's softmax over earlier taps, between matrix products, and its
// backward; then the gradients of keys and values, of all layers at once.
//
// A team of lanes, at most a warp, has one head of one token; the softmax weights are in shared memory. Gradients of
// keys and values are sums over the layers that attended to them, made from the saved weights after the last layer's
// backward: each is written once, and rounded once.
#include "cuda/aggregate/common.cuh"

namespace xlayer::cuda::aggregate {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxSharedBytes = 32 * 1024;

struct Call {
    AttentionStepBackward args;
    int lanes;
};

// NaN wins, as it must: max would drop it.
template <class A>
__device__ __forceinline__ A max_nan(A a, A b) {
    return a > b || a != a ? a : b;
}

// A head of a token, and the taps that it attends to.
template <class T, int V>
class HeadThread {
    using A = Accumulator<T>;

  public:
    const AttentionStep& s_;
    Team<A> team_;
    int64_t token_ = 0, column_ = 0, row_ = 0;  // column_: where the head begins
    int64_t first_, count_;                     // taps
    bool there_ = false;

    __device__ __forceinline__ HeadThread(const AttentionStep& step, int lanes)
        : s_(step), team_(lanes, nullptr), first_(step.layer + 1 < step.window ? 0 : step.layer + 1 - step.window) {
        count_ = step.layer + 1 - first_;
    }

    // Calls f() for every row that the block's teams have, all threads together.
    template <class F>
    __device__ __forceinline__ void for_rows(const F& f) {
        const int64_t teams = kThreads / team_.lanes, rows = s_.tokens * s_.num_heads;
        for (int64_t first = blockIdx.x * teams; first < rows; first += gridDim.x * teams) {
            row_ = first + team_.index, there_ = row_ < rows;
            token_ = row_ / s_.num_heads, column_ = row_ % s_.num_heads * s_.head_width;
            f();
            sync_warp();  // what is in shared memory has been read
        }
    }

    __device__ __forceinline__ const T* tap(const LayerRows& rows, int64_t j) const {
        return static_cast<const T*>(rows.data) + (first_ + j) * rows.layer_stride + token_ * rows.token_stride +
               column_;
    }
    __device__ __forceinline__ int64_t offset() const { return token_ * s_.num_heads * s_.head_width + column_; }

    // Calls f(column) for this lane's vectors.
    template <class F>
    __device__ __forceinline__ void for_columns(const F& f) const {
        for (int64_t c = team_.lane * V; c < s_.head_width && there_; c += team_.lanes * V) f(c);
    }

    // ⟨row, tap j⟩, equal in all lanes; 0 where row is null.
    __device__ __forceinline__ A dot(const T* row, const LayerRows& rows, int64_t j) {
        A sum[1] = {};
        if (row != nullptr) {
            const T* const other = tap(rows, j);
            for_columns([&](int64_t c) {
                const Vector<T, V> a = load_vec<V>(row + c), b = load_vec<V>(other + c);
#pragma unroll
                for (int v = 0; v < V; ++v) sum[0] = fma(widen(a.at[v]), widen(b.at[v]), sum[0]);
            });
        }
        team_.add(sum);
        return sum[0];
    }

    // to = Σ_j factors[j] · tap j
    __device__ __forceinline__ void combine(const A* factors, const LayerRows& rows, T* to) const {
        for_columns([&](int64_t c) {
            A sum[V] = {};
#pragma unroll 4
            for (int64_t j = 0; j < count_; ++j) {
                const Vector<T, V> some = load_vec<V>(tap(rows, j) + c);
#pragma unroll
                for (int v = 0; v < V; ++v) sum[v] = fma(factors[j], widen(some.at[v]), sum[v]);
            }
            store_narrow<T, V>(to + c, sum);
        });
    }

    // The logits to shared memory; returns the largest.
    __device__ __forceinline__ A score(A* logits) {
        const T* const query = static_cast<const T*>(s_.query);
        A top = A(-INFINITY);
        for (int64_t j = 0; j < count_; ++j) {
            const A logit = static_cast<A>(s_.scale) * dot(query == nullptr ? query : query + offset(), s_.keys, j);
            if (team_.lane == 0) logits[j] = logit;
            top = max_nan(top, logit);
        }
        return top;
    }
};

// resources: attention_step_kernel threads 256, registers 80, shared 32768, occupancy 0.375
// sass: attention_step_kernel<*, [!1]> LDG.128, only STG.128
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3) attention_step_kernel(Call call) {
    using A = Accumulator<T>;
    const AttentionStep& s = call.args.step;
    HeadThread<T, V> head(s, call.lanes);
    A* const weights = shared_memory<A>() + head.team_.index * s.window;
    head.for_rows([&] {
        const A top = head.score(weights);
        sync_warp();
        A total[1] = {};
        for (int64_t j = head.team_.lane; j < head.count_; j += call.lanes)
            total[0] += weights[j] = exp(weights[j] - top);
        head.team_.add(total);
        for (int64_t j = head.team_.lane; j < head.count_; j += call.lanes) weights[j] /= total[0];
        sync_warp();
        head.combine(weights, s.values, static_cast<T*>(s.attended) + head.offset());
    });
}

// resources: attention_step_backward_kernel threads 256, registers 128, shared 32768, occupancy 0.25
// sass: attention_step_backward_kernel<*, [!1]> LDG.128, STG
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) attention_step_backward_kernel(Call call) {
    using A = Accumulator<T>;
    const AttentionStepBackward& args = call.args;
    const AttentionStep& s = args.step;
    HeadThread<T, V> head(s, call.lanes);
    A *const weights = shared_memory<A>() + head.team_.index * 2 * s.window, *const grads = weights + s.window;
    head.for_rows([&] {
        const T* const grad = static_cast<const T*>(args.grad_attended) + head.offset();
        const A top = head.score(weights);
        for (int64_t j = 0; j < head.count_; ++j) {
            const A of_weight = head.dot(grad, s.values, j);
            if (head.team_.lane == 0) grads[j] = of_weight;
        }
        sync_warp();
        A sum[2] = {};  // of the weights, and of the weights times their gradients
        for (int64_t j = head.team_.lane; j < head.count_; j += call.lanes) {
            const A weight = weights[j] = exp(weights[j] - top);
            sum[0] += weight;
            sum[1] = fma(weight, grads[j], sum[1]);
        }
        head.team_.add(sum);
        const int64_t place = ((s.layer * s.tokens + head.token_) * s.num_heads + head.row_ % s.num_heads) * s.window;
        for (int64_t j = head.team_.lane; j < head.count_; j += call.lanes) {
            const A weight = weights[j] / sum[0];
            grads[j] = weight * (grads[j] - sum[1] / sum[0]) * static_cast<A>(s.scale);
            if (!head.there_) continue;
            static_cast<A*>(args.weights)[place + head.count_ - 1 - j] = weight;
            static_cast<A*>(args.grad_logits)[place + head.count_ - 1 - j] = grads[j];
        }
        sync_warp();
        head.combine(grads, s.keys, static_cast<T*>(args.grad_query) + head.offset());
    });
}

// A thread per vector of a tap's key and value.
// resources: attention_gradients_kernel threads 256, registers 64, shared 0, occupancy 0.5
// sass: attention_gradients_kernel<*, [!1]> LDG.128, only STG.128
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4) attention_gradients_kernel(AttentionGradients args) {
    using A = Accumulator<T>;
    const AttentionStep& s = args.step;
    const int64_t width = s.num_heads * s.head_width, vectors = width / V,
                  step = static_cast<int64_t>(gridDim.x) * kThreads;
    const int64_t rows = s.layers * s.tokens;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < rows * vectors; at += step) {
        const int64_t row = at / vectors, e = at % vectors * V, layer = row / s.tokens;
        const int64_t layers = s.layers - layer < s.window ? s.layers - layer : s.window;
        const int64_t head = static_cast<unsigned>(e) / static_cast<unsigned>(s.head_width);
        A key[V] = {}, value[V] = {};
#pragma unroll 2
        for (int64_t back = 0; back < layers; ++back) {
            const int64_t from = row + back * s.tokens, number = (from * s.num_heads + head) * s.window + back;
            const A weight = static_cast<const A*>(args.weights)[number];
            const A logit = static_cast<const A*>(args.grad_logits)[number];
            const Vector<T, V> query = load_vec<V>(static_cast<const T*>(args.query) + from * width + e);
            const Vector<T, V> grad = load_vec<V>(static_cast<const T*>(args.grad_attended) + from * width + e);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                key[v] = fma(logit, widen(query.at[v]), key[v]);
                value[v] = fma(weight, widen(grad.at[v]), value[v]);
            }
        }
        store_narrow<T, V>(static_cast<T*>(args.grad_keys) + row * width + e, key);
        store_narrow<T, V>(static_cast<T*>(args.grad_values) + row * width + e, value);
    }
}

// Calls f(element, length of vectors) for what the arrays allow.
template <class F>
void dispatch_vector_length(const AttentionStep& s, std::initializer_list<const void*> arrays, const F& f) {
    dispatch_dtype(s.dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int full = 16 / sizeof(T);
        bool vectors = vector_length<T>(nullptr, s.head_width) > 1;
        for (const LayerRows& rows : {s.keys, s.values})
            vectors = vectors && vector_length<T>(rows.data, rows.layer_stride, rows.token_stride) > 1;
        for (const void* array : arrays) vectors = vectors && vector_length<T>(array) > 1;
        vectors ? f(element, std::integral_constant<int, full>{}) : f(element, std::integral_constant<int, 1>{});
    });
}

// Launches a step's kernel, whose teams have `arrays` rows of numbers in shared memory each.
void launch_step(const char* name, void (*kernel)(Call), Call call, int length, int arrays, void* stream) {
    const AttentionStep& s = call.args.step;
    const int64_t bytes = s.window * arrays * (s.dtype == DType::float64 ? 8 : 4);
    call.lanes = team_lanes(s.head_width, length, kWarpSize);
    while (call.lanes < kWarpSize && kThreads / call.lanes * bytes > kMaxSharedBytes) call.lanes *= 2;
    const int64_t teams = kThreads / call.lanes;
    launch(name, kernel,
           {min_size(ceil_div(s.tokens * s.num_heads, teams), kMaxBlocks), kThreads, stream,
            static_cast<size_t>(teams * bytes)},
           call);
}

}  // namespace

void attention_step(const AttentionStep& args, void* stream) {
    dispatch_vector_length(args, {args.query, args.attended}, [&](auto element, auto length) {
        using T = decltype(element);
        constexpr int V = decltype(length)::value;
        Call call{};
        call.args.step = args;
        launch_step("attention_step", attention_step_kernel<T, V>, call, V, 1, stream);
    });
}

void attention_step_backward(const AttentionStepBackward& args, void* stream) {
    dispatch_vector_length(
        args.step, {args.step.query, args.grad_attended, args.grad_query}, [&](auto element, auto length) {
            using T = decltype(element);
            constexpr int V = decltype(length)::value;
            launch_step("attention_step_backward", attention_step_backward_kernel<T, V>, Call{args, 0}, V, 2, stream);
        });
}

void attention_gradients(const AttentionGradients& args, void* stream) {
    const AttentionStep& s = args.step;
    dispatch_vector_length(s, {args.query, args.grad_attended, args.grad_keys, args.grad_values},
                           [&](auto element, auto length) {
                               using T = decltype(element);
                               constexpr int V = decltype(length)::value;
                               const int64_t count = s.layers * s.tokens * (s.num_heads * s.head_width / V);
                               launch("attention_gradients", attention_gradients_kernel<T, V>,
                                      {min_size(ceil_div(count, kThreads), kMaxBlocks), kThreads, stream}, args);
                           });
}

}  // namespace xlayer::cuda::aggregate
