// ema_scan backward (xlayer/aggregate.h). A tile of tokens is scanned up the layers, storing each layer's normalized
// taps and states in the worker's buffers, and then down again. One task is a chunk of tiles; sums over tokens are made
// per chunk and then in the order of chunks, which follow from the sizes: the bits do not depend on the threads.
#include "cpu/aggregate/ema.h"

namespace xlayer::cpu::XLAYER_ISA::aggregate {
namespace {

constexpr int64_t kTileBytes = 8192;  // of which 2 for every layer stay in L2
constexpr int64_t kMaxChunks = 64;

template <class T>
class Backward {
  public:
    explicit Backward(const EmaScanBackward& args)
        : args_(args), scan_(args.scan, kTileBytes, args.scan.tokens), streaming_(scan_.use_streaming(args.grad_x)) {
        const int64_t tiles = ceil_div(args.scan.tokens, scan_.tile);
        chunk_ = max<int64_t>(1, ceil_div(tiles, kMaxChunks)) * scan_.tile;
        chunks_ = ceil_div(args.scan.tokens, chunk_);
        Workspace space(args.workspace), worker_space(nullptr), partial_space(nullptr);
        Worker(*this, worker_space);
        Partial(*this, partial_space);
        worker_bytes_ = worker_space.bytes, partial_bytes_ = partial_space.bytes;
        workers_ = space.take<char>(args.scan.pool.threads, worker_bytes_);
        partials_ = space.take<char>(chunks_, partial_bytes_);
        bytes_ = space.bytes;
    }

    static int64_t workspace(EmaScanBackward args) {
        args.workspace = nullptr;
        return Backward(args).bytes_;
    }

    void run() const {
        const EmaScan& scan = args_.scan;
        parallel_tasks(scan.pool, chunks_, [&](int64_t index, int64_t chunk) {
            Workspace space(workers_ + index * worker_bytes_);
            Worker worker(*this, space);
            const Partial sums = partial(chunk);
            const int64_t begin = chunk * chunk_, end = min(scan.tokens, begin + chunk_);
            for (int64_t l = 0; l < scan.layers; ++l) sums.gate[l] = 0;
            for (int64_t e = 0; e < 2 * scan_.row; ++e) sums.weight[e] = 0, worker.weight[e] = 0;
            for (int64_t first = begin; first < end; first += scan_.tile) {
                const int64_t count = min(scan_.tile, end - first);
                forward_pass(worker, first, count);
                backward_pass(worker, sums, first, count);
            }
            add_norm(worker, sums);
            if (streaming_) streaming_fence();
        });
        finish();
    }

  private:
    // One worker's arrays, for the rows of a tile.
    struct Worker {
        T* normal;            // [layers][tile][row]  x̂ of each layer
        T* state;             // [layers + 1][tile][row]  S before each layer and after the last
        T* grad;              // [tile][row]  ∂L/∂S of the layer above
        T *wide, *narrow;     // [kGroup][row] each, to widen and to narrow in
        T *weight, *bias;     // [row] each, one after the other: the norm's gradients of a few tokens
        T* scale;             // [layers][tile]  the norm's 1/deviation
        int64_t pending = 0;  // tokens in weight and bias

        Worker(const Backward& of, Workspace& space) {
            const int64_t row = of.scan_.row, tile = of.scan_.tile, layers = of.args_.scan.layers;
            normal = space.take<T>(layers, tile, row);
            state = space.take<T>(layers + 1, tile, row);
            grad = space.take<T>(tile, row);
            wide = space.take<T>(kGroup, row), narrow = space.take<T>(kGroup, row);
            weight = space.take<T>(2, row), bias = weight == nullptr ? nullptr : weight + row;
            scale = space.take<T>(layers, tile);
        }
    };

    // Sums over a chunk's tokens, which may be many, in double.
    struct Partial {
        double *gate, *weight, *bias;  // [layers]; [row] each, one after the other

        Partial(const Backward& of, Workspace& space) {
            gate = space.take<double>(of.args_.scan.layers);
            weight = space.take<double>(2, of.scan_.row), bias = weight == nullptr ? nullptr : weight + of.scan_.row;
        }
    };
    Partial partial(int64_t chunk) const {
        Workspace space(partials_ + chunk * partial_bytes_);
        return Partial(*this, space);
    }

    void forward_pass(const Worker& worker, int64_t first, int64_t count) const {
        for (int64_t t = 0; t < count; ++t) scan_.load_initial(first + t, worker.state + t * scan_.row);
        for (int64_t l = 0; l < args_.scan.layers; ++l) {
            const T take = scan_.gate(l).take;
            for_groups(count, [&](auto group, int64_t t)
                                  XLAYER_FLATTEN { forward_group<decltype(group)::value>(worker, l, first, t, take); });
        }
    }

    template <int Group>
    XLAYER_INLINE void forward_group(const Worker& worker, int64_t layer, int64_t first, int64_t t, T take) const {
        const int64_t at = layer * scan_.tile + t, row = scan_.row,
                      prefetch_offset = scan_.prefetch_offset(args_.scan.x, layer, 1);
        const GroupRows<const T> x = scan_.template read<Group>(args_.scan.x, layer, first + t, worker.wide);
        const GroupRows<T> normal = {worker.normal + at * row, row}, state = {worker.state + at * row, row};
        const int64_t after = scan_.tile * row;
        scan_.template for_each_value<Group>(x, prefetch_offset, worker.scale + at,
                                             [&](int g, Vec<T> value, Vec<T> unit, int64_t e, auto) XLAYER_FLATTEN {
                                                 const Vec<T> before = load(state[g] + e);
                                                 store(normal[g] + e, unit);
                                                 store(state[g] + e + after, before + take * (value - before));
                                             });
    }

    void backward_pass(Worker& worker, const Partial& sums, int64_t first, int64_t count) const {
        const EmaScan& scan = args_.scan;
        for (int64_t t = 0; t < count; ++t) {
            T* grad = worker.grad + t * scan_.row;
            for (int64_t e = 0; e < scan_.row; ++e) grad[e] = 0;
            if (!scan.last_only) continue;
            const T* given = scan_.template read<1>(args_.grad, 0, first + t, worker.wide)[0];
            for (int64_t e = 0; e < scan.width; ++e) grad[e] = given[e];
        }
        T keep = 1;  // what the layer above multiplies its ∂L/∂S, which is in worker.grad, with on its way down
        for (int64_t l = scan.layers - 1; l >= 0; --l) {
            const Gate<T> gate = scan_.gate(l);
            Vec<T> product = {};
            for_groups(count, [&](auto group, int64_t t) XLAYER_FLATTEN {
                constexpr int kTokens = decltype(group)::value;
                const Layer<kTokens> layer(*this, worker, l, first, t, gate.take, keep);
                if (streaming_)
                    scan.last_only ? backward_group<kTokens, true, true>(layer, product)
                                   : backward_group<kTokens, true, false>(layer, product);
                else
                    scan.last_only ? backward_group<kTokens, false, true>(layer, product)
                                   : backward_group<kTokens, false, false>(layer, product);
                scan_.template finish<kTokens>(layer.to, args_.grad_x, layer.offset);
                if (++worker.pending >= kRun) add_norm(worker, sums);
            });
            sums.gate[l] += sum_lanes<T>(product);
            keep = gate.keep;
        }
        if (args_.grad_initial_state == nullptr) return;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t offset = (first + t) * scan.width;
            const T* grad = worker.grad + t * scan_.row;
            const GroupRows<T> to = scan_.target(args_.grad_initial_state, offset, worker.narrow);
            for (int64_t e = 0; e < scan.width; ++e) to[0][e] = keep * grad[e];
            scan_.template finish<1>(to, args_.grad_initial_state, offset);
        }
    }

    // Moves the norm's gradients on, from the short sums of a few tokens to the long ones.
    void add_norm(Worker& worker, const Partial& sums) const {
        worker.pending = 0;
        if (!args_.scan.normalize) return;
        for (int64_t e = 0; e < 2 * scan_.row; ++e) {
            sums.weight[e] += worker.weight[e];
            worker.weight[e] = 0;
        }
    }

    // One layer of a group of tokens on the way down.
    template <int Group>
    struct Layer {
        T take, keep;  // by which this layer and the one above multiply ∂L/∂S
        int64_t offset, prefetch_offset, prefetch_offset_to;
        GroupRows<const T> given;  // ∂L/∂states, unless only the last state was wanted
        GroupRows<T> to, grad;     // ∂L/∂x; ∂L/∂S, of the layer above until this one's takes its place
        GroupRows<const T> normal, state;
        const T* scale;
        T *weight, *bias;  // to add the norm's gradients to

        XLAYER_INLINE Layer(const Backward& of, const Worker& worker, int64_t layer, int64_t first, int64_t t, T take,
                            T keep)
            : take(take), keep(keep) {
            const EmaScan& scan = of.args_.scan;
            const int64_t at = layer * of.scan_.tile + t, row = of.scan_.row;
            offset = (layer * scan.tokens + first + t) * scan.width;
            grad = {worker.grad + t * row, row};
            normal = {worker.normal + at * row, row};
            state = {worker.state + at * row, row};
            scale = worker.scale + at;
            weight = worker.weight, bias = worker.bias;
            to = of.scan_.target(of.args_.grad_x, offset, worker.narrow);
            given = {nullptr, 0};
            if (!scan.last_only) given = of.scan_.template read<Group>(of.args_.grad, layer, first + t, worker.wide);
            prefetch_offset = of.scan_.prefetch_offset(of.args_.grad, layer, -1);
            prefetch_offset_to = of.scan_.same_dtype && layer > 0 ? -scan.tokens * scan.width : 0;
        }

        // ∂L/∂S_l.
        template <bool Last, class Io>
        XLAYER_INLINE Vec<T> grad_state(int g, int64_t e, const Io& io) const {
            const Vec<T> above = keep * load(grad[g] + e);
            if constexpr (Last) return io.zero_tail(above);
            return io.zero_tail(above + io.load(given[g] + e));
        }
        template <bool Streaming, class Io>
        XLAYER_INLINE void store_grad(int g, int64_t e, const Io& io, Vec<T> value) const {
            if constexpr (Streaming) {
                io.store_streaming(to[g] + e, value);
            } else {
                prefetch_to_write(to[g] + e + prefetch_offset_to);
                io.store(to[g] + e, value);
            }
        }
    };

    // Through S_l and the LayerNorm of a group of tokens to ∂L/∂x_l, and ⟨∂L/∂S_l, n_l − S_{l−1}⟩.
    template <int Group, bool Streaming, bool Last>
    XLAYER_INLINE void backward_group(const Layer<Group>& layer, Vec<T>& products) const {
        const EmaScan& scan = args_.scan;
        Vec<T> product[Group] = {};
        if (!scan.normalize) {
            for_runs<T>(scan.width, [&](int64_t begin, int64_t end) XLAYER_FLATTEN {
                Vec<T> run[Group] = {};
                for_vectors<T>(begin, end, [&](int64_t e, auto io) XLAYER_FLATTEN {
                    XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                        if constexpr (!Last) prefetch_near(layer.given[g] + e + layer.prefetch_offset);
                        const Vec<T> now = layer.template grad_state<Last>(g, e, io);
                        run[g] += io.zero_tail(now * (load(layer.normal[g] + e) - load(layer.state[g] + e)));
                        layer.template store_grad<Streaming>(g, e, io, layer.take * now);
                        store(layer.grad[g] + e, now);
                    }
                });
                XLAYER_UNROLL for (int g = 0; g < Group; ++g) product[g] += run[g];
            });
        } else {
            norm_backward<Group, Streaming, Last>(layer, product);
        }
        for (int half = Group / 2; half > 0; half /= 2)
            for (int g = 0; g < half; ++g) product[g] += product[g + half];
        products += product[0];
    }

    template <int Group, bool Streaming, bool Last>
    XLAYER_INLINE void norm_backward(const Layer<Group>& layer, Vec<T>* product) const {
        const int64_t width = args_.scan.width;
        const T* weight = static_cast<const T*>(args_.scan.norm_weight);
        const T* bias = static_cast<const T*>(args_.scan.norm_bias);
        Vec<T> sum[Group] = {}, along[Group] = {};
        for_runs<T>(width, [&](int64_t begin, int64_t end) XLAYER_FLATTEN {
            Vec<T> run_product[Group] = {}, run_sum[Group] = {}, run_along[Group] = {};
            for_vectors<T>(begin, end, [&](int64_t e, auto io) XLAYER_FLATTEN {
                const Vec<T> slope = io.load(weight + e), gated = layer.take * slope;
                const Vec<T> offset = bias == nullptr ? Vec<T>{} : io.load(bias + e);
                Vec<T> of_weight = {}, of_bias = {};
                XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                    if (!Last && g < Group / 2) prefetch_near(layer.given[g] + e + layer.prefetch_offset);
                    const Vec<T> now = layer.template grad_state<Last>(g, e, io), unit = load(layer.normal[g] + e);
                    store(layer.grad[g] + e, now);
                    run_product[g] += io.zero_tail(now * (unit * slope + offset - load(layer.state[g] + e)));
                    const Vec<T> scaled = now * gated;
                    run_sum[g] += scaled;
                    run_along[g] += scaled * unit;
                    of_weight += now * unit;
                    of_bias += now;
                }
                store(layer.weight + e, load(layer.weight + e) + layer.take * of_weight);
                store(layer.bias + e, load(layer.bias + e) + layer.take * of_bias);
            });
            XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                product[g] += run_product[g];
                sum[g] += run_sum[g];
                along[g] += run_along[g];
            }
        });
        T mean[Group], projection[Group];
        sum_each_lanes<T, Group>(sum, mean);
        sum_each_lanes<T, Group>(along, projection);
        XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
            mean[g] /= static_cast<T>(width);
            projection[g] /= static_cast<T>(width);
        }
        for_vectors<T>(0, width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            const Vec<T> gated = layer.take * io.load(weight + e);
            XLAYER_UNROLL for (int g = 0; g < Group; ++g) {
                if (!Last && g >= Group / 2) prefetch_near(layer.given[g] + e + layer.prefetch_offset);
                const Vec<T> now = load(layer.grad[g] + e), unit = load(layer.normal[g] + e);
                layer.template store_grad<Streaming>(g, e, io,
                                                     layer.scale[g] * (now * gated - mean[g] - projection[g] * unit));
            }
        });
    }

    // Chunks added in order.
    void finish() const {
        const EmaScan& scan = args_.scan;
        for (int64_t l = 0; l < scan.layers; ++l) {
            double sum = 0;
            for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += partial(chunk).gate[l];
            const double logit = static_cast<const T*>(scan.gate_logits)[l];
            const double slope = 1 / ((1 + std::exp(-logit)) * (1 + std::exp(logit)));  // σ'
            static_cast<T*>(args_.grad_gate_logits)[l] = static_cast<T>(sum * slope);
        }
        if (args_.grad_norm_weight == nullptr) return;
        T* weight = static_cast<T*>(args_.grad_norm_weight);
        T* bias = static_cast<T*>(args_.grad_norm_bias);
        for (int64_t e = 0; e < scan.width; ++e) {
            double of_weight = 0, of_bias = 0;
            for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
                const Partial sums = partial(chunk);
                of_weight += sums.weight[e], of_bias += sums.bias[e];
            }
            weight[e] = static_cast<T>(of_weight);
            if (bias != nullptr) bias[e] = static_cast<T>(of_bias);
        }
    }

    const EmaScanBackward& args_;
    Scan<T> scan_;
    bool streaming_;
    int64_t chunk_, chunks_;  // tokens of a chunk, and how many chunks
    int64_t worker_bytes_, partial_bytes_, bytes_;
    char *workers_, *partials_;
};

}  // namespace

int64_t ema_scan_backward_workspace(const EmaScanBackward& args) {
    return args.scan.dtype == DType::float64 ? Backward<double>::workspace(args) : Backward<float>::workspace(args);
}

void ema_scan_backward(const EmaScanBackward& args) {
    if (args.scan.dtype == DType::float64) return Backward<double>(args).run();
    Backward<float>(args).run();
}

}  // namespace xlayer::cpu::XLAYER_ISA::aggregate
