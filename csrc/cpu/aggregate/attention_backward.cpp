// depth_attention backward (xlayer/aggregate.h); queries and softmax weights are recomputed. Layers descend in two
// steps. Per tile of tokens: the gradients of the state, `carry`, of the query, and of the window's keys and values.
// Per panel of the weights' columns: their gradients, in which each sum runs over the tokens in order. A tap's
// gradients are summed from the newest layer that attended to it to the oldest: for T itself in place, else in a ring
// of rows of T as long as the window.
#include "cpu/aggregate/attention.h"

namespace xlayer::cpu::XLAYER_ISA::aggregate {
namespace {

template <class T>
class Backward {
  public:
    explicit Backward(const DepthAttentionBackward& args)
        : args_(args),
          attention_(args.attention),
          inner_(inner_width(attention_)),
          workspace_(args.workspace),
          to_query_(attention_.width, inner_, workspace_),
          from_query_(inner_, attention_.width, workspace_),
          from_state_(attention_.width, inner_, workspace_),
          grad_query_weight_(attention_.dtype, attention_.tokens, attention_.width, inner_, workspace_),
          grad_out_weight_(attention_.dtype, attention_.tokens, inner_, attention_.width, workspace_),
          tiles_(attention_.tokens, max_tile(), attention_.pool.threads) {
        zeros_ = workspace_.take<T>(attention_.width);
        carry_ = workspace_.take<T>(attention_.tokens, state_row());
        grad_query_ = workspace_.take<T>(attention_.tokens, inner_row());
        ring_ = workspace_.take<T>(same_dtype() ? 0 : attention_.tokens, max_taps(attention_), 2, inner_);
        workers_ = workspace_.take<T>(attention_.pool.threads, worker_size());
    }

    static int64_t workspace(const DepthAttentionBackward& args) {
        DepthAttentionBackward sizes = args;
        sizes.workspace = nullptr;
        return Backward(sizes).workspace_.bytes;
    }

    void run() const {
        const int64_t d = attention_.width, last = attention_.layers - 1;
        to_query_.pack(attention_.pool, attention_.dtype, attention_.weight_query, 1, d);
        from_query_.pack(attention_.pool, attention_.dtype, attention_.weight_query, d, 1);
        from_state_.pack(attention_.pool, attention_.dtype, attention_.weight_out, inner_, 1);
        grad_query_weight_.clear(), grad_out_weight_.clear();
        std::memset(zeros_, 0, d * sizeof(T));
        std::memset(carry_, 0, attention_.tokens * state_row() * sizeof(T));
        for (int64_t layer = last; layer >= 0; --layer) {
            for_tiles([&](T* scratch, int64_t first, int64_t rows) {
                if (layer < last) add_query_gradient(first, rows);
                tokens_gradient(layer, first, rows, scratch);
            });
            weights_gradient(layer);
        }
        for_tiles([&](T*, int64_t first, int64_t rows) {
            if (args_.grad_initial_state == nullptr) return;
            if (last >= 0) add_query_gradient(first, rows);
            for (int64_t t = first; t < first + rows; ++t)
                put_row(attention_.dtype, carry_ + t * state_row(), d, args_.grad_initial_state, t * d);
        });
        parallel_for_each(attention_.pool, inner_,
                          [&](int64_t c) { grad_query_weight_.write_row(c, args_.grad_weight_query, c * d); });
        parallel_for_each(attention_.pool, d,
                          [&](int64_t c) { grad_out_weight_.write_row(c, args_.grad_weight_out, c * inner_); });
    }

  private:
    bool same_dtype() const { return attention_.dtype == dtype_of<T>; }
    int64_t state_row() const { return from_query_.padded(); }
    int64_t inner_row() const { return to_query_.padded(); }
    // Elements of a token in a tile: query, ∂L/∂a and, for dtypes other than T, the state before.
    int64_t row_size() const { return 2 * inner_row() + (same_dtype() ? 0 : attention_.width); }
    int64_t max_tile() const {
        const int64_t bytes = (row_size() + state_row() + inner_row()) * static_cast<int64_t>(sizeof(T));
        return min(kAttentionTile, kAttentionTileBytes / max<int64_t>(1, bytes));
    }
    int64_t worker_size() const {
        const int64_t tile =
            tiles_.max_tile() * row_size() + 2 * scores_size<T>(attention_) + window_size<T>(attention_);
        const int64_t depth = max(attention_.width, inner_);
        return max(round_up(tile + attention_.width, lanes<T>),
                   WeightGradient<T>::scratch_size(attention_.dtype, depth));
    }
    template <class F>
    void for_tiles(const F& f) const {
        parallel_tasks(attention_.pool, tiles_.count, [&](int64_t worker, int64_t tile) {
            f(workers_ + worker * worker_size(), tiles_.begin(tile), tiles_.size(tile));
        });
    }

    // The states before a layer: rows whose layer 0 is the one before this.
    LayerRows before(int64_t layer) const {
        if (layer > 0) return {args_.states, attention_.tokens * attention_.width, attention_.width};
        if (attention_.initial_state != nullptr) return {attention_.initial_state, 0, attention_.width};
        return {zeros_, 0, 0};
    }

    void add_query_gradient(int64_t first, int64_t rows) const {
        from_query_.multiply(rows, 0, inner_, grad_query_ + first * inner_row(), inner_row(),
                             carry_ + first * state_row(), state_row(), true);
    }

    void tokens_gradient(int64_t layer, int64_t first, int64_t rows, T* scratch) const {
        const int64_t d = attention_.width;
        T *query = scratch, *grad_attended = query + tiles_.max_tile() * inner_row();
        T* states = grad_attended + tiles_.max_tile() * inner_row();
        T* rest = scratch + tiles_.max_tile() * row_size();
        T* carry = carry_ + first * state_row();
        for (int64_t t = 0; t < rows; ++t) {
            const int64_t offset = layer * args_.grad.layer_stride + (first + t) * args_.grad.token_stride;
            const T* grad = read_elements(attention_.dtype, args_.grad.data, offset, d, rest);
            for (int64_t e = 0; e < d; ++e) carry[t * state_row() + e] += grad[e];
        }
        from_state_.multiply(rows, 0, d, carry, state_row(), grad_attended, inner_row(), false);
        const LayerRows from = before(layer);
        const int64_t offset = (layer - 1) * from.layer_stride + first * from.token_stride;
        if (same_dtype()) {
            to_query_.multiply(rows, 0, d, static_cast<const T*>(from.data) + offset, from.token_stride, query,
                               inner_row(), false);
        } else {
            for (int64_t t = 0; t < rows; ++t)
                read_elements(attention_.dtype, from.data, offset + t * from.token_stride, d, states + t * d);
            to_query_.multiply(rows, 0, d, states, d, query, inner_row(), false);
        }
        for (int64_t t = 0; t < rows; ++t)
            attention_gradient(layer, first + t, query + t * inner_row(), grad_attended + t * inner_row(), rest);
    }

    // The accumulator of a tap's gradient; which: 0 for its keys, 1 for its values.
    T* grad_row(void* in_place, int64_t which, int64_t layer, int64_t token) const {
        if (same_dtype()) return static_cast<T*>(in_place) + (layer * attention_.tokens + token) * inner_;
        const int64_t taps = max_taps(attention_);
        return ring_ + ((token * taps + layer % taps) * 2 + which) * inner_;
    }

    void attention_gradient(int64_t layer, int64_t token, const T* query, const T* grad, T* scratch) const {
        T *weights = scratch, *grad_scores = weights + scores_size<T>(attention_);
        const Window<T> window = window_of(attention_, layer, token, grad_scores + scores_size<T>(attention_));
        attention_weights(attention_, query, window, weights);
        scores_gradient(window, grad, weights, grad_scores);
        weighted_sum(attention_, grad_scores, window.keys, window.key_stride, window.count,
                     grad_query_ + token * inner_row());
        for (int64_t j = 0; j < window.count; ++j) {
            const int64_t tap = window.first + j;
            // Its newest layer comes first and finds nothing there yet.
            const bool is_new = layer == min(attention_.layers, tap + max_taps(attention_)) - 1;
            T *keys = grad_row(args_.grad_keys, 0, tap, token), *values = grad_row(args_.grad_values, 1, tap, token);
            for (int64_t h = 0; h < attention_.num_heads; ++h) {
                const int64_t at = h * attention_.head_width;
                const int64_t index = j * heads_row<T>(attention_) + h;
                add_scaled(grad_scores[index], query + at, is_new, keys + at);
                add_scaled(weights[index], grad + at, is_new, values + at);
            }
        }
        if (same_dtype()) return;
        const int64_t offset = (layer * attention_.tokens + token) * inner_;
        put_row(attention_.dtype, grad_row(nullptr, 0, layer, token), inner_, args_.grad_keys, offset);
        put_row(attention_.dtype, grad_row(nullptr, 1, layer, token), inner_, args_.grad_values, offset);
    }

    // ∂L/∂(q·k), that is scale·p_j·(∂L/∂p_j − Σ_i p_i ∂L/∂p_i).
    void scores_gradient(const Window<T>& window, const T* grad, const T* weights, T* out) const {
        const int64_t row = heads_row<T>(attention_);
        head_products(attention_, grad, window.values, window.value_stride, window.count, out);
        for (int64_t head = 0; head < row; head += lanes<T>) {
            Vec<T> mean = {};
            for (int64_t at = head; at < window.count * row; at += row) mean += load(weights + at) * load(out + at);
            for (int64_t at = head; at < window.count * row; at += row)
                store(out + at, static_cast<T>(attention_.scale) * load(weights + at) * (load(out + at) - mean));
        }
    }

    void add_scaled(T scale, const T* row, bool is_new, T* to) const {
        for_vectors<T>(0, attention_.head_width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            const Vec<T> value = scale * io.load(row + e);
            io.store(to + e, is_new ? value : io.load(to + e) + value);
        });
    }

    void weights_gradient(int64_t layer) const {
        const int64_t tasks = grad_query_weight_.tasks();
        const LayerRows states = before(layer);
        parallel_tasks(attention_.pool, tasks + grad_out_weight_.tasks(), [&](int64_t worker, int64_t task) {
            T* scratch = workers_ + worker * worker_size();
            if (task < tasks) {
                grad_query_weight_.add(task, grad_query_, inner_row(), states.data, (layer - 1) * states.layer_stride,
                                       states.token_stride, scratch);
            } else {
                grad_out_weight_.add(task - tasks, carry_, state_row(), args_.attended,
                                     layer * attention_.tokens * inner_, inner_, scratch);
            }
        });
    }

    const DepthAttentionBackward& args_;
    const DepthAttention& attention_;
    int64_t inner_;
    Workspace workspace_;
    PackedWeight<T> to_query_, from_query_, from_state_;  // W_qᵀ, W_q, W_o
    WeightGradient<T> grad_query_weight_, grad_out_weight_;
    TokenTiles tiles_;
    T *zeros_, *carry_, *grad_query_, *ring_, *workers_;
};

}  // namespace

int64_t depth_attention_backward_workspace(const DepthAttentionBackward& args) {
    return args.attention.dtype == DType::float64 ? Backward<double>::workspace(args)
                                                  : Backward<float>::workspace(args);
}

void depth_attention_backward(const DepthAttentionBackward& args) {
    if (args.attention.dtype == DType::float64) return Backward<double>(args).run();
    Backward<float>(args).run();
}

}  // namespace xlayer::cpu::XLAYER_ISA::aggregate
