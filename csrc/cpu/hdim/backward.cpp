// hdim backward: recomputes the scores and rebuilds the probabilities from each row's statistics, so nothing of size
// Sq × Sk is stored. One task is one batch element and chunk of keys, and loops over all queries: gradients of keys and
// values are complete within the task; those of queries and weights are partial sums, added in task order.
#include "cpu/hdim/pairs.h"

namespace xlayer::cpu::XLAYER_ISA::hdim {

namespace {

// Keys per task: 64 keep a pair tile busy; fewer when there are few tasks, more when the partial query gradients
// (one [Sq,D] per chunk) would grow. A function of the sizes only, so that the bits do not depend on the machine.
int64_t chunk_size(const HdimInputs& in) {
    const int64_t tasks = in.batch * ceil_div(in.keys, kPairTile);
    if (tasks < 8 && in.keys > kPairTile) return kPairTile / 2;
    return max(kPairTile, round_up(ceil_div(in.keys, 16), kPairTile));
}

// Partial sums of one task.
template <class T>
struct Partial {
    T *query_weight, *key_weight, *pair_weight, *bias1, *weight2;  // [M][Dp], [M][Dp], [M][Fp], [Mp], [Mp]

    void allocate(Workspace& space, const HdimSizes& s) {
        query_weight = space.take<T>(s.M, s.Dp);
        key_weight = space.take<T>(s.M, s.Dp);
        pair_weight = space.take<T>(s.M, s.Fp);
        bias1 = space.take<T>(s.Mp);
        weight2 = space.take<T>(s.Mp);
    }
    T* begin() const { return query_weight; }  // all of it is one array
};

template <class T>
struct Worker {
    HdimQueries<T> queries;
    HdimTile<T> tile;
    Partial<T> block;        // sums of one block of queries: short sums first keep the rounding error small
    T* probability;          // [Sq][chunk]: first ∂L/∂P, overwritten row by row with P
    T* grad_logit;           // [kPairTile], zero beyond the tile
    T* grad_feature;         // [kPairTile][Fp] and slack
    T* grad_query_hidden;    // [kQueryBlock][Mp]
    T* grad_key_hidden;      // [chunk][Mp]
    T* grad_key;             // [chunk][Dp]
    T *packed, *grad_value;  // for gemm_streamed
    int32_t* position;       // [chunk]

    void allocate(Workspace& space, const HdimInputs& in, const HdimSizes& s, int64_t chunk) {
        queries.allocate(space, s);
        tile.allocate(space, s, true, in.gelu);
        block.allocate(space, s);
        probability = space.take<T>(in.queries, chunk);
        grad_logit = space.take<T>(kPairTile);
        grad_feature = space.take<T>((kPairTile + 1) * s.Fp + 2 * lanes<T>);
        grad_query_hidden = space.take<T>(kQueryBlock, s.Mp);
        grad_key_hidden = space.take<T>(chunk, s.Mp);
        grad_key = space.take<T>(chunk, s.Dp);
        packed = space.take<T>(packed_size<T>);
        grad_value = space.take<T>(chunk, kPanelColumns<T>);
        position = space.take<int32_t>(chunk);
    }
};

template <class T>
struct Plan {
    HdimSizes sizes;
    int64_t chunk, chunks;
    HdimWeights<T> weights;
    T *query_back, *key_back, *pair_back;  // W1's blocks as they lie: [M][Dp], [M][Dp], [M][Fp]
    HdimKeys<T> keys;
    const T* grad_context;  // the argument, or a copy in T
    T* delta;               // [B][Sq] Σ_j P_ij ∂L/∂P_ij = grad_context · context
    T* grad_query;          // [B][chunks][Sq][Dp] partial sums
    char *partials, *workers;
    int64_t partial_bytes, worker_bytes, bytes;

    Plan(const HdimBackward& args, int64_t threads) : sizes(HdimSizes::of<T>(args.in)) {
        const HdimInputs& in = args.in;
        const HdimSizes& s = sizes;
        chunk = chunk_size(in);
        chunks = ceil_div(in.keys, chunk);
        Workspace space(args.workspace), partial_space{nullptr}, worker_space{nullptr};
        weights.allocate(space, s);
        query_back = space.take<T>(s.M, s.Dp);
        key_back = space.take<T>(s.M, s.Dp);
        pair_back = space.take<T>(s.M, s.Fp);
        keys.allocate(space, in, s);
        const bool copy = element_size(in.dtype) != sizeof(T);
        const T* copied = space.take<T>(copy ? in.batch : 0, in.queries, in.value_dim);
        grad_context = copy ? copied : static_cast<const T*>(args.grad_context);
        delta = space.take<T>(in.batch, in.queries);
        grad_query = space.take<T>(in.batch, chunks, in.queries, s.Dp);
        Partial<T>{}.allocate(partial_space, s);
        partial_bytes = partial_space.bytes;
        partials = space.take<char>(partial_bytes, in.batch, chunks);
        Worker<T>{}.allocate(worker_space, in, s, chunk);
        worker_bytes = worker_space.bytes;
        workers = space.take<char>(worker_bytes, threads);
        bytes = space.bytes;
    }

    int64_t partial_size() const { return partial_bytes / static_cast<int64_t>(sizeof(T)); }
    Partial<T> partial(int64_t task) const {
        Partial<T> p;
        Workspace space{partials + task * partial_bytes};
        p.allocate(space, sizes);
        return p;
    }

    template <class S>
    void pack_weights(const HdimInputs& in) {
        weights.template pack<S>(in, sizes);
        const int64_t D = sizes.D;
        const S* weight1 = static_cast<const S*>(in.weight1);
        clear(query_back, sizes.M * sizes.Dp);
        clear(key_back, sizes.M * sizes.Dp);
        clear(pair_back, sizes.M * sizes.Fp);
        for (int64_t m = 0; m < sizes.M; ++m) {
            read_row(weight1 + m * 4 * D, 1, D, query_back + m * sizes.Dp);
            read_row(weight1 + m * 4 * D + D, 1, D, key_back + m * sizes.Dp);
            read_row(weight1 + m * 4 * D + 2 * D, 1, 2 * D, pair_back + m * sizes.Fp);
        }
    }
};

// Σ_h grad_h · (value_h − context_h), the first without `value`; in double, one sum per lane, so that none waits.
template <class T, class S, class G>
XLAYER_INLINE T centered_product(const G* grad, const S* value, int64_t value_stride, const S* context, int64_t width) {
    double residue[lanes<T>] = {};
    for (int64_t h = 0; h < width; h += lanes<T>) {
        for (int64_t l = 0; l < min<int64_t>(lanes<T>, width - h); ++l) {
            const double from = value == nullptr ? 0 : widen(value[(h + l) * value_stride]);
            residue[l] += static_cast<double>(widen(grad[h + l])) * (from - widen(context[h + l]));
        }
    }
    double sum = 0;
    for (int64_t l = 0; l < lanes<T>; ++l) sum += residue[l];
    return static_cast<T>(sum);
}

// Whether query i has no allowed pair.
template <class T>
XLAYER_INLINE bool is_empty(const T* statistics, int64_t i) {
    return statistics[i * kHdimStatistics + 1] == 0;
}

// ∂L/∂logit for one query's pairs, and their probabilities, from `grad`, ∂L/∂P less its mean under P. What rounding has
// left of that mean, and of the entropy's, is taken off where the tile holds the whole row, so that the row's gradients
// sum to 0.
template <class T>
XLAYER_INLINE void softmax_backward(T* logit, T* grad, int64_t n, bool whole_row, const T* statistics, T grad_entropy,
                                    T* probability) {
    const T top = statistics[0], inverse = 1 / statistics[1], mean = statistics[2];
    for (int64_t t = n; t < kPairTile; ++t) {
        logit[t] = -HUGE_VAL;
        grad[t] = 0;
    }
    Vec<T> sum = {}, moment = {};
    for (int64_t t = 0; t < n; t += lanes<T>) {
        const Vec<T> shifted = load(logit + t) - top, weight = exponential(shifted);
        Vec<T> g = load(grad + t);
        if (grad_entropy != 0) g -= weight > Vec<T>{} ? (shifted - mean) * grad_entropy : weight;
        sum += weight;
        moment += weight * g;
        store<T>(grad + t, g);
        store<T>(probability + t, weight * inverse);
    }
    const T rest = whole_row ? sum_lanes<T>(moment) / sum_lanes<T>(sum) : 0;
    for (int64_t t = 0; t < n; t += lanes<T>) {
        const Vec<T> p = load(probability + t), g = p * (load(grad + t) - rest);
        store<T>(grad + t, p < splat<T>(1) ? g : p * 0);  // alone in its row: exactly 0
    }
}

// From ∂L/∂logit to ∂L/∂pre, in place of act(pre); adds up the gradients of w2, u_i and w_j on the way, in four sums
// each: short sums round less, and one would wait for itself.
template <class Activation, class T>
XLAYER_INLINE void hidden_backward(const HdimSizes& s, const HdimTile<T>& tile, const T* grad_logit, int64_t n,
                                   const T* weight2, T* grad_weight2, T* grad_query_hidden, T* grad_key_hidden) {
    constexpr int kSums = 4;
    for (int64_t m = 0; m < s.Mp; m += lanes<T>) {
        const Vec<T> w2 = load(weight2 + m);
        Vec<T> sum_w2[kSums] = {}, sum_u[kSums] = {};
        auto pair = [&](int64_t t, int k) XLAYER_FLATTEN {
            const Vec<T> act = load(tile.value + t * s.Mp + m);
            sum_w2[k] += grad_logit[t] * act;
            Vec<T> g = grad_logit[t] * w2;
            if constexpr (Activation::kKeepsSlope) {
                g *= load(tile.slope + t * s.Mp + m);
            } else {
                g = act > Vec<T>{} ? g : Vec<T>{};
            }
            sum_u[k] += g;
            store<T>(tile.value + t * s.Mp + m, g);
            T* w = grad_key_hidden + tile.position[t] * s.Mp + m;
            store<T>(w, load(w) + g);
        };
        int64_t t = 0;
        for (; t + kSums <= n; t += kSums) XLAYER_UNROLL for (int k = 0; k < kSums; ++k) pair(t + k, k);
        for (; t < n; ++t) pair(t, 0);
        store<T>(grad_weight2 + m, load(grad_weight2 + m) + ((sum_w2[0] + sum_w2[1]) + (sum_w2[2] + sum_w2[3])));
        store<T>(grad_query_hidden + m, load(grad_query_hidden + m) + ((sum_u[0] + sum_u[1]) + (sum_u[2] + sum_u[3])));
    }
}

// From ∂L/∂(q∘k) and ∂L/∂|q−k| to q and k; the slope of |·| at 0 is 0.
template <class T>
XLAYER_INLINE void feature_backward(const HdimSizes& s, const int32_t* position, const T* grad_feature, int64_t n,
                                    const T* query, const T* keys, T* grad_query, T* grad_keys) {
    for (int64_t d = 0; d < s.Dp; d += lanes<T>) {
        const Vec<T> q = load(query + d);
        Vec<T> sum = load(grad_query + d);
        for (int64_t t = 0; t < n; ++t) {
            const Vec<T> k = load(keys + position[t] * s.Dp + d);
            const Vec<T> hadamard = load(grad_feature + t * s.Fp + d);
            const Vec<T> difference = sign<T>(q - k) * load(grad_feature + t * s.Fp + s.D + d);
            sum += hadamard * k + difference;
            T* to = grad_keys + position[t] * s.Dp + d;
            store<T>(to, load(to) + (hadamard * q - difference));
        }
        store<T>(grad_query + d, sum);
    }
}

// Row 0 becomes the sum of all rows, in pairs of pairs; the others are lost.
template <class T>
void add_up_rows(T* array, int64_t rows, int64_t width) {
    for (int64_t step = 1; step < rows; step *= 2)
        for (int64_t r = 0; r + step < rows; r += 2 * step)
            for (int64_t e = 0; e < width; ++e) array[r * width + e] += array[(r + step) * width + e];
}

template <class Activation, class S, class T>
void backward_chunk(const HdimBackward& args, const Plan<T>& plan, Worker<T>& w, int64_t b, int64_t c) {
    const HdimInputs& in = args.in;
    const HdimSizes& s = plan.sizes;
    Partial<T> partial = plan.partial(b * plan.chunks + c);
    clear(partial.begin(), plan.partial_size());
    T* grad_query = plan.grad_query + (b * plan.chunks + c) * in.queries * s.Dp;
    clear(grad_query, in.queries * s.Dp);
    const int64_t begin = c * plan.chunk, n = min(plan.chunk, plan.keys.count[b] - begin);
    if (n <= 0) return;

    // The chunk's own view: positions count from its first key.
    const int32_t* index = plan.keys.index + b * in.keys + begin;
    const T* keys = plan.keys.packed + (b * in.keys + begin) * s.Dp;
    const T* key_hidden = plan.keys.hidden + (b * in.keys + begin) * s.Mp;
    const T* grad_context = plan.grad_context + b * in.queries * in.value_dim;
    const S* context = static_cast<const S*>(args.context) + b * in.queries * in.value_dim;
    const bool whole_row = plan.keys.count[b] <= kPairTile && n == plan.keys.count[b];
    const T* statistics = static_cast<const T*>(args.statistics) + b * in.queries * kHdimStatistics;
    const T* grad_entropy =
        args.grad_row_entropy == nullptr ? nullptr : static_cast<const T*>(args.grad_row_entropy) + b * in.queries;
    const S* value = static_cast<const S*>(in.value) + b * in.value_stride[0];
    clear(w.grad_key, n * s.Dp);
    clear(w.grad_key_hidden, n * s.Mp);

    // ∂L/∂P for all queries: grad_context · vᵀ.
    const Panels panels(ceil_div(n, lanes<T>));
    for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t first = panels.begin(p) * lanes<T>;
        gemm_packed_panel(
            in.queries, first, min(panels.width(p) * lanes<T>, n - first), in.value_dim, grad_context, in.value_dim, 1,
            w.packed,
            [&](int64_t h, int64_t column, int64_t count, T* to) XLAYER_FLATTEN {
                for (int64_t j = 0; j < count; ++j)
                    to[j] = widen(value[index[column + j] * in.value_stride[1] + h * in.value_stride[2]]);
            },
            w.probability + first, plan.chunk);
    }

    for (int64_t first = 0; first < in.queries; first += kQueryBlock) {
        const int64_t rows = min(kQueryBlock, in.queries - first);
        w.queries.template pack<S>(in, s, plan.weights, b, first, rows);
        clear(w.grad_query_hidden, rows * s.Mp);
        clear(w.block.begin(), plan.partial_size());
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t i = first + r;
            T* probability = w.probability + i * plan.chunk;
            const T* row = statistics + i * kHdimStatistics;
            const T delta = plan.delta[b * in.queries + i];
            const int64_t pairs = is_empty(statistics, i) ? 0 : allowed_pairs(in, index, b, i, 0, n, w.position);
            T* query = w.queries.packed + r * s.Dp;
            if (pairs == 0) {
                clear(probability, n);
                clear(query, s.Dp);  // 0·NaN would reach the weights
                continue;
            }
            for (int64_t t = 0; t < pairs; t += kPairTile) {
                const int64_t count = min(kPairTile, pairs - t);
                HdimTile<T>& tile = w.tile;
                std::memcpy(tile.position, w.position + t, count * sizeof(int32_t));
                for (int64_t k = 0; k < count; ++k) w.grad_logit[k] = probability[tile.position[k]] - delta;
                tile.gather(s, query, keys, count);
                tile.template score<Activation, true>(s, plan.weights, w.queries.hidden + r * s.Mp, key_hidden, count);
                // A pair that has most of its row: ∂L/∂P and its mean are nearly equal, each with a rounding of its
                // own.
                for (int64_t k = 0; !whole_row && row[1] < 2 && k < count; ++k) {
                    if (tile.logit[k] != row[0]) continue;
                    const S* from = value + index[tile.position[k]] * in.value_stride[1];
                    w.grad_logit[k] = centered_product<T>(grad_context + i * in.value_dim, from, in.value_stride[2],
                                                          context + i * in.value_dim, in.value_dim);
                }
                softmax_backward<T>(tile.logit, w.grad_logit, count, whole_row, row,
                                    grad_entropy == nullptr ? T(0) : grad_entropy[i], tile.logit);
                for (int64_t k = 0; k < count; ++k) probability[tile.position[k]] = tile.logit[k];
                hidden_backward<Activation, T>(s, tile, w.grad_logit, count, plan.weights.weight2, w.block.weight2,
                                               w.grad_query_hidden + r * s.Mp, w.grad_key_hidden);
                gemm(s.M, 2 * s.D, count, tile.value, 1, s.Mp, tile.features, s.Fp, w.block.pair_weight, s.Fp, true);
                gemm(count, 2 * s.D, s.M, tile.value, s.Mp, 1, plan.pair_back, s.Fp, w.grad_feature, s.Fp, false);
                feature_backward<T>(s, tile.position, w.grad_feature, count, query, keys, grad_query + i * s.Dp,
                                    w.grad_key);
            }
            // Pairs that are not allowed still hold ∂L/∂P.
            if (pairs < n)
                for (int64_t p = 0, t = 0; p < n; ++p) {
                    if (t < pairs && w.position[t] == p)
                        ++t;
                    else
                        probability[p] = 0;
                }
        }
        // u_i = b1 + W1a·q_i
        gemm(rows, s.D, s.M, w.grad_query_hidden, s.Mp, 1, plan.query_back, s.Dp, grad_query + first * s.Dp, s.Dp,
             true);
        gemm(s.M, s.D, rows, w.grad_query_hidden, 1, s.Mp, w.queries.packed, s.Dp, w.block.query_weight, s.Dp, true);
        add_up_rows(w.grad_query_hidden, rows, s.Mp);
        std::memcpy(w.block.bias1, w.grad_query_hidden, s.Mp * sizeof(T));
        for (int64_t e = 0; e < plan.partial_size(); ++e) partial.begin()[e] += w.block.begin()[e];
    }
    // w_j = W1b·k_j
    gemm(n, s.D, s.M, w.grad_key_hidden, s.Mp, 1, plan.key_back, s.Dp, w.grad_key, s.Dp, true);
    gemm(s.M, s.D, n, w.grad_key_hidden, 1, s.Mp, keys, s.Dp, partial.key_weight, s.Dp, true);
    S* grad_key = static_cast<S*>(args.grad_key) + b * in.keys * s.D;
    for (int64_t p = 0; p < n; ++p) write_row(w.grad_key + p * s.Dp, s.D, grad_key + index[p] * s.D);

    // ∂L/∂v = Pᵀ · grad_context
    S* grad_value = static_cast<S*>(args.grad_value) + b * in.keys * in.value_dim;
    gemm_streamed(
        n, in.value_dim, in.queries, w.probability, 1, plan.chunk, w.packed, w.grad_value,
        [&](int64_t i, int64_t column, int64_t count, T* to) XLAYER_FLATTEN {
            if (is_empty(statistics, i)) return clear(to, count);
            std::memcpy(to, grad_context + i * in.value_dim + column, count * sizeof(T));
        },
        [&](int64_t column, int64_t count, T* g, int64_t g_row) XLAYER_FLATTEN {
            for (int64_t p = 0; p < n; ++p)
                write_row(g + p * g_row, count, grad_value + index[p] * in.value_dim + column);
        });
}

template <class S, class T>
void add_up_queries(const HdimBackward& args, const Plan<T>& plan, int64_t b) {
    const HdimInputs& in = args.in;
    S* grad = static_cast<S*>(args.grad_query) + b * in.queries * in.proj_dim;
    T* sum = plan.grad_query + b * plan.chunks * in.queries * plan.sizes.Dp;
    const int64_t size = in.queries * plan.sizes.Dp;
    for (int64_t c = 1; c < plan.chunks; ++c)
        for (int64_t e = 0; e < size; ++e) sum[e] += sum[c * size + e];
    for (int64_t i = 0; i < in.queries; ++i) {
        if (plan.chunks == 0)
            clear(grad + i * in.proj_dim, in.proj_dim);
        else
            write_row(sum + i * plan.sizes.Dp, in.proj_dim, grad + i * in.proj_dim);
    }
}

template <class S, class T>
void add_up_weights(const HdimBackward& args, const Plan<T>& plan) {
    const HdimSizes& s = plan.sizes;
    const int64_t tasks = args.in.batch * plan.chunks;
    S* grad_weight1 = static_cast<S*>(args.grad_weight1);
    if (tasks == 0) {
        clear(grad_weight1, s.M * 4 * s.D);
        clear(static_cast<S*>(args.grad_bias1), s.M);
        clear(static_cast<S*>(args.grad_weight2), s.M);
        return;
    }
    const Partial<T> sum = plan.partial(0);
    T* const total = sum.begin();
    const int64_t size = plan.partial_size();
    parallel_for_each(args.pool, ceil_div(size, 1024), [&](int64_t block) {
        const int64_t end = min(size, (block + 1) * 1024);
        for (int64_t task = 1; task < tasks; ++task)
            for (int64_t e = block * 1024; e < end; ++e) total[e] += total[task * size + e];
    });
    for (int64_t m = 0; m < s.M; ++m) {
        S* row = grad_weight1 + m * 4 * s.D;
        write_row(sum.query_weight + m * s.Dp, s.D, row);
        write_row(sum.key_weight + m * s.Dp, s.D, row + s.D);
        write_row(sum.pair_weight + m * s.Fp, 2 * s.D, row + 2 * s.D);
    }
    write_row(sum.bias1, s.M, static_cast<S*>(args.grad_bias1));
    for (int64_t m = 0; m < s.M; ++m)  // the kernel's w2 is w2 / temperature
        narrow(sum.weight2[m] * static_cast<T>(1 / args.in.temperature), static_cast<S*>(args.grad_weight2) + m);
}

template <class Activation, class S, class T>
void run_backward(const HdimBackward& args) {
    const HdimInputs& in = args.in;
    Plan<T> plan(args, args.pool.threads);
    plan.template pack_weights<S>(in);
    parallel_for_each(args.pool, in.batch, [&](int64_t b) {
        plan.keys.template pack<S>(in, plan.sizes, plan.weights, b);
        if (in.key_mask == nullptr && in.attn_mask == nullptr) return;  // every key gets its gradient from a task
        clear(static_cast<S*>(args.grad_key) + b * in.keys * in.proj_dim, in.keys * in.proj_dim);
        clear(static_cast<S*>(args.grad_value) + b * in.keys * in.value_dim, in.keys * in.value_dim);
    });
    parallel_for_each(args.pool, in.batch * in.queries, [&](int64_t i) {
        const S* from = static_cast<const S*>(args.grad_context) + i * in.value_dim;
        const S* context = static_cast<const S*>(args.context) + i * in.value_dim;
        if constexpr (!std::is_same_v<S, T>)
            read_row(from, 1, in.value_dim, const_cast<T*>(plan.grad_context) + i * in.value_dim);
        plan.delta[i] = -centered_product<T, S>(from, nullptr, 0, context, in.value_dim);
    });
    parallel_tasks(args.pool, in.batch * plan.chunks, [&](int64_t index, int64_t task) {
        Worker<T> worker;
        Workspace space{plan.workers + index * plan.worker_bytes};
        worker.allocate(space, in, plan.sizes, plan.chunk);
        worker.tile.reset(plan.sizes);
        clear(worker.grad_feature, (kPairTile + 1) * plan.sizes.Fp + 2 * lanes<T>);
        backward_chunk<Activation, S>(args, plan, worker, task / plan.chunks, task % plan.chunks);
    });
    parallel_for_each(args.pool, in.batch, [&](int64_t b) { add_up_queries<S>(args, plan, b); });
    add_up_weights<S>(args, plan);
}

}  // namespace

int64_t backward_workspace(const HdimBackward& args) {
    return args.in.dtype == DType::float64 ? Plan<double>(args, args.pool.threads).bytes
                                           : Plan<float>(args, args.pool.threads).bytes;
}

void backward(const HdimBackward& args) {
    dispatch_types(args.in, [&](auto activation, auto element, auto accumulation) {
        run_backward<decltype(activation), decltype(element), decltype(accumulation)>(args);
    });
}

}  // namespace xlayer::cpu::XLAYER_ISA::hdim
