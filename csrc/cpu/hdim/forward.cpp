// hdim forward: scores a block of queries against their allowed pairs, applies softmax to each row, and multiplies the
// block's probabilities with the values. One task is one batch element and block of kQueryBlock queries; nothing of
// size Sq × Sk is stored.
#include "cpu/hdim/pairs.h"

namespace xlayer::cpu::XLAYER_ISA::hdim {

namespace {

template <class T>
struct Worker {
    HdimQueries<T> queries;
    HdimTile<T> tile;
    T* probability;       // [kQueryBlock][Sk], over the key list
    T* row;               // [Sk + a vector] logits of one query's allowed pairs
    int32_t* position;    // [Sk] of those pairs in the key list
    T *packed, *context;  // for gemm_streamed

    void allocate(Workspace& space, const HdimInputs& in, const HdimSizes& s) {
        queries.allocate(space, s);
        tile.allocate(space, s, false, false);
        probability = space.take<T>(kQueryBlock, in.keys);
        row = space.take<T>(round_up(in.keys, kPairTile));
        position = space.take<int32_t>(in.keys);
        packed = space.take<T>(packed_size<T>);
        context = space.take<T>(kQueryBlock, kPanelColumns<T>);
    }
};

template <class T>
struct Plan {
    HdimSizes sizes;
    HdimWeights<T> weights;
    HdimKeys<T> keys;
    bool* finite;  // [B][Sk] per listed key: its value row holds no NaN or inf; only with a pair mask
    char* workers;
    int64_t worker_bytes, bytes;

    Plan(const HdimInputs& in, void* workspace, int64_t threads) : sizes(HdimSizes::of<T>(in)) {
        Workspace space(workspace), worker_space{nullptr};
        weights.allocate(space, sizes);
        keys.allocate(space, in, sizes);
        finite = space.take<bool>(in.attn_mask == nullptr ? 0 : in.batch, in.keys);
        Worker<T>{}.allocate(worker_space, in, sizes);
        worker_bytes = worker_space.bytes;
        workers = space.take<char>(worker_bytes, threads);
        bytes = space.bytes;
    }
};

// A pair mask allows a key to some queries only, so a NaN in its value must not reach the others through 0·NaN: such
// values stay out of the product and are added row by row.
template <class S>
void find_finite_values(const HdimInputs& in, const int32_t* index, int64_t n, int64_t b, bool* finite) {
    for (int64_t p = 0; p < n; ++p) {
        const S* value = static_cast<const S*>(in.value) + b * in.value_stride[0] + index[p] * in.value_stride[1];
        auto check = widen(S{}) * 0;
        for (int64_t h = 0; h < in.value_dim; ++h) check += widen(value[h * in.value_stride[2]]) * 0;
        finite[p] = check == 0;
    }
}

// Turns n ≥ 1 logits into probabilities in place (row is padded to whole vectors).
template <class T>
XLAYER_INLINE void softmax_row(T* row, int64_t n, T* statistics, T* entropy) {
    T top = row[0];
    for (int64_t t = 1; t < n; ++t) top = max(top, row[t]);
    const int64_t padded = round_up(n, lanes<T>);
    for (int64_t t = n; t < padded; ++t) row[t] = -HUGE_VAL;
    Vec<T> sum = {}, moment = {};
    for (int64_t t = 0; t < padded; t += lanes<T>) {
        const Vec<T> shifted = load(row + t) - top;
        const Vec<T> weight = exponential(shifted);
        sum += weight;
        moment += weight > Vec<T>{} ? weight * shifted : weight;
        store<T>(row + t, weight);
    }
    const T total = sum_lanes<T>(sum), mean = sum_lanes<T>(moment) / total, inverse = 1 / total;
    statistics[0] = top, statistics[1] = total, statistics[2] = mean;
    *entropy = std::log(total) - mean;
    for (int64_t t = 0; t < padded; t += lanes<T>) store<T>(row + t, load(row + t) * inverse);
}

template <class Activation, class S, class T>
void forward_block(const HdimForward& args, const Plan<T>& plan, Worker<T>& w, int64_t b, int64_t first, int64_t rows) {
    const HdimInputs& in = args.in;
    const HdimSizes& s = plan.sizes;
    const int64_t n = plan.keys.count[b];
    const int32_t* index = plan.keys.index + b * in.keys;
    const T* packed_keys = plan.keys.packed + b * in.keys * s.Dp;
    const T* key_hidden = plan.keys.hidden + b * in.keys * s.Mp;

    w.queries.template pack<S>(in, s, plan.weights, b, first, rows);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t pairs = allowed_pairs(in, index, b, first + r, 0, n, w.position);
        for (int64_t t = 0; t < pairs; t += kPairTile) {
            const int64_t count = min(kPairTile, pairs - t);
            std::memcpy(w.tile.position, w.position + t, count * sizeof(int32_t));
            w.tile.gather(s, w.queries.packed + r * s.Dp, packed_keys, count);
            w.tile.template score<Activation, false>(s, plan.weights, w.queries.hidden + r * s.Mp, key_hidden, count);
            std::memcpy(w.row + t, w.tile.logit, count * sizeof(T));
        }
        const int64_t at = b * in.queries + first + r;
        T* statistics = static_cast<T*>(args.statistics) + at * kHdimStatistics;
        T& entropy = static_cast<T*>(args.row_entropy)[at];
        T* probability = w.probability + r * in.keys;
        clear(probability, n);
        if (pairs == 0) {
            statistics[0] = -HUGE_VAL;
            statistics[1] = statistics[2] = entropy = 0;
            continue;
        }
        softmax_row(w.row, pairs, statistics, &entropy);
        for (int64_t t = 0; t < pairs; ++t) probability[w.position[t]] = w.row[t];
    }

    const S* value = static_cast<const S*>(in.value) + b * in.value_stride[0];
    const bool* finite = in.attn_mask == nullptr ? nullptr : plan.finite + b * in.keys;
    S* context = static_cast<S*>(args.context) + (b * in.queries + first) * in.value_dim;
    gemm_streamed(
        rows, in.value_dim, n, w.probability, in.keys, 1, w.packed, w.context,
        [&](int64_t p, int64_t column, int64_t count, T* to) XLAYER_FLATTEN {
            if (finite != nullptr && !finite[p]) return clear(to, count);
            read_row(value + index[p] * in.value_stride[1] + column * in.value_stride[2], in.value_stride[2], count,
                     to);
        },
        [&](int64_t column, int64_t count, T* c, int64_t c_row) XLAYER_FLATTEN {
            for (int64_t p = 0; finite != nullptr && p < n; ++p) {
                if (finite[p]) continue;
                const S* from = value + index[p] * in.value_stride[1] + column * in.value_stride[2];
                for (int64_t r = 0; r < rows; ++r) {
                    if (in.attn_mask[b * in.attn_mask_stride[0] + (first + r) * in.attn_mask_stride[1] +
                                     index[p] * in.attn_mask_stride[2]] == 0)
                        continue;
                    const T weight = w.probability[r * in.keys + p];
                    for (int64_t h = 0; h < count; ++h)
                        c[r * c_row + h] += weight * widen(from[h * in.value_stride[2]]);
                }
            }
            for (int64_t r = 0; r < rows; ++r) write_row(c + r * c_row, count, context + r * in.value_dim + column);
        });
}

template <class Activation, class S, class T>
void run_forward(const HdimForward& args) {
    const HdimInputs& in = args.in;
    Plan<T> plan(in, args.workspace, args.pool.threads);
    plan.weights.template pack<S>(in, plan.sizes);
    parallel_for_each(args.pool, in.batch, [&](int64_t b) {
        plan.keys.template pack<S>(in, plan.sizes, plan.weights, b);
        if (in.attn_mask != nullptr)
            find_finite_values<S>(in, plan.keys.index + b * in.keys, plan.keys.count[b], b, plan.finite + b * in.keys);
    });
    const int64_t blocks = ceil_div(in.queries, kQueryBlock);
    parallel_tasks(args.pool, in.batch * blocks, [&](int64_t index, int64_t task) {
        Worker<T> worker;
        Workspace space{plan.workers + index * plan.worker_bytes};
        worker.allocate(space, in, plan.sizes);
        worker.tile.reset(plan.sizes);
        const int64_t first = task % blocks * kQueryBlock;
        forward_block<Activation, S>(args, plan, worker, task / blocks, first, min(kQueryBlock, in.queries - first));
    });
}

}  // namespace

int64_t forward_workspace(const HdimForward& args) {
    return args.in.dtype == DType::float64 ? Plan<double>(args.in, nullptr, args.pool.threads).bytes
                                           : Plan<float>(args.in, nullptr, args.pool.threads).bytes;
}

void forward(const HdimForward& args) {
    dispatch_types(args.in, [&](auto activation, auto element, auto accumulation) {
        run_forward<decltype(activation), decltype(element), decltype(accumulation)>(args);
    });
}

}  // namespace xlayer::cpu::XLAYER_ISA::hdim
