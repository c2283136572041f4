// depth_gru backward (xlayer/aggregate.h), from the gates that the forward saved. Layers descend in two steps. Per tile
// of tokens: the gradients of the gates' inputs, `inner`, and from them those of x and of the previous state, `carry`.
// Per panel of the weights' columns: their gradients, in which each sum runs over the tokens in order.
#include "cpu/aggregate/products.h"

namespace xlayer::cpu::XLAYER_ISA::aggregate {
namespace {

constexpr int kGates = 3;
constexpr int kInner = 4;  // ∂L/∂ of the sums in r, in z, in n (= of W_in x), and of m
constexpr int64_t kMaxTile = 96;
constexpr int64_t kTileBytes = 512 << 10;

template <class T>
class Backward {
  public:
    explicit Backward(const DepthGruBackward& args)
        : args_(args),
          gru_(args.gru),
          padded_(round_up(gru_.width, lanes<T>)),
          tiles_(gru_.tokens, max_tile(), gru_.pool.threads),
          workspace_(args.workspace),
          weight_i_(kGates * gru_.width, gru_.input, workspace_),
          weight_h_(kGates * gru_.width, gru_.width, workspace_),
          grad_i_{gradient(gru_.input), gradient(gru_.input), gradient(gru_.input)},
          grad_h_{gradient(gru_.width), gradient(gru_.width), gradient(gru_.width)} {
        zeros_ = workspace_.take<T>(gru_.width);
        carry_ = workspace_.take<T>(gru_.tokens, padded_);
        inner_ = workspace_.take<T>(gru_.tokens, inner_size());
        workers_ = workspace_.take<T>(gru_.pool.threads, worker_size());
    }

    static int64_t workspace(const DepthGruBackward& args) {
        DepthGruBackward sizes = args;
        sizes.workspace = nullptr;
        return Backward(sizes).workspace_.bytes;
    }

    void run() const {
        const int64_t d = gru_.width;
        weight_i_.pack(gru_.pool, gru_.dtype, gru_.weight_ih, gru_.input, 1);
        weight_h_.pack(gru_.pool, gru_.dtype, gru_.weight_hh, d, 1);
        for (int g = 0; g < kGates; ++g) grad_i_[g].clear(), grad_h_[g].clear();
        std::memset(zeros_, 0, d * sizeof(T));
        std::memset(carry_, 0, gru_.tokens * padded_ * sizeof(T));
        for (int64_t layer = gru_.layers - 1; layer >= 0; --layer) {
            parallel_tasks(gru_.pool, tiles_.count,
                           [&](int64_t worker, int64_t tile) { tokens_gradient(worker, layer, tile); });
            weights_gradient(layer);
        }
        parallel_for_each(gru_.pool, d, [&](int64_t c) { write_weight_grads(c); });
        for (int g = 0; g < kGates; ++g) {
            grad_i_[g].write_bias(args_.grad_bias_ih, g * d);
            (g == 2 ? grad_h_ : grad_i_)[g].write_bias(args_.grad_bias_hh, g * d);
        }
        for (int64_t t = 0; args_.grad_initial_state != nullptr && t < gru_.tokens; ++t)
            put_row(gru_.dtype, carry_ + t * padded_, d, args_.grad_initial_state, t * d);
    }

  private:
    WeightGradient<T> gradient(int64_t depth) { return {gru_.dtype, gru_.tokens, depth, gru_.width, workspace_}; }
    int64_t inner_size() const { return kInner * padded_; }
    int64_t inner_of_state(int g) const { return (g == 2 ? 3 : g) * padded_; }  // where W_h's are
    int64_t max_tile() const {
        const int64_t bytes = (gru_.input + (kInner + 1) * padded_) * static_cast<int64_t>(sizeof(T));
        return min(kMaxTile, kTileBytes / max<int64_t>(1, bytes));
    }
    // A tile of ∂L/∂x and rows widened, or what the weights' gradients need.
    int64_t worker_size() const {
        const int64_t tile = tiles_.max_tile() * weight_i_.padded() + 6 * padded_;
        const int64_t depth = max(gru_.input, gru_.width);
        return max(round_up(tile, lanes<T>), WeightGradient<T>::scratch_size(gru_.dtype, depth));
    }

    const T* row_of(const void* data, int64_t offset, T* scratch) const {
        return read_elements(gru_.dtype, data, offset, gru_.width, scratch);
    }
    // The states before a layer.
    LayerRows before(int64_t layer) const {
        if (layer > 0) return {args_.states, gru_.tokens * gru_.width, gru_.width};
        if (gru_.initial_state != nullptr) return {gru_.initial_state, 0, gru_.width};
        return {zeros_, 0, 0};
    }

    void tokens_gradient(int64_t worker, int64_t layer, int64_t tile) const {
        T* grad_x = workers_ + worker * worker_size();
        T* rows = grad_x + tiles_.max_tile() * weight_i_.padded();
        const int64_t first = tiles_.begin(tile), count = tiles_.size(tile);
        const int64_t d = gru_.width, grad_row = weight_i_.padded();
        for (int64_t t = first; t < first + count; ++t) gates_gradient(layer, t, rows);
        const T* inner = inner_ + first * inner_size();
        for (int g = 0; g < kGates; ++g) {
            weight_i_.multiply(count, g * d, d, inner + g * padded_, inner_size(), grad_x, grad_row, g > 0);
            if (layer > 0 || args_.grad_initial_state != nullptr)
                weight_h_.multiply(count, g * d, d, inner + inner_of_state(g), inner_size(), carry_ + first * padded_,
                                   padded_, true);
        }
        for (int64_t t = 0; t < count; ++t)
            put_row(gru_.dtype, grad_x + t * grad_row, gru_.input, args_.grad_x,
                    (layer * gru_.tokens + first + t) * gru_.input);
    }

    // One token: `inner`, and in `carry` what reaches the state before past the gates.
    void gates_gradient(int64_t layer, int64_t t, T* scratch) const {
        const int64_t d = gru_.width, gates = (layer * gru_.tokens + t) * 4 * d;
        const T* grad = row_of(args_.grad.data, layer * args_.grad.layer_stride + t * args_.grad.token_stride, scratch);
        const T *reset = row_of(args_.gates, gates, scratch + padded_),
                *update = row_of(args_.gates, gates + d, scratch + 2 * padded_),
                *fresh = row_of(args_.gates, gates + 2 * d, scratch + 3 * padded_),
                *from_state = row_of(args_.gates, gates + 3 * d, scratch + 4 * padded_);
        const LayerRows states = before(layer);
        const T* state =
            row_of(states.data, (layer - 1) * states.layer_stride + t * states.token_stride, scratch + 5 * padded_);
        T *carry = carry_ + t * padded_, *inner = inner_ + t * inner_size();
        for_vectors<T>(0, d, [&](int64_t e, auto io) XLAYER_FLATTEN {
            const Vec<T> total = load(carry + e) + io.load(grad + e);
            const Vec<T> r = io.load(reset + e), z = io.load(update + e), n = io.load(fresh + e);
            const Vec<T> in_n = total * (1 - z) * (1 - n * n);
            store(inner + e, in_n * io.load(from_state + e) * r * (1 - r));
            store(inner + padded_ + e, total * (io.load(state + e) - n) * z * (1 - z));
            store(inner + 2 * padded_ + e, in_n);
            store(inner + 3 * padded_ + e, in_n * r);
            store(carry + e, total * z);
        });
    }

    void weights_gradient(int64_t layer) const {
        const int64_t each = grad_i_[0].tasks();
        const LayerRows states = before(layer);
        parallel_tasks(gru_.pool, 2 * kGates * each, [&](int64_t worker, int64_t task) {
            T* scratch = workers_ + worker * worker_size();
            const int g = static_cast<int>(task / each % kGates);
            if (task / each < kGates) {
                grad_i_[g].add(task % each, inner_ + g * padded_, inner_size(), gru_.x.data,
                               layer * gru_.x.layer_stride, gru_.x.token_stride, scratch);
            } else {
                grad_h_[g].add(task % each, inner_ + inner_of_state(g), inner_size(), states.data,
                               (layer - 1) * states.layer_stride, states.token_stride, scratch);
            }
        });
    }

    void write_weight_grads(int64_t c) const {
        for (int g = 0; g < kGates; ++g) {
            const int64_t row = g * gru_.width + c;
            grad_i_[g].write_row(c, args_.grad_weight_ih, row * gru_.input);
            grad_h_[g].write_row(c, args_.grad_weight_hh, row * gru_.width);
        }
    }

    const DepthGruBackward& args_;
    const DepthGru& gru_;
    int64_t padded_;
    TokenTiles tiles_;
    Workspace workspace_;
    PackedWeight<T> weight_i_, weight_h_;
    WeightGradient<T> grad_i_[kGates], grad_h_[kGates];
    T *zeros_, *carry_, *inner_, *workers_;
};

}  // namespace

int64_t depth_gru_backward_workspace(const DepthGruBackward& args) {
    return args.gru.dtype == DType::float64 ? Backward<double>::workspace(args) : Backward<float>::workspace(args);
}

void depth_gru_backward(const DepthGruBackward& args) {
    if (args.gru.dtype == DType::float64) return Backward<double>(args).run();
    Backward<float>(args).run();
}

}  // namespace xlayer::cpu::XLAYER_ISA::aggregate
