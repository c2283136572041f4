// depth_attention forward (xlayer/aggregate.h). One task is a tile of tokens, taken through all layers with its states
// in the caches: query product, softmax over the window, output product. Queries and scores are never stored.
#include "cpu/aggregate/attention.h"

namespace xlayer::cpu::XLAYER_ISA::aggregate {
namespace {

template <class T>
class Forward {
  public:
    explicit Forward(const DepthAttentionForward& args)
        : args_(args),
          attention_(args.attention),
          inner_(inner_width(attention_)),
          workspace_(args.workspace),
          to_query_(attention_.width, inner_, workspace_),
          to_state_(inner_, attention_.width, workspace_),
          tiles_(attention_.tokens, max_tile(), attention_.pool.threads) {
        workers_ = workspace_.take<T>(attention_.pool.threads, worker_size());
    }

    static int64_t workspace(const DepthAttentionForward& args) {
        DepthAttentionForward sizes = args;
        sizes.workspace = nullptr;
        return Forward(sizes).workspace_.bytes;
    }

    void run() const {
        to_query_.pack(attention_.pool, attention_.dtype, attention_.weight_query, 1, attention_.width);
        to_state_.pack(attention_.pool, attention_.dtype, attention_.weight_out, 1, inner_);
        parallel_tasks(attention_.pool, tiles_.count, [&](int64_t worker, int64_t tile) {
            run_tile(workers_ + worker * worker_size(), tiles_.begin(tile), tiles_.size(tile));
        });
    }

  private:
    int64_t row_size() const { return to_state_.padded() + 2 * to_query_.padded(); }  // state, query, attended
    int64_t max_tile() const {
        const int64_t bytes = row_size() * static_cast<int64_t>(sizeof(T));
        return min(kAttentionTile, kAttentionTileBytes / max<int64_t>(1, bytes));
    }
    int64_t worker_size() const {
        return round_up(tiles_.max_tile() * row_size() + scores_size<T>(attention_) + window_size<T>(attention_),
                        lanes<T>);
    }

    void run_tile(T* state, int64_t first, int64_t rows) const {
        const int64_t d = attention_.width, state_row = to_state_.padded(), inner_row = to_query_.padded();
        T *query = state + tiles_.max_tile() * state_row, *attended = query + tiles_.max_tile() * inner_row;
        T *weights = attended + tiles_.max_tile() * inner_row, *wide = weights + scores_size<T>(attention_);
        std::memset(state, 0, rows * state_row * sizeof(T));
        for (int64_t t = 0; attention_.initial_state != nullptr && t < rows; ++t)
            spread_row(attention_.dtype, attention_.initial_state, (first + t) * d, d, state + t * state_row, 1);
        for (int64_t layer = 0; layer < attention_.layers; ++layer) {
            to_query_.multiply(rows, 0, d, state, state_row, query, inner_row, false);
            for (int64_t t = 0; t < rows; ++t)
                attend(layer, first + t, query + t * inner_row, weights, wide, attended + t * inner_row);
            to_state_.multiply(rows, 0, inner_, attended, inner_row, state, state_row, true);
            for (int64_t t = 0; t < rows; ++t) {
                const int64_t token = layer * attention_.tokens + first + t;
                put_row(attention_.dtype, state + t * state_row, d, args_.states, token * d);
                if (args_.attended != nullptr)
                    put_row(attention_.dtype, attended + t * inner_row, inner_, args_.attended, token * inner_);
            }
        }
    }

    void attend(int64_t layer, int64_t token, const T* query, T* weights, T* wide, T* attended) const {
        const Window<T> window = window_of(attention_, layer, token, wide);
        attention_weights(attention_, query, window, weights);
        weighted_sum(attention_, weights, window.values, window.value_stride, window.count, attended);
    }

    const DepthAttentionForward& args_;
    const DepthAttention& attention_;
    int64_t inner_;
    Workspace workspace_;
    PackedWeight<T> to_query_, to_state_;
    TokenTiles tiles_;
    T* workers_;
};

}  // namespace

int64_t depth_attention_forward_workspace(const DepthAttentionForward& args) {
    return args.attention.dtype == DType::float64 ? Forward<double>::workspace(args) : Forward<float>::workspace(args);
}

void depth_attention_forward(const DepthAttentionForward& args) {
    if (args.attention.dtype == DType::float64) return Forward<double>(args).run();
    Forward<float>(args).run();
}

}  // namespace xlayer::cpu::XLAYER_ISA::aggregate
