// depth_gru forward (xlayer/aggregate.h). One task is a tile of tokens, taken through all layers with its states in the
// caches; nothing of size L × N × 3d is stored. A register tile accumulates the three gates of a vector of hidden
// columns, over x and then over h, and the pointwise part follows before it leaves the registers.
#include "cpu/aggregate/products.h"

namespace xlayer::cpu::XLAYER_ISA::aggregate {
namespace {

constexpr int kGates = 3;
constexpr int kRows = kVectorBytes == 64 ? 8 : 4;  // × 3 accumulators, of 32 registers or 16
constexpr int64_t kMaxTile = 96;
constexpr int64_t kTileBytes = 512 << 10;  // of a tile's x and states, which every panel of weights meets

// sum[row][gate] += Σ_k a[row, k]·b[k][gate].
template <class T, int Rows>
XLAYER_INLINE void add_product(int64_t depth, const T* a, int64_t a_row, const T* b, Vec<T> (&sum)[Rows][kGates]) {
    for (int64_t first = 0; first < depth; first += kProductSlice) {
        Vec<T> acc[Rows][kGates] = {};
        for (int64_t k = first; k < min(first + kProductSlice, depth); ++k) {
            Vec<T> vector[kGates];
            XLAYER_UNROLL for (int g = 0; g < kGates; ++g) vector[g] = load(b + (k * kGates + g) * lanes<T>);
            XLAYER_UNROLL for (int r = 0; r < Rows; ++r) {
                const T scale = a[r * a_row + k];
                XLAYER_UNROLL for (int g = 0; g < kGates; ++g) acc[r][g] += scale * vector[g];
            }
        }
        XLAYER_UNROLL for (int r = 0; r < Rows; ++r) {
            XLAYER_UNROLL for (int g = 0; g < kGates; ++g) sum[r][g] += acc[r][g];
        }
    }
}

template <class T>
class Forward {
  public:
    explicit Forward(const DepthGruForward& args)
        : args_(args),
          gru_(args.gru),
          panels_(ceil_div(gru_.width, lanes<T>)),
          padded_(panels_ * lanes<T>),
          tiles_(gru_.tokens, max_tile(), gru_.pool.threads),
          workspace_(args.workspace) {
        weights_ = workspace_.take<T>(panels_, panel_size());
        biases_ = workspace_.take<T>(panels_, kBiases, lanes<T>);
        workers_ = workspace_.take<T>(gru_.pool.threads, worker_size());
    }

    static int64_t workspace(const DepthGruForward& args) {
        DepthGruForward sizes = args;
        sizes.workspace = nullptr;
        return Forward(sizes).workspace_.bytes;
    }

    void run() const {
        parallel_for_each(gru_.pool, panels_, [&](int64_t panel) { pack(panel); });
        parallel_tasks(gru_.pool, tiles_.count, [&](int64_t worker, int64_t tile) { run_tile(worker, tile); });
    }

  private:
    static constexpr int kBiases = 4;  // r, z, n_i, m

    // A tile of tokens at one layer.
    struct Step {
        int64_t layer, first, rows;
        const T* x;
        int64_t x_row;
        const T* state;
        T* next;
    };

    int64_t max_tile() const {
        const int64_t bytes = (gru_.input + 2 * padded_) * static_cast<int64_t>(sizeof(T));
        return min(kMaxTile, kTileBytes / max<int64_t>(1, bytes));
    }
    int64_t panel_size() const { return (gru_.input + gru_.width) * kGates * lanes<T>; }
    // Two states and, for dtypes other than T, x.
    int64_t worker_size() const {
        const int64_t x = gru_.dtype == dtype_of<T> ? 0 : gru_.input;
        return round_up(tiles_.max_tile() * (2 * padded_ + x), lanes<T>);
    }

    // A panel's weights: over x and then over h, the three gates of a vector of columns side by side.
    void pack(int64_t panel) const {
        T *to = weights_ + panel * panel_size(), *bias = biases_ + panel * kBiases * lanes<T>;
        const int64_t d = gru_.width, stride = kGates * lanes<T>;
        std::memset(to, 0, panel_size() * sizeof(T));
        std::memset(bias, 0, kBiases * lanes<T> * sizeof(T));
        for (int64_t l = 0; l < min<int64_t>(lanes<T>, d - panel * lanes<T>); ++l) {
            T bias_i[kGates], bias_h[kGates];
            for (int64_t g = 0; g < kGates; ++g) {
                const int64_t row = g * d + panel * lanes<T> + l;
                T* column = to + g * lanes<T> + l;
                spread_row(gru_.dtype, gru_.weight_ih, row * gru_.input, gru_.input, column, stride);
                spread_row(gru_.dtype, gru_.weight_hh, row * d, d, column + gru_.input * stride, stride);
                spread_row(gru_.dtype, args_.bias_ih, row, 1, bias_i + g, 1);
                spread_row(gru_.dtype, args_.bias_hh, row, 1, bias_h + g, 1);
            }
            for (int64_t g = 0; g < 2; ++g) bias[g * lanes<T> + l] = bias_i[g] + bias_h[g];
            bias[2 * lanes<T> + l] = bias_i[2], bias[3 * lanes<T> + l] = bias_h[2];
        }
    }

    void run_tile(int64_t worker, int64_t tile) const {
        T* state = workers_ + worker * worker_size();
        T* next = state + tiles_.max_tile() * padded_;
        T* x = next + tiles_.max_tile() * padded_;
        const int64_t first = tiles_.begin(tile), rows = tiles_.size(tile);
        for (int64_t t = 0; t < rows; ++t) {
            T* row = state + t * padded_;
            std::memset(row, 0, padded_ * sizeof(T));
            if (gru_.initial_state != nullptr)
                spread_row(gru_.dtype, gru_.initial_state, (first + t) * gru_.width, gru_.width, row, 1);
        }
        for (int64_t layer = 0; layer < gru_.layers; ++layer) {
            const int64_t offset = layer * gru_.x.layer_stride + first * gru_.x.token_stride;
            Step step{layer, first, rows, x, gru_.input, state, next};
            if (gru_.dtype == dtype_of<T>) {
                step.x = static_cast<const T*>(gru_.x.data) + offset;
                step.x_row = gru_.x.token_stride;
            } else {
                for (int64_t t = 0; t < rows; ++t)
                    read_elements(gru_.dtype, gru_.x.data, offset + t * gru_.x.token_stride, gru_.input,
                                  x + t * gru_.input);
            }
            for (int64_t panel = 0; panel < panels_; ++panel) advance(step, panel);
            T* old = state;
            state = next, next = old;
        }
    }

    __attribute__((noinline)) void advance(const Step& step, int64_t panel) const {
        int64_t row = 0;
        for (; row + kRows <= step.rows; row += kRows) cells<kRows>(step, panel, row);
        for (; row < step.rows; ++row) cells<1>(step, panel, row);
    }

    // The new state of Rows tokens in a panel's columns.
    template <int Rows>
    XLAYER_INLINE void cells(const Step& step, int64_t panel, int64_t row) const {
        const T *weights = weights_ + panel * panel_size(), *bias = biases_ + panel * kBiases * lanes<T>;
        Vec<T> over_x[Rows][kGates], over_h[Rows][kGates];
        XLAYER_UNROLL for (int r = 0; r < Rows; ++r) {
            XLAYER_UNROLL for (int g = 0; g < kGates; ++g) over_x[r][g] = load(bias + g * lanes<T>);
            over_h[r][0] = over_h[r][1] = Vec<T>{};
            over_h[r][2] = load(bias + 3 * lanes<T>);
        }
        add_product<T, Rows>(gru_.input, step.x + row * step.x_row, step.x_row, weights, over_x);
        add_product<T, Rows>(gru_.width, step.state + row * padded_, padded_, weights + gru_.input * kGates * lanes<T>,
                             over_h);
        const int64_t column = panel * lanes<T>, count = min<int64_t>(lanes<T>, gru_.width - column);
        for (int r = 0; r < Rows; ++r) {
            const Vec<T> reset = sigmoid(over_x[r][0] + over_h[r][0]), update = sigmoid(over_x[r][1] + over_h[r][1]);
            const Vec<T> from_state = over_h[r][2], fresh = hyperbolic_tangent(over_x[r][2] + reset * from_state);
            const Vec<T> state = load(step.state + (row + r) * padded_ + column);
            const Vec<T> next = (1 - update) * fresh + update * state;
            store(step.next + (row + r) * padded_ + column, next);
            const int64_t token = step.layer * gru_.tokens + step.first + row + r;
            write_vector<T>(gru_.dtype, next, args_.states, token * gru_.width + column, count);
            if (args_.gates == nullptr) continue;
            const Vec<T> gates[4] = {reset, update, fresh, from_state};
            for (int g = 0; g < 4; ++g)
                write_vector<T>(gru_.dtype, gates[g], args_.gates, (token * 4 + g) * gru_.width + column, count);
        }
    }

    const DepthGruForward& args_;
    const DepthGru& gru_;
    int64_t panels_, padded_;
    TokenTiles tiles_;
    Workspace workspace_;
    T *weights_, *biases_, *workers_;
};

}  // namespace

int64_t depth_gru_forward_workspace(const DepthGruForward& args) {
    return args.gru.dtype == DType::float64 ? Forward<double>::workspace(args) : Forward<float>::workspace(args);
}

void depth_gru_forward(const DepthGruForward& args) {
    if (args.gru.dtype == DType::float64) return Forward<double>(args).run();
    Forward<float>(args).run();
}

}  // namespace xlayer::cpu::XLAYER_ISA::aggregate
