// CPU kernels of ema_scan (xlayer/aggregate.h). Bound by memory: in units of d per token, forward reads L and writes L
// (or 1), backward reads 2L (or L) and writes L. A tile of tokens walks through the layers with its states in L1;
// backward walks up, leaving what it needs of every layer in scratch that stays in L2, and down again. Tokens do not
// depend on each other; sums over them are made per chunk and then in the order of chunks, and chunks follow from
// sizes.
#include "rows.h"
#include "xlayer/aggregate.h"

namespace xlayer::cpu::XLAYER_ISA {
namespace {

constexpr int64_t kTileBytes = 4096;  // of the rows of one layer: runs that the prefetchers can follow
constexpr int64_t kMostChunks = 64;

// Mean and 1/√(variance + eps) of a row.
template <class T>
struct Moments {
    T mean, scale;
};

template <class T>
XLAYER_INLINE Moments<T> moments(const T* row, int64_t width, double eps) {
    Vec<T> sum[4] = {}, square[4] = {};
    int64_t turn = 0;
    for_vectors<T>(0, width, [&](int64_t e, auto io) XLAYER_FLATTEN { sum[turn++ % 4] += io.load(row + e); });
    const T mean = sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<T>(width);
    for_vectors<T>(0, width, [&](int64_t e, auto io) XLAYER_FLATTEN {
        const Vec<T> centered = io.keep(io.load(row + e) - mean);
        square[turn++ % 4] += centered * centered;
    });
    const T variance = sum_lanes<T>((square[0] + square[1]) + (square[2] + square[3])) / static_cast<T>(width);
    return {mean, 1 / std::sqrt(variance + static_cast<T>(eps))};
}

// What forward and backward share: how tokens are cut, gates, and where rows lie.
template <class T>
class Scan {
  public:
    explicit Scan(const EmaScan& args)
        : args(args),
          row(round_up(greater<int64_t>(args.width, 1), lanes<T>)),
          tile(greater<int64_t>(1, kTileBytes / static_cast<int64_t>(row * sizeof(T)))) {}

    T gate(int64_t layer) const { return 1 / (1 + exponential(-static_cast<const T*>(args.gate_logits)[layer])); }
    T* state(char* memory, int64_t token) const { return reinterpret_cast<T*>(memory) + token * row; }

    const T* tap(int64_t layer, int64_t token, T* scratch) const { return read(args.x, layer, token, scratch); }
    const T* read(const LayerRows& rows, int64_t layer, int64_t token, T* scratch) const {
        const int64_t offset = layer * rows.layer_stride + token * rows.token_stride;
        return read_elements<T>(args.dtype, rows.data, offset, args.width, scratch);
    }
    // The row that comes `layers` later, to be fetched ahead; `otherwise` where there is none.
    const T* ahead(const LayerRows& rows, int64_t layer, int64_t token, const T* otherwise) const {
        if (layer < 0 || layer >= args.layers || args.dtype != own_dtype<T>) return otherwise;
        return static_cast<const T*>(rows.data) + layer * rows.layer_stride + token * rows.token_stride;
    }

    void start(int64_t token, T* to) const {
        if (args.initial == nullptr) {
            for (int64_t e = 0; e < row; ++e) to[e] = 0;
            return;
        }
        const T* from = read_elements<T>(args.dtype, args.initial, token * args.width, args.width, to);
        if (from != to) read_row(from, 1, args.width, to);
    }

    // f(value, io, e) for every vector of a tap's row, normalized where that is asked for.
    template <class F>
    XLAYER_INLINE void each_value(const T* x, const F& f) const {
        if (!args.normalize) {
            for_vectors<T>(0, args.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
                const Vec<T> value = io.load(x + e);
                f(value, value, io, e);
            });
            return;
        }
        const Moments<T> of = moments(x, args.width, args.eps);
        const T* weight = static_cast<const T*>(args.norm_weight);
        const T* bias = static_cast<const T*>(args.norm_bias);
        for_vectors<T>(0, args.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            const Vec<T> normal = (io.load(x + e) - of.mean) * of.scale;
            Vec<T> value = normal * io.load(weight + e);
            if (bias != nullptr) value += io.load(bias + e);
            f(value, normal, io, e);
        });
    }

    const EmaScan& args;
    const int64_t row, tile;  // elements of a row of scratch; tokens that walk together
};

template <class T>
class Forward {
  public:
    explicit Forward(const EmaScanForward& args) : args_(args), scan_(args.scan) {}

    int64_t worker_size() const { return round_up((scan_.tile + 2) * scan_.row * static_cast<int64_t>(sizeof(T)), 64); }

    void run() const {
        const EmaScan& scan = args_.scan;
        parallel_tasks(scan.pool, ceil_div(scan.tokens, scan_.tile), [&](int64_t worker, int64_t task) {
            char* memory = static_cast<char*>(args_.workspace) + worker * worker_size();
            const int64_t first = task * scan_.tile;
            walk(memory, first, lesser(scan_.tile, scan.tokens - first));
        });
    }

  private:
    void walk(char* memory, int64_t first, int64_t count) const {
        const EmaScan& scan = args_.scan;
        T *in = scan_.state(memory, scan_.tile), *out = in + scan_.row;
        for (int64_t t = 0; t < count; ++t) scan_.start(first + t, scan_.state(memory, t));
        for (int64_t l = 0; l < scan.layers; ++l) {
            const T gate = scan_.gate(l);
            for (int64_t t = 0; t < count; ++t) {
                T* state = scan_.state(memory, t);
                const int64_t offset = (l * scan.tokens + first + t) * scan.width;
                T* to = scan.last_only ? state : write_target<T>(scan.dtype, args_.states, offset, out);
                const T* x = scan_.tap(l, first + t, in);
                const T* next = scan_.ahead(scan.x, l + 1, first + t, x);
                step(x, next, gate, state, to);
                if (!scan.last_only) narrow_elements(scan.dtype, to, args_.states, offset, scan.width);
            }
        }
        if (!scan.last_only) return;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t offset = (first + t) * scan.width;
            const T* state = scan_.state(memory, t);
            if (scan.dtype == own_dtype<T>) {
                for (int64_t e = 0; e < scan.width; ++e) static_cast<T*>(args_.states)[offset + e] = state[e];
            }
            narrow_elements(scan.dtype, state, args_.states, offset, scan.width);
        }
    }

    XLAYER_INLINE void step(const T* x, const T* next, T gate, T* state, T* to) const {
        const T decay = 1 - gate;
        scan_.each_value(x, [&](Vec<T> value, Vec<T>, auto io, int64_t e) XLAYER_FLATTEN {
            prefetch(next + e);
            const Vec<T> now = decay * load(state + e) + gate * value;
            store(state + e, now);
            if (to != state) io.store(to + e, now);
        });
    }

    const EmaScanForward& args_;
    Scan<T> scan_;
};

template <class T>
class Backward {
  public:
    explicit Backward(const EmaScanBackward& args) : args_(args), scan_(args.scan) {
        const int64_t tiles = ceil_div(args.scan.tokens, scan_.tile);
        chunk_ = greater<int64_t>(1, ceil_div(tiles, kMostChunks)) * scan_.tile;
        chunks_ = ceil_div(args.scan.tokens, chunk_);
    }

    int64_t workspace() const { return args_.scan.pool.threads * worker_size() + chunks_ * partial_size(); }

    void run() const {
        const EmaScan& scan = args_.scan;
        parallel_tasks(scan.pool, chunks_, [&](int64_t worker, int64_t chunk) {
            const Worker with(*this, static_cast<char*>(args_.workspace) + worker * worker_size());
            const Partial sums(*this, chunk);
            const int64_t begin = chunk * chunk_, end = lesser(scan.tokens, begin + chunk_);
            for (int64_t l = 0; l < scan.layers; ++l) sums.gate[l] = 0;
            for (int64_t e = 0; e < 2 * scan_.row; ++e) sums.weight[e] = 0;
            for (int64_t first = begin; first < end; first += scan_.tile) {
                const int64_t count = lesser(scan_.tile, end - first);
                up(with, first, count);
                down(with, sums, first, count);
            }
        });
        finish();
    }

  private:
    int64_t rows_of_layers() const { return args_.scan.layers * scan_.tile; }
    int64_t worker_size() const {
        const int64_t rows = 2 * rows_of_layers() + 2 * scan_.tile + 3;
        return round_up((rows * scan_.row + rows_of_layers()) * static_cast<int64_t>(sizeof(T)), 64);
    }
    int64_t partial_size() const {
        return round_up(args_.scan.layers * 8, 64) + round_up(2 * scan_.row * static_cast<int64_t>(sizeof(T)), 64);
    }

    // Scratch of a worker: rows of a tile, for each layer x̂ and n − S_{l−1}; 1/deviation; S and ∂L/∂S.
    struct Worker {
        T *normal, *change, *state, *grad, *in, *from, *out, *scale;

        Worker(const Backward& of, char* memory) {
            const int64_t row = of.scan_.row, tile = of.scan_.tile, layers = of.rows_of_layers();
            normal = reinterpret_cast<T*>(memory);
            change = normal + layers * row;
            state = change + layers * row;
            grad = state + tile * row;
            in = grad + tile * row;
            from = in + row;
            out = from + row;
            scale = out + row;
        }
    };

    // Sums over a chunk's tokens: per layer in double, since a gate's gradient is one number of all tokens and columns.
    struct Partial {
        double* gate;
        T *weight, *bias;

        Partial(const Backward& of, int64_t chunk) {
            char* memory = static_cast<char*>(of.args_.workspace) + of.args_.scan.pool.threads * of.worker_size() +
                           chunk * of.partial_size();
            gate = reinterpret_cast<double*>(memory);
            weight = reinterpret_cast<T*>(memory + round_up(of.args_.scan.layers * 8, 64));
            bias = weight + of.scan_.row;
        }
    };

    void up(const Worker& with, int64_t first, int64_t count) const {
        const EmaScan& scan = args_.scan;
        for (int64_t t = 0; t < count; ++t) scan_.start(first + t, with.state + t * scan_.row);
        for (int64_t l = 0; l < scan.layers; ++l) {
            const T gate = scan_.gate(l);
            for (int64_t t = 0; t < count; ++t) {
                const int64_t at = l * scan_.tile + t;
                const T* x = scan_.tap(l, first + t, with.in);
                const T* next = scan_.ahead(scan.x, l + 1, first + t, x);
                T *state = with.state + t * scan_.row, *change = with.change + at * scan_.row;
                if (scan.normalize) {
                    up_normalized(with, x, next, gate, state, at);
                    continue;
                }
                for_vectors<T>(0, scan.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
                    prefetch(next + e);
                    const Vec<T> before = load(state + e), difference = io.load(x + e) - before;
                    store(change + e, difference);
                    store(state + e, before + gate * difference);
                });
            }
        }
    }

    XLAYER_INLINE void up_normalized(const Worker& with, const T* x, const T* next, T gate, T* state,
                                     int64_t at) const {
        const EmaScan& scan = args_.scan;
        T *normal = with.normal + at * scan_.row, *change = with.change + at * scan_.row;
        const Moments<T> of = moments(x, scan.width, scan.eps);
        with.scale[at] = of.scale;
        const T *weight = static_cast<const T*>(scan.norm_weight), *bias = static_cast<const T*>(scan.norm_bias);
        for_vectors<T>(0, scan.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            prefetch(next + e);
            const Vec<T> unit = io.keep((io.load(x + e) - of.mean) * of.scale);
            Vec<T> value = unit * io.load(weight + e);
            if (bias != nullptr) value += io.load(bias + e);
            const Vec<T> before = load(state + e), difference = value - before;
            store(normal + e, unit);
            store(change + e, difference);
            store(state + e, before + gate * difference);
        });
    }

    void down(const Worker& with, const Partial& sums, int64_t first, int64_t count) const {
        const EmaScan& scan = args_.scan;
        for (int64_t t = 0; t < count; ++t) {
            T* grad = with.grad + t * scan_.row;
            for (int64_t e = 0; e < scan_.row; ++e) grad[e] = 0;
            if (scan.last_only) add_grad(with, grad, 0, first + t, grad);
        }
        for (int64_t l = scan.layers - 1; l >= 0; --l) {
            const T gate = scan_.gate(l);
            for (int64_t t = 0; t < count; ++t) {
                const int64_t at = l * scan_.tile + t, offset = (l * scan.tokens + first + t) * scan.width;
                T *grad = with.grad + t * scan_.row, *change = with.change + at * scan_.row;
                if (!scan.last_only) {
                    add_grad(with, grad, l, first + t, scan_.ahead(args_.grad, l - 1, first + t, grad));
                }
                T* to = write_target<T>(scan.dtype, args_.grad_x, offset, with.out);
                if (scan.normalize) {
                    sums.gate[l] += down_normalized(with, sums, gate, grad, at, to);
                } else {
                    Vec<T> product = {};
                    for_vectors<T>(0, scan.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
                        const Vec<T> now = load(grad + e);
                        product += io.keep(now * load(change + e));
                        io.store(to + e, gate * now);
                        store(grad + e, now * (1 - gate));
                    });
                    sums.gate[l] += sum_lanes<T>(product);
                }
                narrow_elements(scan.dtype, to, args_.grad_x, offset, scan.width);
            }
        }
        if (args_.grad_initial == nullptr) return;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t offset = (first + t) * scan.width;
            const T* grad = with.grad + t * scan_.row;
            T* to = write_target<T>(scan.dtype, args_.grad_initial, offset, with.out);
            for (int64_t e = 0; e < scan.width; ++e) to[e] = grad[e];
            narrow_elements(scan.dtype, to, args_.grad_initial, offset, scan.width);
        }
    }

    XLAYER_INLINE void add_grad(const Worker& with, T* grad, int64_t layer, int64_t token, const T* next) const {
        const T* given = scan_.read(args_.grad, layer, token, with.from);
        for_vectors<T>(0, args_.scan.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            prefetch(next + e);
            store(grad + e, load(grad + e) + io.load(given + e));
        });
    }

    // Through S_l and the LayerNorm of one token to ∂L/∂x_l; returns Σ G·(n − S_{l−1}).
    XLAYER_INLINE T down_normalized(const Worker& with, const Partial& sums, T gate, T* grad, int64_t at, T* to) const {
        const EmaScan& scan = args_.scan;
        const T *normal = with.normal + at * scan_.row, *change = with.change + at * scan_.row;
        const T* weight = static_cast<const T*>(scan.norm_weight);
        Vec<T> product = {}, sum = {}, along = {};
        for_vectors<T>(0, scan.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            const Vec<T> now = io.keep(load(grad + e)), unit = load(normal + e);
            const Vec<T> mine = gate * now, scaled = mine * io.load(weight + e);
            product += io.keep(now * load(change + e));
            sum += scaled;
            along += scaled * unit;
            store(sums.weight + e, load(sums.weight + e) + mine * unit);
            store(sums.bias + e, load(sums.bias + e) + mine);
        });
        const T mean = sum_lanes<T>(sum) / static_cast<T>(scan.width);
        const T slope = sum_lanes<T>(along) / static_cast<T>(scan.width), scale = with.scale[at];
        for_vectors<T>(0, scan.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            const Vec<T> now = load(grad + e);
            const Vec<T> scaled = gate * now * io.load(weight + e);
            io.store(to + e, scale * (scaled - mean - slope * load(normal + e)));
            store(grad + e, now * (1 - gate));
        });
        return sum_lanes<T>(product);
    }

    // Chunks added in order.
    void finish() const {
        const EmaScan& scan = args_.scan;
        for (int64_t l = 0; l < scan.layers; ++l) {
            double sum = 0;
            for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += Partial(*this, chunk).gate[l];
            const double gate = scan_.gate(l);
            static_cast<T*>(args_.grad_gate_logits)[l] = static_cast<T>(sum * gate * (1 - gate));
        }
        if (args_.grad_norm_weight == nullptr) return;
        T* weight = static_cast<T*>(args_.grad_norm_weight);
        T* bias = static_cast<T*>(args_.grad_norm_bias);
        for (int64_t e = 0; e < scan.width; ++e) {
            T of_weight = 0, of_bias = 0;
            for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
                const Partial sums(*this, chunk);
                of_weight += sums.weight[e], of_bias += sums.bias[e];
            }
            weight[e] = of_weight;
            if (bias != nullptr) bias[e] = of_bias;
        }
    }

    const EmaScanBackward& args_;
    Scan<T> scan_;
    int64_t chunk_, chunks_;  // tokens of a chunk, and how many chunks
};

}  // namespace

int64_t ema_scan_forward_workspace(const EmaScanForward& args) {
    const int64_t size =
        args.scan.dtype == DType::float64 ? Forward<double>(args).worker_size() : Forward<float>(args).worker_size();
    return args.scan.pool.threads * size;
}

void ema_scan_forward(const EmaScanForward& args) {
    if (args.scan.dtype == DType::float64) return Forward<double>(args).run();
    Forward<float>(args).run();
}

int64_t ema_scan_backward_workspace(const EmaScanBackward& args) {
    return args.scan.dtype == DType::float64 ? Backward<double>(args).workspace() : Backward<float>(args).workspace();
}

void ema_scan_backward(const EmaScanBackward& args) {
    if (args.scan.dtype == DType::float64) return Backward<double>(args).run();
    Backward<float>(args).run();
}

}  // namespace xlayer::cpu::XLAYER_ISA
