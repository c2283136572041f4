// vq_statistics (xlayer/quantize.h): a stable counting sort of the rows by code, then one sum per code and slice of
// columns, pairwise over its rows.
#include "cpu/common/rows.h"
#include "xlayer/quantize.h"
#include "xlayer/workspace.h"

namespace xlayer::cpu::XLAYER_ISA::quantize {
namespace {

constexpr int64_t kColumns = 64;        // of x that one task adds
constexpr int64_t kLeafRows = 16;       // added one after the other; longer sums by halves
constexpr int64_t kSortedRows = 16384;  // of one task of the sort, at least
constexpr int64_t kMaxSorters = 8;
constexpr int64_t kTasksPerThread = 16;  // some codes have many rows, most have few

template <class T>
class Statistics {
  public:
    explicit Statistics(const VqStatistics& args) : args_(args) {
        sorters_ = max<int64_t>(1, min(min(args.pool.threads, kMaxSorters), args.rows / kSortedRows));
        Workspace space(args.workspace);
        first_ = space.take<int64_t>(args.num_codebooks, sorters_, args.codes + 1);
        code_ = space.take<int64_t>(args.num_codebooks, args.rows);
        row_ = space.take<int64_t>(args.num_codebooks, args.rows);
        bytes_ = space.bytes;
    }

    static int64_t workspace(const VqStatistics& args) {
        VqStatistics sizes = args;
        sizes.workspace = nullptr;
        return Statistics(sizes).bytes_;
    }

    void run() const {
        const int64_t num_codebooks = args_.num_codebooks;
        parallel_for_each(args_.pool, num_codebooks * sorters_,
                          [&](int64_t task) { count(task / sorters_, task % sorters_); });
        parallel_for_each(args_.pool, num_codebooks, [&](int64_t h) { compute_offsets(h); });
        parallel_for_each(args_.pool, num_codebooks * sorters_,
                          [&](int64_t task) { scatter(task / sorters_, task % sorters_); });
        const int64_t slices = max<int64_t>(1, ceil_div(args_.width, kColumns));
        const int64_t codes = max<int64_t>(1, args_.codes / (kTasksPerThread * args_.pool.threads));
        const int64_t groups = ceil_div(args_.codes, codes);
        parallel_tasks(args_.pool, num_codebooks * groups * slices, [&](int64_t, int64_t task) {
            const int64_t slice = task % slices, group = task / slices % groups, h = task / slices / groups;
            for (int64_t k = group * codes; k < min((group + 1) * codes, args_.codes); ++k) finish(h, k, slice);
        });
    }

  private:
    int64_t begin_of(int64_t sorter) const { return sorter * args_.rows / sorters_; }
    // Per sorter and code: first how many of its rows the code has, then where the next one goes.
    int64_t* offsets_of(int64_t h, int64_t sorter) const {
        return first_ + (h * sorters_ + sorter) * (args_.codes + 1);
    }
    // A row's code, or `codes` for one that counts nowhere. Read once per call: another thread may write to the
    // indices meanwhile, and what was counted is what must be placed.
    int64_t code_of(int64_t h, int64_t n) const {
        const int64_t* from = args_.indices + h * args_.index_codebook_stride + n * args_.index_row_stride;
        const int64_t code = __atomic_load_n(from, __ATOMIC_RELAXED);
        return code < 0 || code > args_.codes ? args_.codes : code;
    }

    void count(int64_t h, int64_t sorter) const {
        int64_t* offsets = offsets_of(h, sorter);
        int64_t* codes = code_ + h * args_.rows;
        std::memset(offsets, 0, (args_.codes + 1) * sizeof(int64_t));
        for (int64_t n = begin_of(sorter); n < begin_of(sorter + 1); ++n) ++offsets[codes[n] = code_of(h, n)];
    }

    void compute_offsets(int64_t h) const {
        int64_t next = 0;
        for (int64_t k = 0; k <= args_.codes; ++k) {
            for (int64_t sorter = 0; sorter < sorters_; ++sorter) {
                int64_t* offset = offsets_of(h, sorter) + k;
                const int64_t found = *offset;
                *offset = next;
                next += found;
            }
        }
    }

    void scatter(int64_t h, int64_t sorter) const {
        int64_t* offsets = offsets_of(h, sorter);
        const int64_t* codes = code_ + h * args_.rows;
        int64_t* rows = row_ + h * args_.rows;
        for (int64_t n = begin_of(sorter); n < begin_of(sorter + 1); ++n) rows[offsets[codes[n]]++] = n;
    }

    void finish(int64_t h, int64_t k, int64_t slice) const {
        // After `place`, the last sorter's place of a code is where the next code's rows begin.
        const int64_t* ends = offsets_of(h, sorters_ - 1);
        const int64_t begin = k == 0 ? 0 : ends[k - 1], end = ends[k];
        const int64_t column = slice * kColumns, columns = min(kColumns, args_.width - column);
        T* sums = static_cast<T*>(args_.sums) + (h * args_.codes + k) * args_.width + column;
        if (slice == 0) static_cast<T*>(args_.counts)[h * args_.codes + k] = static_cast<T>(end - begin);
        if (columns <= 0) return;
        T sum[kColumns];
        add(h, column, columns, row_ + h * args_.rows + begin, end - begin, sum);
        for (int64_t c = 0; c < columns; ++c) sums[c] = sum[c];
    }

    void add(int64_t h, int64_t column, int64_t columns, const int64_t* rows, int64_t count, T* sum) const {
        if (count > kLeafRows) {
            T right[kColumns];
            add(h, column, columns, rows, count / 2, sum);
            add(h, column, columns, rows + count / 2, count - count / 2, right);
            for (int64_t c = 0; c < columns; ++c) sum[c] += right[c];
            return;
        }
        for (int64_t c = 0; c < columns; ++c) sum[c] = 0;
        T scratch[kColumns];
        for (int64_t r = 0; r < count; ++r) {
            const int64_t offset = h * args_.x.codebook_stride + rows[r] * args_.x.row_stride + column;
            const T* x = read_elements(args_.x.dtype, args_.x.data, offset, columns, scratch);
            for (int64_t c = 0; c < columns; ++c) sum[c] += x[c];
        }
    }

    const VqStatistics& args_;
    int64_t sorters_, bytes_;
    int64_t *first_, *code_, *row_;
};

}  // namespace

int64_t vq_statistics_workspace(const VqStatistics& args) {
    return args.x.dtype == DType::float64 ? Statistics<double>::workspace(args) : Statistics<float>::workspace(args);
}

void vq_statistics(const VqStatistics& args) {
    if (args.x.dtype == DType::float64) return Statistics<double>(args).run();
    Statistics<float>(args).run();
}

}  // namespace xlayer::cpu::XLAYER_ISA::quantize
