// CPU kernel of ema_scan, backward (xlayer/aggregate.h). Bound by memory: in units of d per token it reads 2L (or L)
// and writes L. A tile of tokens walks up through the layers, leaving what it needs of every layer in scratch that
// stays in L2, and down again. Sums over tokens are made per chunk and then in the order of chunks, and chunks follow
// from sizes: the bits do not depend on the threads.
#include "cpu/aggregate/ema.h"

namespace xlayer::cpu::XLAYER_ISA::aggregate {
namespace {

constexpr int64_t kTileBytes = 8192;  // of which 2 for every layer stay in L2
constexpr int64_t kMostChunks = 64;

template <class T>
class Backward {
  public:
    explicit Backward(const EmaScanBackward& args)
        : args_(args), scan_(args.scan, kTileBytes, args.scan.tokens), past_(scan_.is_past(args.grad_x)) {
        const int64_t tiles = ceil_div(args.scan.tokens, scan_.tile);
        chunk_ = greater<int64_t>(1, ceil_div(tiles, kMostChunks)) * scan_.tile;
        chunks_ = ceil_div(args.scan.tokens, chunk_);
    }

    int64_t workspace() const {
        return sum_of_sizes(product_of_sizes(args_.scan.pool.threads, worker_size()),
                            product_of_sizes(chunks_, partial_size()));
    }

    void run() const {
        const EmaScan& scan = args_.scan;
        parallel_tasks(scan.pool, chunks_, [&](int64_t worker, int64_t chunk) {
            Worker with(*this, static_cast<char*>(args_.workspace) + worker * worker_size());
            const Partial sums(*this, chunk);
            const int64_t begin = chunk * chunk_, end = lesser(scan.tokens, begin + chunk_);
            for (int64_t l = 0; l < scan.layers; ++l) sums.gate[l] = 0;
            for (int64_t e = 0; e < 2 * scan_.row; ++e) sums.weight[e] = 0, with.weight[e] = 0;
            for (int64_t first = begin; first < end; first += scan_.tile) {
                const int64_t count = lesser(scan_.tile, end - first);
                up(with, first, count);
                down(with, sums, first, count);
            }
            add_norm(with, sums);
            if (past_) finish_past_caches();
        });
        finish();
    }

  private:
    int64_t rows_of_layers() const { return args_.scan.layers * scan_.tile; }
    int64_t worker_size() const {
        const int64_t rows = 2 * rows_of_layers() + 2 * scan_.tile + 2 * kGroup + 2;
        return round_up((rows * scan_.row + rows_of_layers()) * static_cast<int64_t>(sizeof(T)), 64);
    }
    int64_t partial_size() const {
        return round_up((args_.scan.layers + 2 * scan_.row) * static_cast<int64_t>(sizeof(double)), 64);
    }

    // Scratch of a worker, rows of a tile: x̂ of each layer, S before each and after the last, ∂L/∂S of the layer above;
    // rows to widen and to narrow in; the norm's gradients of a few tokens; the norm's 1/deviation.
    struct Worker {
        T *normal, *state, *grad, *wide, *narrow, *weight, *bias, *scale;
        int64_t added = 0;  // to weight and bias, one after another

        Worker(const Backward& of, char* memory) {
            const int64_t row = of.scan_.row, tile = of.scan_.tile, layers = of.rows_of_layers();
            normal = reinterpret_cast<T*>(memory);
            state = normal + layers * row;
            grad = state + (layers + tile) * row;
            wide = grad + tile * row;
            narrow = wide + kGroup * row;
            weight = narrow + kGroup * row;
            bias = weight + row;
            scale = bias + row;
        }
    };

    // Sums over a chunk's tokens, which may be many, in double.
    struct Partial {
        double *gate, *weight, *bias;

        Partial(const Backward& of, int64_t chunk) {
            char* memory = static_cast<char*>(of.args_.workspace) + of.args_.scan.pool.threads * of.worker_size() +
                           chunk * of.partial_size();
            gate = reinterpret_cast<double*>(memory);
            weight = gate + of.args_.scan.layers;
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
        const int64_t at = layer * scan_.tile + t, row = scan_.row, ahead = scan_.ahead(args_.scan.x, layer, 1);
        const GroupRows<const T> x = scan_.template read<Group>(args_.scan.x, layer, first + t, with.wide);
        const GroupRows<T> normal = {with.normal + at * row, row}, state = {with.state + at * row, row};
        const int64_t after = scan_.tile * row;
        scan_.template each_value<Group>(x, ahead, with.scale + at,
                                         [&](int g, Vec<T> value, Vec<T> unit, int64_t e, auto) XLAYER_FLATTEN {
                                             const Vec<T> before = load(state[g] + e);
                                             store(normal[g] + e, unit);
                                             store(state[g] + e + after, before + gate * (value - before));
                                         });
    }

    void down(Worker& with, const Partial& sums, int64_t first, int64_t count) const {
        const EmaScan& scan = args_.scan;
        for (int64_t t = 0; t < count; ++t) {
            T* grad = with.grad + t * scan_.row;
            for (int64_t e = 0; e < scan_.row; ++e) grad[e] = 0;
            if (!scan.last_only) continue;
            const T* given = scan_.template read<1>(args_.grad, 0, first + t, with.wide)[0];
            for (int64_t e = 0; e < scan.width; ++e) grad[e] = given[e];
        }
        T decay = 1;  // what the layer above multiplies its ∂L/∂S, which is in with.grad, with on its way down
        for (int64_t l = scan.layers - 1; l >= 0; --l) {
            const T gate = scan_.gate(l);
            Vec<T> product = {};
            for_groups(count, [&](auto group, int64_t t) XLAYER_FLATTEN {
                constexpr int kTokens = decltype(group)::value;
                const Layer<kTokens> layer(*this, with, l, first, t, gate, decay);
                if (past_)
                    scan.last_only ? down_group<kTokens, true, true>(layer, product)
                                   : down_group<kTokens, true, false>(layer, product);
                else
                    scan.last_only ? down_group<kTokens, false, true>(layer, product)
                                   : down_group<kTokens, false, false>(layer, product);
                scan_.template finish<kTokens>(layer.to, args_.grad_x, layer.offset);
                if (++with.added >= kRun) add_norm(with, sums);
            });
            sums.gate[l] += sum_lanes<T>(product);
            decay = 1 - gate;
        }
        if (args_.grad_initial == nullptr) return;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t offset = (first + t) * scan.width;
            const T* grad = with.grad + t * scan_.row;
            const GroupRows<T> to = scan_.target(args_.grad_initial, offset, with.narrow);
            for (int64_t e = 0; e < scan.width; ++e) to[0][e] = decay * grad[e];
            scan_.template finish<1>(to, args_.grad_initial, offset);
        }
    }

    // Moves the norm's gradients on, from the short sums of a few tokens to the long ones.
    void add_norm(Worker& with, const Partial& sums) const {
        with.added = 0;
        if (!args_.scan.normalize) return;
        for (int64_t e = 0; e < 2 * scan_.row; ++e) {
            sums.weight[e] += with.weight[e];
            with.weight[e] = 0;
        }
    }

    // One layer of a group of tokens on the way down.
    template <int Group>
    struct Layer {
        T gate, decay;
        int64_t offset, ahead, ahead_to;
        GroupRows<const T> given;  // ∂L/∂states, unless only the last state was wanted
        GroupRows<T> to, grad;     // ∂L/∂x; ∂L/∂S, of the layer above until this one's takes its place
        GroupRows<const T> normal, state;
        const T* scale;
        T *weight, *bias;  // to add the norm's gradients to

        XLAYER_INLINE Layer(const Backward& of, const Worker& with, int64_t layer, int64_t first, int64_t t, T gate,
                            T decay)
            : gate(gate), decay(decay) {
            const EmaScan& scan = of.args_.scan;
            const int64_t at = layer * of.scan_.tile + t, row = of.scan_.row;
            offset = (layer * scan.tokens + first + t) * scan.width;
            grad = {with.grad + t * row, row};
            normal = {with.normal + at * row, row};
            state = {with.state + at * row, row};
            scale = with.scale + at;
            weight = with.weight, bias = with.bias;
            to = of.scan_.target(of.args_.grad_x, offset, with.narrow);
            given = {nullptr, 0};
            if (!scan.last_only) given = of.scan_.template read<Group>(of.args_.grad, layer, first + t, with.wide);
            ahead = of.scan_.ahead(of.args_.grad, layer, -1);
            ahead_to = of.scan_.own && layer > 0 ? -scan.tokens * scan.width : 0;
        }

        // ∂L/∂S_l.
        template <bool Last, class Io>
        XLAYER_INLINE Vec<T> arrived(int g, int64_t e, const Io& io) const {
            const Vec<T> above = decay * load(grad[g] + e);
            if constexpr (Last) return io.keep(above);
            return io.keep(above + io.load(given[g] + e));
        }
        template <bool Past, class Io>
        XLAYER_INLINE void give(int g, int64_t e, const Io& io, Vec<T> value) const {
            if constexpr (Past) {
                io.store_past(to[g] + e, value);
            } else {
                prefetch_to_write(to[g] + e + ahead_to);
                io.store(to[g] + e, value);
            }
        }
    };

    // Through S_l and the LayerNorm of a group of tokens to ∂L/∂x_l, and ⟨∂L/∂S_l, n_l − S_{l−1}⟩.
    template <int Group, bool Past, bool Last>
    XLAYER_INLINE void down_group(const Layer<Group>& with, Vec<T>& products) const {
        const EmaScan& scan = args_.scan;
        Vec<T> product[Group] = {};
        if (!scan.normalize) {
            for_runs<T>(scan.width, [&](int64_t begin, int64_t end) XLAYER_FLATTEN {
                Vec<T> run[Group] = {};
                for_vectors<T>(begin, end, [&](int64_t e, auto io) XLAYER_FLATTEN {
                    XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                        if constexpr (!Last) prefetch_near(with.given[g] + e + with.ahead);
                        const Vec<T> now = with.template arrived<Last>(g, e, io);
                        run[g] += io.keep(now * (load(with.normal[g] + e) - load(with.state[g] + e)));
                        with.template give<Past>(g, e, io, with.gate * now);
                        store(with.grad[g] + e, now);
                    }
                });
                XLAYER_UNROLL for (int g = 0; g < Group; ++g) product[g] += run[g];
            });
        } else {
            norm_backward<Group, Past, Last>(with, product);
        }
        for (int half = Group / 2; half > 0; half /= 2)
            for (int g = 0; g < half; ++g) product[g] += product[g + half];
        products += product[0];
    }

    template <int Group, bool Past, bool Last>
    XLAYER_INLINE void norm_backward(const Layer<Group>& with, Vec<T>* product) const {
        const int64_t width = args_.scan.width;
        const T* weight = static_cast<const T*>(args_.scan.norm_weight);
        const T* bias = static_cast<const T*>(args_.scan.norm_bias);
        Vec<T> sum[Group] = {}, along[Group] = {};
        for_runs<T>(width, [&](int64_t begin, int64_t end) XLAYER_FLATTEN {
            Vec<T> run_product[Group] = {}, run_sum[Group] = {}, run_along[Group] = {};
            for_vectors<T>(begin, end, [&](int64_t e, auto io) XLAYER_FLATTEN {
                const Vec<T> slope = io.load(weight + e), gated = with.gate * slope;
                const Vec<T> offset = bias == nullptr ? Vec<T>{} : io.load(bias + e);
                Vec<T> of_weight = {}, of_bias = {};
                XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                    if (!Last && g < Group / 2) prefetch_near(with.given[g] + e + with.ahead);
                    const Vec<T> now = with.template arrived<Last>(g, e, io), unit = load(with.normal[g] + e);
                    store(with.grad[g] + e, now);
                    run_product[g] += io.keep(now * (unit * slope + offset - load(with.state[g] + e)));
                    const Vec<T> scaled = now * gated;
                    run_sum[g] += scaled;
                    run_along[g] += scaled * unit;
                    of_weight += now * unit;
                    of_bias += now;
                }
                store(with.weight + e, load(with.weight + e) + with.gate * of_weight);
                store(with.bias + e, load(with.bias + e) + with.gate * of_bias);
            });
            XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                product[g] += run_product[g];
                sum[g] += run_sum[g];
                along[g] += run_along[g];
            }
        });
        T mean[Group], tilt[Group];
        sum_each_lanes<T, Group>(sum, mean);
        sum_each_lanes<T, Group>(along, tilt);
        XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
            mean[g] /= static_cast<T>(width);
            tilt[g] /= static_cast<T>(width);
        }
        for_vectors<T>(0, width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            const Vec<T> gated = with.gate * io.load(weight + e);
            XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                if (!Last && g >= Group / 2) prefetch_near(with.given[g] + e + with.ahead);
                const Vec<T> now = load(with.grad[g] + e), unit = load(with.normal[g] + e);
                with.template give<Past>(g, e, io, with.scale[g] * (now * gated - mean[g] - tilt[g] * unit));
            }
        });
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
            double of_weight = 0, of_bias = 0;
            for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
                const Partial sums(*this, chunk);
                of_weight += sums.weight[e], of_bias += sums.bias[e];
            }
            weight[e] = static_cast<T>(of_weight);
            if (bias != nullptr) bias[e] = static_cast<T>(of_bias);
        }
    }

    const EmaScanBackward& args_;
    Scan<T> scan_;
    bool past_;
    int64_t chunk_, chunks_;  // tokens of a chunk, and how many chunks
};

}  // namespace

int64_t ema_scan_backward_workspace(const EmaScanBackward& args) {
    return args.scan.dtype == DType::float64 ? Backward<double>(args).workspace() : Backward<float>(args).workspace();
}

void ema_scan_backward(const EmaScanBackward& args) {
    if (args.scan.dtype == DType::float64) return Backward<double>(args).run();
    Backward<float>(args).run();
}

}  // namespace xlayer::cpu::XLAYER_ISA::aggregate
