// CPU kernels of ema_scan (xlayer/aggregate.h). Bound by memory: in units of d per token, forward reads L and writes L
// (or 1), backward reads 2L (or L) and writes L. A tile of tokens walks through the layers with its states in L1;
// backward walks up, leaving what it needs of every layer in scratch that stays in L2, and down again. Tokens do not
// depend on each other; sums over them are made per chunk and then in the order of chunks, and chunks follow from
// sizes.
#include <type_traits>

#include "rows.h"
#include "xlayer/aggregate.h"

namespace xlayer::cpu::XLAYER_ISA {
namespace {

constexpr int64_t kTileBytes = 8192;  // of the rows of one layer: runs that the prefetchers can follow
constexpr int64_t kMostChunks = 64;
constexpr int64_t kPastCaches = 32 << 20;  // bytes of a result from which on it is written past the caches

// Tokens whose rows are worked on at once: their sums do not wait for each other, and the norm's vectors are loaded
// once for all.
constexpr int kGroup = kVectorBytes == 64 ? 4 : 2;

// Calls f(std::integral_constant<int, tokens>{}, first) for groups of tokens below `count`.
template <class F>
XLAYER_INLINE void for_groups(int64_t count, const F& f) {
    int64_t t = 0;
    for (; t + kGroup <= count; t += kGroup) f(std::integral_constant<int, kGroup>{}, t);
    for (; t + 2 <= count; t += 2) f(std::integral_constant<int, 2>{}, t);
    for (; t < count; ++t) f(std::integral_constant<int, 1>{}, t);
}

// out[g] = Σ f(g, e, io) over a row, for every token g of a group.
template <class T, int Group, class F>
XLAYER_INLINE void sum_rows_of(int64_t width, T* out, const F& f) {
    Vec<T> sum[Group][2] = {};
    int64_t e = 0;
    for (; e + 2 * lanes<T> <= width; e += 2 * lanes<T>) {
        XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
            sum[g][0] += f(g, e, Whole<T>{});
            sum[g][1] += f(g, e + lanes<T>, Whole<T>{});
        }
    }
    for_vectors<T>(e, width, [&](int64_t at, auto io) XLAYER_FLATTEN {
        XLAYER_UNROLL for (int g = 0; g < Group; ++g) sum[g][0] += f(g, at, io);
    });
    XLAYER_UNROLL for (int g = 0; g < Group; ++g) out[g] = sum_lanes<T>(sum[g][0] + sum[g][1]);
}

// Mean and 1/√(variance + eps) of the rows of a group.
template <class T, int Group>
XLAYER_INLINE void moments(const T* const* x, int64_t width, double eps, T* mean, T* scale) {
    sum_rows_of<T, Group>(width, mean, [&](int g, int64_t e, auto io) XLAYER_FLATTEN { return io.load(x[g] + e); });
    XLAYER_UNROLL for (int g = 0; g < Group; ++g) mean[g] /= static_cast<T>(width);
    sum_rows_of<T, Group>(width, scale, [&](int g, int64_t e, auto io) XLAYER_FLATTEN {
        const Vec<T> centered = io.keep(io.load(x[g] + e) - mean[g]);
        return centered * centered;
    });
    XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
        scale[g] = 1 / std::sqrt(scale[g] / static_cast<T>(width) + static_cast<T>(eps));
    }
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
    // Whether results of all layers, rows of the dtype T itself, are written past the caches.
    bool is_past(const void* results) const {
        const int64_t bytes = args.layers * args.tokens * args.width * static_cast<int64_t>(sizeof(T));
        return args.dtype == own_dtype<T> && bytes >= kPastCaches && args.width % lanes<T> == 0 &&
               reinterpret_cast<uintptr_t>(results) % kVectorBytes == 0;
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

    // f(g, value, x̂, e, io) for every vector of the rows of a group of taps, normalized where that is asked for.
    template <int Group, class F>
    XLAYER_INLINE void each_value(const T* const* x, T* scale, const F& f) const {
        if (!args.normalize) {
            for_vectors<T>(0, args.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
                XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                    const Vec<T> value = io.load(x[g] + e);
                    f(g, value, value, e, io);
                }
            });
            return;
        }
        T mean[Group];
        moments<T, Group>(x, args.width, args.eps, mean, scale);
        const T* weight = static_cast<const T*>(args.norm_weight);
        const T* bias = static_cast<const T*>(args.norm_bias);
        for_vectors<T>(0, args.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            const Vec<T> slope = io.load(weight + e), offset = bias == nullptr ? Vec<T>{} : io.load(bias + e);
            XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                const Vec<T> unit = io.keep((io.load(x[g] + e) - mean[g]) * scale[g]);
                f(g, unit * slope + offset, unit, e, io);
            }
        });
    }

    const EmaScan& args;
    const int64_t row, tile;  // elements of a row of scratch; tokens that walk together
};

template <class T>
class Forward {
  public:
    explicit Forward(const EmaScanForward& args)
        : args_(args), scan_(args.scan), past_(!args.scan.last_only && scan_.is_past(args.states)) {}

    int64_t worker_size() const {
        return round_up((scan_.tile + 2 * kGroup) * scan_.row * static_cast<int64_t>(sizeof(T)), 64);
    }

    void run() const {
        const EmaScan& scan = args_.scan;
        parallel_tasks(scan.pool, ceil_div(scan.tokens, scan_.tile), [&](int64_t worker, int64_t task) {
            char* memory = static_cast<char*>(args_.workspace) + worker * worker_size();
            const int64_t first = task * scan_.tile;
            walk(memory, first, lesser(scan_.tile, scan.tokens - first));
            if (past_) finish_past_caches();
        });
    }

  private:
    void walk(char* memory, int64_t first, int64_t count) const {
        const EmaScan& scan = args_.scan;
        for (int64_t t = 0; t < count; ++t) scan_.start(first + t, scan_.state(memory, t));
        for (int64_t l = 0; l < scan.layers; ++l) {
            const T gate = scan_.gate(l);
            for_groups(count, [&](auto group, int64_t t)
                                  XLAYER_FLATTEN { step<decltype(group)::value>(memory, l, first, t, gate); });
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

    // One layer of a group of tokens.
    template <int Group>
    XLAYER_INLINE void step(char* memory, int64_t layer, int64_t first, int64_t t, T gate) const {
        const EmaScan& scan = args_.scan;
        const T decay = 1 - gate;
        const bool more = !scan.last_only && !past_ && scan.dtype == own_dtype<T> && layer + 1 < scan.layers;
        T* scratch = scan_.state(memory, scan_.tile);
        const T *x[Group], *next[Group], *next_to[Group];
        T *state[Group], *to[Group], unused[Group];
        int64_t offset[Group];
        XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
            const int64_t token = first + t + g;
            state[g] = scan_.state(memory, t + g);
            offset[g] = (layer * scan.tokens + token) * scan.width;
            x[g] = scan_.tap(layer, token, scratch + 2 * g * scan_.row);
            next[g] = scan_.ahead(scan.x, layer + 1, token, x[g]);
            T* out = scratch + (2 * g + 1) * scan_.row;
            to[g] = scan.last_only ? state[g] : write_target<T>(scan.dtype, args_.states, offset[g], out);
            next_to[g] = more ? to[g] + scan.tokens * scan.width : state[g];
        }
        scan_.template each_value<Group>(x, unused,
                                         [&](int g, Vec<T> value, Vec<T>, int64_t e, auto io) XLAYER_FLATTEN {
                                             prefetch(next[g] + e);
                                             prefetch_to_write(next_to[g] + e);
                                             const Vec<T> now = decay * load(state[g] + e) + gate * value;
                                             store(state[g] + e, now);
                                             if (past_) return io.store_past(to[g] + e, now);
                                             if (to[g] != state[g]) io.store(to[g] + e, now);
                                         });
        if (scan.last_only) return;
        XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
            narrow_elements(scan.dtype, to[g], args_.states, offset[g], scan.width);
        }
    }

    const EmaScanForward& args_;
    Scan<T> scan_;
    bool past_;
};

template <class T>
class Backward {
  public:
    explicit Backward(const EmaScanBackward& args) : args_(args), scan_(args.scan), past_(scan_.is_past(args.grad_x)) {
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
            if (past_) finish_past_caches();
        });
        finish();
    }

  private:
    int64_t rows_of_layers() const { return args_.scan.layers * scan_.tile; }
    int64_t worker_size() const {
        const int64_t rows = 2 * rows_of_layers() + 2 * scan_.tile + 2 * kGroup;
        return round_up((rows * scan_.row + rows_of_layers()) * static_cast<int64_t>(sizeof(T)), 64);
    }
    int64_t partial_size() const {
        return round_up(args_.scan.layers * 8, 64) + round_up(2 * scan_.row * static_cast<int64_t>(sizeof(T)), 64);
    }

    // Scratch of a worker: rows of a tile, x̂ and n − S_{l−1} of each layer, S and ∂L/∂S; rows to widen and to narrow
    // in; the norm's 1/deviation.
    struct Worker {
        T *normal, *change, *state, *grad, *rows, *scale;

        Worker(const Backward& of, char* memory) {
            const int64_t row = of.scan_.row, tile = of.scan_.tile, layers = of.rows_of_layers();
            normal = reinterpret_cast<T*>(memory);
            change = normal + layers * row;
            state = change + layers * row;
            grad = state + tile * row;
            rows = grad + tile * row;
            scale = rows + 2 * kGroup * row;
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
        for (int64_t t = 0; t < count; ++t) scan_.start(first + t, with.state + t * scan_.row);
        for (int64_t l = 0; l < args_.scan.layers; ++l) {
            const T gate = scan_.gate(l);
            for_groups(count, [&](auto group, int64_t t)
                                  XLAYER_FLATTEN { up_group<decltype(group)::value>(with, l, first, t, gate); });
        }
    }

    template <int Group>
    XLAYER_INLINE void up_group(const Worker& with, int64_t layer, int64_t first, int64_t t, T gate) const {
        const int64_t at = layer * scan_.tile + t, row = scan_.row;
        const T *x[Group], *next[Group];
        XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
            x[g] = scan_.tap(layer, first + t + g, with.rows + g * row);
            next[g] = scan_.ahead(args_.scan.x, layer + 1, first + t + g, x[g]);
        }
        T *normal = with.normal + at * row, *change = with.change + at * row, *state = with.state + t * row;
        scan_.template each_value<Group>(
            x, with.scale + at, [&](int g, Vec<T> value, Vec<T> unit, int64_t e, auto) XLAYER_FLATTEN {
                prefetch(next[g] + e);
                const Vec<T> before = load(state + g * row + e), difference = value - before;
                if (args_.scan.normalize) store(normal + g * row + e, unit);
                store(change + g * row + e, difference);
                store(state + g * row + e, before + gate * difference);
            });
    }

    void down(const Worker& with, const Partial& sums, int64_t first, int64_t count) const {
        const EmaScan& scan = args_.scan;
        for (int64_t t = 0; t < count; ++t) {
            T* grad = with.grad + t * scan_.row;
            for (int64_t e = 0; e < scan_.row; ++e) grad[e] = 0;
            if (!scan.last_only) continue;
            const T* given = scan_.read(args_.grad, 0, first + t, with.rows);
            for (int64_t e = 0; e < scan.width; ++e) grad[e] = given[e];
        }
        for (int64_t l = scan.layers - 1; l >= 0; --l) {
            const T gate = scan_.gate(l);
            for_groups(count, [&](auto group, int64_t t) XLAYER_FLATTEN {
                down_group<decltype(group)::value>(with, sums, l, first, t, gate);
            });
        }
        if (args_.grad_initial == nullptr) return;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t offset = (first + t) * scan.width;
            const T* grad = with.grad + t * scan_.row;
            T* to = write_target<T>(scan.dtype, args_.grad_initial, offset, with.rows);
            for (int64_t e = 0; e < scan.width; ++e) to[e] = grad[e];
            narrow_elements(scan.dtype, to, args_.grad_initial, offset, scan.width);
        }
    }

    template <class Io>
    XLAYER_INLINE void give(const Io& io, T* to, Vec<T> value) const {
        past_ ? io.store_past(to, value) : io.store(to, value);
    }

    // Through S_l and the LayerNorm of a group of tokens to ∂L/∂x_l.
    template <int Group>
    XLAYER_INLINE void down_group(const Worker& with, const Partial& sums, int64_t layer, int64_t first, int64_t t,
                                  T gate) const {
        const EmaScan& scan = args_.scan;
        const int64_t at = layer * scan_.tile + t, row = scan_.row;
        const bool own = scan.dtype == own_dtype<T>;
        T* grad = with.grad + t * row;
        const T *given[Group], *next[Group], *next_to[Group];
        T* to[Group];
        int64_t offset[Group];
        XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
            const int64_t token = first + t + g;
            offset[g] = (layer * scan.tokens + token) * scan.width;
            given[g] = next[g] = grad + g * row;
            if (!scan.last_only) {
                given[g] = scan_.read(args_.grad, layer, token, with.rows + 2 * g * row);
                next[g] = scan_.ahead(args_.grad, layer - 1, token, given[g]);
            }
            to[g] = write_target<T>(scan.dtype, args_.grad_x, offset[g], with.rows + (2 * g + 1) * row);
            next_to[g] = own && !past_ && layer > 0 ? to[g] - scan.tokens * scan.width : grad;
        }
        const bool add = !scan.last_only;
        auto arrived = [&](int g, int64_t e, auto io) XLAYER_FLATTEN {
            prefetch(next[g] + e);
            prefetch_to_write(next_to[g] + e);
            const Vec<T> now = load(grad + g * row + e);
            return io.keep(add ? now + io.load(given[g] + e) : now);
        };
        const T* change = with.change + at * row;
        if (!scan.normalize) {
            Vec<T> product[Group] = {};
            for_vectors<T>(0, scan.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
                XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                    const Vec<T> now = arrived(g, e, io);
                    product[g] += io.keep(now * load(change + g * row + e));
                    give(io, to[g] + e, gate * now);
                    store(grad + g * row + e, now * (1 - gate));
                }
            });
            XLAYER_UNROLL for (int g = 0; g < Group; ++g) sums.gate[layer] += sum_lanes<T>(product[g]);
        } else {
            const T *normal = with.normal + at * row, *weight = static_cast<const T*>(scan.norm_weight);
            Vec<T> product[Group] = {}, sum[Group] = {}, along[Group] = {};
            for_vectors<T>(0, scan.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
                const Vec<T> slope = gate * io.load(weight + e);
                Vec<T> of_weight = {}, of_bias = {};
                XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                    const Vec<T> now = arrived(g, e, io), unit = load(normal + g * row + e), scaled = now * slope;
                    store(grad + g * row + e, now);
                    product[g] += io.keep(now * load(change + g * row + e));
                    sum[g] += scaled;
                    along[g] += scaled * unit;
                    of_weight += now * unit;
                    of_bias += now;
                }
                store(sums.weight + e, load(sums.weight + e) + gate * of_weight);
                store(sums.bias + e, load(sums.bias + e) + gate * of_bias);
            });
            T mean[Group], tilt[Group];
            XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                sums.gate[layer] += sum_lanes<T>(product[g]);
                mean[g] = sum_lanes<T>(sum[g]) / static_cast<T>(scan.width);
                tilt[g] = sum_lanes<T>(along[g]) / static_cast<T>(scan.width);
            }
            for_vectors<T>(0, scan.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
                const Vec<T> slope = gate * io.load(weight + e);
                XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                    const Vec<T> now = load(grad + g * row + e), unit = load(normal + g * row + e);
                    give(io, to[g] + e, with.scale[at + g] * (now * slope - mean[g] - tilt[g] * unit));
                    store(grad + g * row + e, now * (1 - gate));
                }
            });
        }
        XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
            narrow_elements(scan.dtype, to[g], args_.grad_x, offset[g], scan.width);
        }
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
    bool past_;
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
