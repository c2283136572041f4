// vq_nearest (xlayer/quantize.h). Rows of x lie in the lanes of the vectors and codes are the scalars of a matrix
// product: a register tile of scores updates the best code of each row before it leaves the registers, and no codebook
// is packed. One task is a block of rows and a span of codes. A score is ½|c|² − x·c, summed over the width in order:
// equal codes have equal scores wherever they stand and the lowest wins, whatever the split into tiles and tasks.
#include "cpu/common/gemm.h"
#include "cpu/common/rows.h"
#include "xlayer/quantize.h"
#include "xlayer/workspace.h"

namespace xlayer::cpu::XLAYER_ISA::quantize {
namespace {

constexpr int kVectors = 2;  // of rows in a panel: with twice as many codes to a tile than for four, x is loaded less
template <class T>
constexpr int64_t kPanelRows = int64_t{kVectors} * lanes<T>;
constexpr int64_t kBlockBytes = 256 << 10;  // of packed rows that one task keeps at hand
constexpr int64_t kMaxPanels = 64;          // of one task
constexpr int64_t kStripCodes = 96;         // that score_strip all panels before the next

// Partition of the work: blocks of whole panels of rows, and if these are fewer than threads, spans of codes too. Each
// row's result is the least of exact comparisons, so it does not depend on the cut.
template <class T>
struct Partition {
    int64_t panels, blocks, spans, span_codes;

    explicit Partition(const VqNearest& args) {
        const int64_t all = ceil_div(args.rows, kPanelRows<T>);
        const int64_t threads = max<int64_t>(1, args.pool.threads);
        const int64_t fit = kBlockBytes / (kPanelRows<T> * args.width * static_cast<int64_t>(sizeof(T)));
        const int64_t share = ceil_div(all * args.num_codebooks, threads);
        panels = max<int64_t>(1, min(min(fit, kMaxPanels), share));
        blocks = ceil_div(all, panels);
        const int64_t wanted = ceil_div(threads, max<int64_t>(1, blocks * args.num_codebooks));
        span_codes = round_up(ceil_div(args.codes, wanted), kStripCodes);
        spans = ceil_div(args.codes, span_codes);
    }
    int64_t block_rows() const { return panels * kPanelRows<T>; }
};

// The best score so far of each row of a panel and which code has it.
template <class T>
struct Best {
    T score[kPanelRows<T>];
    typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type code[kPanelRows<T>];  // within its span
};

template <class T>
class Nearest {
  public:
    explicit Nearest(const VqNearest& args) : args_(args), partition_(args) {
        Workspace space(args.workspace);
        terms_ = space.take<T>(args.num_codebooks, args.codes);
        partial_ = space.take<Best<T>>(args.num_codebooks, partition_.blocks, partition_.spans, partition_.panels);
        workers_ = space.take<char>(args.pool.threads, worker_size());
        bytes_ = space.bytes;
    }

    static int64_t workspace(const VqNearest& args) {
        VqNearest sizes = args;
        sizes.workspace = nullptr;
        return Nearest(sizes).bytes_;
    }

    void run() const {
        parallel_tasks(args_.pool, args_.num_codebooks * ceil_div(args_.codes, kStripCodes),
                       [&](int64_t worker, int64_t task) { prepare_codes(worker, task); });
        parallel_tasks(args_.pool, args_.num_codebooks * partition_.blocks * partition_.spans,
                       [&](int64_t worker, int64_t task) {
                           const int64_t span = task % partition_.spans, block = task / partition_.spans;
                           search(worker, block / partition_.blocks, block % partition_.blocks, span);
                       });
        parallel_tasks(args_.pool, args_.num_codebooks * partition_.blocks, [&](int64_t worker, int64_t task) {
            finish(worker, task / partition_.blocks, task % partition_.blocks);
        });
    }

  private:
    int64_t row_size() const { return round_up(args_.width, lanes<T>); }
    // A worker's scratch: a block of packed rows; a strip of codes, and two rows, for dtypes other than T.
    int64_t worker_size() const {
        const int64_t elements = partition_.block_rows() * args_.width + (kStripCodes + 2) * row_size();
        return round_up(elements * static_cast<int64_t>(sizeof(T)), 64);
    }
    T* packed_of(int64_t worker) const { return reinterpret_cast<T*>(workers_ + worker * worker_size()); }
    T* strip_of(int64_t worker) const { return packed_of(worker) + partition_.block_rows() * args_.width; }

    const T* row_of(const VqRows& rows, int64_t h, int64_t row, T* scratch) const {
        return read_elements(rows.dtype, rows.data, h * rows.codebook_stride + row * rows.row_stride, args_.width,
                             scratch);
    }

    T dot(const T* a, const T* b) const {
        Vec<T> sum[4] = {};
        int64_t i = 0;
        for_vectors<T>(0, args_.width,
                       [&](int64_t e, auto io) XLAYER_FLATTEN { sum[i++ % 4] += io.load(a + e) * io.load(b + e); });
        return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    static bool is_finite(T x) { return x - x == 0; }
    static T inverse(T square) { return square == 0 ? T(0) : 1 / std::sqrt(square); }  // of a length

    // Per code what its score needs: euclidean ½|c|², which is inf for a code that cannot be chosen; cosine 1/|c|, NaN.
    void prepare_codes(int64_t worker, int64_t task) const {
        const int64_t strips = ceil_div(args_.codes, kStripCodes), h = task / strips;
        const int64_t first = task % strips * kStripCodes, last = min(first + kStripCodes, args_.codes);
        for (int64_t k = first; k < last; ++k) {
            const T* code = row_of(args_.codebook, h, k, strip_of(worker));
            const T square = dot(code, code);
            T* term = terms_ + h * args_.codes + k;
            if (args_.metric == VqMetric::euclidean) {
                *term = is_finite(square) ? square / 2 : T(HUGE_VAL);
            } else {
                *term = !is_finite(sum_of_zeros(code)) ? T(NAN) : inverse(square);
            }
        }
    }

    // A panel's rows in lanes: to[d][lane]. Rows past the last are zeros.
    void pack(int64_t h, int64_t first, T* to, T* scratch) const {
        for (int64_t r = 0; r < kPanelRows<T>; ++r) {
            if (first + r >= args_.rows) {
                for (int64_t d = 0; d < args_.width; ++d) to[d * kPanelRows<T> + r] = 0;
                continue;
            }
            const T* row = row_of(args_.x, h, first + r, scratch);
            for (int64_t d = 0; d < args_.width; ++d) to[d * kPanelRows<T> + r] = row[d];
        }
    }

    void search(int64_t worker, int64_t h, int64_t block, int64_t span) const {
        T *packed = packed_of(worker), *strip = strip_of(worker);
        const int64_t first_row = block * partition_.block_rows();
        const int64_t panels = min(partition_.panels, ceil_div(args_.rows - first_row, kPanelRows<T>));
        Best<T>* best = partial_ + ((h * partition_.blocks + block) * partition_.spans + span) * partition_.panels;
        for (int64_t p = 0; p < panels; ++p) {
            pack(h, first_row + p * kPanelRows<T>, packed + p * kPanelRows<T> * args_.width, strip);
            for (int64_t r = 0; r < kPanelRows<T>; ++r) best[p].score[r] = T(-HUGE_VAL), best[p].code[r] = 0;
        }
        const int64_t begin = span * partition_.span_codes, end = min(begin + partition_.span_codes, args_.codes);
        for (int64_t k = begin; k < end; k += kStripCodes) {
            const int64_t count = min(kStripCodes, end - k);
            int64_t stride = args_.codebook.row_stride;
            const T* codes = row_of(args_.codebook, h, k, strip);
            if (codes == strip) {  // widened: then so must be the others
                stride = row_size();
                for (int64_t c = 1; c < count; ++c) row_of(args_.codebook, h, k + c, strip + c * stride);
            }
            const T* terms = terms_ + h * args_.codes + k;
            for (int64_t p = 0; p < panels; ++p) {
                const T* x = packed + p * kPanelRows<T> * args_.width;
                if (args_.metric == VqMetric::euclidean) {
                    score_strip<false>(x, codes, stride, count, terms, k - begin, best[p]);
                } else {
                    score_strip<true>(x, codes, stride, count, terms, k - begin, best[p]);
                }
            }
        }
    }

    // A strip of codes against a panel of rows.
    template <bool kCosine>
    __attribute__((noinline)) void score_strip(const T* x, const T* codes, int64_t stride, int64_t count,
                                               const T* terms, int64_t first, Best<T>& best) const {
        gemm_panel<T, kVectors>(
            count, args_.width, codes, stride, 1, x, kPanelRows<T>, [&](int64_t row, auto& product) XLAYER_FLATTEN {
                constexpr int kCodes = sizeof(product) / sizeof(product[0]);
                XLAYER_UNROLL for (int v = 0; v < kVectors; ++v) {
                    Vec<T> score = load(best.score + v * lanes<T>);
                    IntVec<T> code;
                    std::memcpy(&code, best.code + v * lanes<T>, sizeof(code));
                    XLAYER_UNROLL for (int c = 0; c < kCodes; ++c) {
                        const T term = terms[row + c];
                        const Vec<T> candidate = kCosine ? product[c][v] * term : product[c][v] - term;
                        const IntVec<T> is_better = candidate > score;  // false for NaN
                        const IntVec<T> number =
                            IntVec<T>{} + static_cast<std::remove_reference_t<decltype(best.code[0])>>(first + row + c);
                        score = is_better ? candidate : score;
                        code = is_better ? number : code;
                    }
                    store(best.score + v * lanes<T>, score);
                    std::memcpy(best.code + v * lanes<T>, &code, sizeof(code));
                }
            });
    }

    // The best of all spans, and the distance to it.
    void finish(int64_t worker, int64_t h, int64_t block) const {
        T *scratch = strip_of(worker), *other = scratch + row_size();
        const int64_t first = block * partition_.block_rows(), last = min(first + partition_.block_rows(), args_.rows);
        for (int64_t n = first; n < last; ++n) {
            const int64_t panel = (n - first) / kPanelRows<T>, lane = (n - first) % kPanelRows<T>;
            const Best<T>* best =
                partial_ + (h * partition_.blocks + block) * partition_.spans * partition_.panels + panel;
            T score = best->score[lane];
            int64_t index = best->code[lane];
            for (int64_t span = 1; span < partition_.spans; ++span) {
                const Best<T>& next = best[span * partition_.panels];
                if (next.score[lane] > score) {
                    score = next.score[lane];
                    index = span * partition_.span_codes + next.code[lane];
                }
            }
            const T* row = row_of(args_.x, h, n, scratch);
            if (!is_finite(sum_of_zeros(row))) index = 0;
            args_.indices[h * args_.rows + n] = index;
            static_cast<T*>(args_.distance)[h * args_.rows + n] =
                distance(row, row_of(args_.codebook, h, index, other));
        }
    }

    // 0, or NaN if the row has a number that is not finite.
    T sum_of_zeros(const T* row) const {
        Vec<T> sum = {};
        for_vectors<T>(0, args_.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            const Vec<T> x = io.load(row + e);
            sum += x - x;
        });
        return sum_lanes<T>(sum);
    }

    T distance(const T* row, const T* code) const {
        if (args_.metric == VqMetric::cosine) {
            const T cosine = dot(row, code) * inverse(dot(row, row)) * inverse(dot(code, code));
            return cosine > 1 ? T(0) : 1 - cosine;
        }
        Vec<T> sum[4] = {};
        int64_t i = 0;
        for_vectors<T>(0, args_.width, [&](int64_t e, auto io) XLAYER_FLATTEN {
            const Vec<T> difference = io.load(row + e) - io.load(code + e);
            sum[i++ % 4] += difference * difference;
        });
        return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }

    const VqNearest& args_;
    Partition<T> partition_;
    T* terms_;
    Best<T>* partial_;
    char* workers_;
    int64_t bytes_;
};

}  // namespace

int64_t vq_nearest_workspace(const VqNearest& args) {
    return args.x.dtype == DType::float64 ? Nearest<double>::workspace(args) : Nearest<float>::workspace(args);
}

void vq_nearest(const VqNearest& args) {
    if (args.x.dtype == DType::float64) return Nearest<double>(args).run();
    Nearest<float>(args).run();
}

}  // namespace xlayer::cpu::XLAYER_ISA::quantize
