// ema_scan forward (xlayer/aggregate.h). One task is a tile of tokens, scanned through all layers with its states in
// the caches. Tokens do not depend on each other: the bits do not depend on the tiles.
#include "cpu/aggregate/ema.h"

namespace xlayer::cpu::XLAYER_ISA::aggregate {
namespace {

constexpr int64_t kTileBytes = 65536;  // long runs that the prefetchers can follow; states that stay in the caches
constexpr int64_t kTilesPerThread = 4;

enum class Output { last, states, states_streaming };

template <class T>
class Forward {
  public:
    explicit Forward(const EmaScanForward& args)
        : args_(args),
          scan_(args.scan, kTileBytes, ceil_div(args.scan.tokens, args.scan.pool.threads * kTilesPerThread)) {}

    int64_t worker_size() const {
        return round_up((scan_.tile + 2 * kGroup) * scan_.row * static_cast<int64_t>(sizeof(T)), 64);
    }

    void run() const {
        const EmaScan& scan = args_.scan;
        const Output output = scan.last_only                      ? Output::last
                              : scan_.use_streaming(args_.states) ? Output::states_streaming
                                                                  : Output::states;
        parallel_tasks(scan.pool, ceil_div(scan.tokens, scan_.tile), [&](int64_t worker, int64_t task) {
            T* memory = reinterpret_cast<T*>(static_cast<char*>(args_.workspace) + worker * worker_size());
            const int64_t first = task * scan_.tile, count = min(scan_.tile, scan.tokens - first);
            if (output == Output::last) return scan_tile<Output::last>(memory, first, count);
            if (output == Output::states) return scan_tile<Output::states>(memory, first, count);
            scan_tile<Output::states_streaming>(memory, first, count);
            streaming_fence();
        });
    }

  private:
    template <Output output>
    void scan_tile(T* memory, int64_t first, int64_t count) const {
        const EmaScan& scan = args_.scan;
        for (int64_t t = 0; t < count; ++t) scan_.load_initial(first + t, memory + t * scan_.row);
        for (int64_t l = 0; l < scan.layers; ++l) {
            const Gate<T> gate = scan_.gate(l);
            for_groups(count, [&](auto group, int64_t t)
                                  XLAYER_FLATTEN { step<decltype(group)::value, output>(memory, l, first, t, gate); });
        }
        if (output != Output::last) return;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t offset = (first + t) * scan.width;
            const T* state = memory + t * scan_.row;
            if (scan_.same_dtype) {
                for (int64_t e = 0; e < scan.width; ++e) static_cast<T*>(args_.states)[offset + e] = state[e];
            }
            narrow_elements(scan.dtype, state, args_.states, offset, scan.width);
        }
    }

    // One layer of a group of tokens.
    template <int Group, Output output>
    XLAYER_INLINE void step(T* memory, int64_t layer, int64_t first, int64_t t, Gate<T> gate) const {
        const EmaScan& scan = args_.scan;
        T* scratch = memory + scan_.tile * scan_.row;
        const int64_t offset = (layer * scan.tokens + first + t) * scan.width;
        const GroupRows<const T> x = scan_.template read<Group>(scan.x, layer, first + t, scratch);
        const GroupRows<T> to = scan_.target(args_.states, offset, scratch + kGroup * scan_.row);
        const GroupRows<T> state = {memory + t * scan_.row, scan_.row};
        const int64_t prefetch_offset = scan_.prefetch_offset(scan.x, layer, 1);
        const int64_t prefetch_offset_to = scan_.same_dtype && layer + 1 < scan.layers ? scan.tokens * scan.width : 0;
        T unused[Group];
        scan_.template for_each_value<Group>(x, prefetch_offset, unused,
                                             [&](int g, Vec<T> value, Vec<T>, int64_t e, auto io) XLAYER_FLATTEN {
                                                 const Vec<T> now = gate.keep * load(state[g] + e) + gate.take * value;
                                                 store(state[g] + e, now);
                                                 if constexpr (output == Output::states) {
                                                     prefetch_to_write(to[g] + e + prefetch_offset_to);
                                                     io.store(to[g] + e, now);
                                                 } else if constexpr (output == Output::states_streaming) {
                                                     io.store_streaming(to[g] + e, now);
                                                 }
                                             });
        if (output != Output::last) scan_.template finish<Group>(to, args_.states, offset);
    }

    const EmaScanForward& args_;
    Scan<T> scan_;
};

}  // namespace

int64_t ema_scan_forward_workspace(const EmaScanForward& args) {
    const int64_t size =
        args.scan.dtype == DType::float64 ? Forward<double>(args).worker_size() : Forward<float>(args).worker_size();
    return product_of_sizes(args.scan.pool.threads, size);
}

void ema_scan_forward(const EmaScanForward& args) {
    if (args.scan.dtype == DType::float64) return Forward<double>(args).run();
    Forward<float>(args).run();
}

}  // namespace xlayer::cpu::XLAYER_ISA::aggregate
