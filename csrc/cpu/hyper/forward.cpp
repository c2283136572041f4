// hyper forward (xlayer/hyper.h): post, pre or both for blocks of tokens. A token's rows are mixed, normalized,
// multiplied with the weight and mixed again while they are in the caches. Tokens do not depend on each other, so the
// bits do not depend on the threads.
#include "cpu/hyper/coefficients.h"
#include "xlayer/workspace.h"

namespace xlayer::cpu::XLAYER_ISA::hyper {
namespace {

// Tokens whose coefficients are made together: one to a lane of Sinkhorn's vectors; rows of four share a weight's load.
template <class T>
constexpr int64_t kBlock = lanes<T> > 4 ? lanes<T> : 4;
constexpr int64_t kBlocksPerTask = 2;

// One worker's arrays.
template <class T>
struct Worker {
    SinkhornBuffers<T>* sinkhorn;
    int64_t row;
    T *in, *out;  // [n+1][row] each: rows that are not of type T, widened

    Worker(const HyperForward& args, Workspace& space) : row(row_size<T>(args.size)) {
        sinkhorn = space.take<SinkhornBuffers<T>>(1);
        in = space.take<T>(args.size.streams + 1, row);
        out = space.take<T>(args.size.streams + 1, row);
    }
};

template <class T>
int64_t worker_bytes(const HyperForward& args) {
    Workspace space(nullptr);
    Worker<T>(args, space);
    return space.bytes;
}

template <class T, int N>
class Forward {
  public:
    Forward(const HyperForward& args)
        : args_(args), n_(streams_of<N>(args.size.streams)), params_(args.connection, args.pre ? n_ : 0) {
        dynamic_ = args.pre && args.connection.norm != HyperNorm::none;
        if (dynamic_ && args.connection.norm == HyperNorm::layer)
            sum_weights(static_cast<const T*>(args.connection.weight), args.size, weight_sum_);
    }

    void run() {
        const int64_t blocks = ceil_div(args_.size.tokens(), kBlock<T>);
        parallel_tasks(args_.pool, ceil_div(blocks, kBlocksPerTask), [&](int64_t index, int64_t task) {
            Workspace space(static_cast<char*>(args_.workspace) + index * worker_bytes<T>(args_));
            const Worker<T> worker(args_, space);
            const int64_t last = min(blocks, (task + 1) * kBlocksPerTask);
            for (int64_t b = task * kBlocksPerTask; b < last; ++b) {
                const int64_t first = b * kBlock<T>;
                block(worker, first, min(kBlock<T>, args_.size.tokens() - first));
            }
        });
    }

  private:
    // The streams that pre reads, h', of one token.
    void read_streams(const Worker<T>& worker, int64_t token, const T** rows) const {
        const bool post = args_.post.branch.data != nullptr;
        const int64_t* stride = post ? args_.out.stride : args_.in.stride;
        const void* data = post ? args_.out.data : args_.in.data;
        for (int j = 0; j < n_; ++j) {
            rows[j] = read_elements(args_.size.dtype, data, token_offset(args_.size, stride, token) + j * stride[2],
                                    args_.size.width, worker.out + j * worker.row);
        }
    }

    void post(const Worker<T>& worker, int64_t token) const {
        const HyperSizes& size = args_.size;
        const T* in[kMaxStreamsOf<N> + 1];
        T* out[kMaxStreamsOf<N>];
        for (int j = 0; j < n_; ++j) {
            in[j] = read_elements(size.dtype, args_.in.data,
                                  token_offset(args_.size, args_.in.stride, token) + j * args_.in.stride[2], size.width,
                                  worker.in + j * worker.row);
            out[j] = write_target(size.dtype, args_.out.data,
                                  token_offset(args_.size, args_.out.stride, token) + j * args_.out.stride[2],
                                  worker.out + j * worker.row);
        }
        in[n_] = read_elements(size.branch_dtype, args_.post.branch.data,
                               token_offset(args_.size, args_.post.branch.stride, token), size.width,
                               worker.in + n_ * worker.row);
        const T* c = static_cast<const T*>(args_.post.coefficients);
        if (!args_.post.shared) c += token * size.coefficients();
        T a[kMaxStreamsOf<N> * (kMaxStreamsOf<N> + 1)];
        for (int k = 0; k < n_; ++k)
            for (int j = 0; j <= n_; ++j)
                a[k * (n_ + 1) + j] = j < n_ ? c[j * (n_ + 2) + 1 + k] : c[k * (n_ + 2) + n_ + 1];
        mix_post<T, N>(n_, in, a, out, size.width, prefetch_distance<T>(size, size.dtype, args_.out.stride, token));
        for (int k = 0; k < n_; ++k) {
            narrow_elements(size.dtype, out[k], args_.out.data,
                            token_offset(args_.size, args_.out.stride, token) + k * args_.out.stride[2], size.width);
        }
    }

    // A number near the mean of each row, that of its first elements: it differs from the mean by at most
    // √(d / kGuess) deviations, so that the moments around it, from one pass, lose no digits.
    static constexpr int64_t kGuess = 128;
    void guess_means(const T* const* rows, T* shift) const {
        const int64_t count = min(kGuess, args_.size.width);
        for (int j = 0; j < n_; ++j) {
            Vec<T> sum = {};
            for_vectors<T>(0, count, [&](int64_t e, auto io) XLAYER_FLATTEN { sum += io.load(rows[j] + e); });
            shift[j] = sum_lanes<T>(sum) / static_cast<T>(count);
        }
    }

    static void store_statistics(T* statistics, int64_t row, T shift, T off, T inverse) {
        T* out = statistics + row * kHyperStatistics;
        out[0] = shift, out[1] = off, out[2] = inverse;
    }

    // z and statistics of one token whose streams have a norm each.
    void logits(const T* const* rows, const T* const* next_rows, T* z, T* statistics) const {
        const int64_t columns = args_.size.columns(), num_coefficients = args_.size.coefficients();
        const bool layer = args_.connection.norm == HyperNorm::layer;
        const T width = static_cast<T>(args_.size.width), eps = static_cast<T>(args_.connection.eps);
        T shift[kMaxStreamsOf<N>] = {};
        if (layer) guess_means(rows, shift);
        constexpr int kNumbers = kMaxStreamsOf<N> * (kMaxStreamsOf<N> + 4);
        Vec<T> lanes_of[kNumbers];
        T sum[kNumbers + lanes<T>];
        products<T>({n_, columns, rows, shift, static_cast<const T*>(args_.connection.weight), args_.size.width,
                     args_.size.width, false, lanes_of, lanes_of + num_coefficients, lanes_of + num_coefficients + n_,
                     next_rows});
        sum_vectors<T>(lanes_of, num_coefficients + 2 * n_, sum);
        for (int j = 0; j < n_; ++j) {
            const T off = layer ? sum[num_coefficients + j] / width : T(0);
            const T inverse = 1 / std::sqrt(sum[num_coefficients + n_ + j] / width - off * off + eps);
            for (int64_t m = 0; m < columns; ++m)
                z[j * columns + m] = inverse * (sum[j * columns + m] - off * weight_sum_[m]);
            store_statistics(statistics, j, shift[j], off, inverse);
        }
    }

    // The same of `count` tokens for rms_all. Four tokens at a time meet the weight, which is large; but rows of
    // another dtype are widened into one token's scratch, so there each meets it alone.
    void logits_of_all(const Worker<T>& worker, int64_t first, int64_t count, T* z, T* statistics) const {
        const HyperSizes& size = args_.size;
        const int64_t num_coefficients = size.coefficients();
        const T* weight = static_cast<const T*>(args_.connection.weight);
        const T zero[4] = {};
        for (int64_t t = 0; t < count;) {
            const int64_t group = size.dtype == dtype_of<T> && count - t >= 4 ? 4 : 1;
            const T* rows[4][kMaxStreamsOf<N>];
            for (int64_t g = 0; g < group; ++g) read_streams(worker, first + t + g, rows[g]);
            Vec<T> product[4 * kMaxStreamsOf<N> * (kMaxStreamsOf<N> + 2)], sum[4], square[4];
            T all[4] = {}, flat[kMaxStreamsOf<N> * (kMaxStreamsOf<N> + 2) + lanes<T>];
            for (int j = 0; j < n_; ++j) {
                const T* stream[4];
                for (int64_t g = 0; g < group; ++g) stream[g] = rows[g][j];
                products<T>({group, num_coefficients, stream, zero, weight + j * size.width, n_ * size.width,
                             size.width, j > 0, product, sum, square, stream});
                for (int64_t g = 0; g < group; ++g) all[g] += sum_lanes<T>(square[g]);
            }
            for (int64_t g = 0; g < group; ++g) {
                const T elements = static_cast<T>(n_) * static_cast<T>(size.width);
                const T inverse = 1 / std::sqrt(all[g] / elements + static_cast<T>(args_.connection.eps));
                sum_vectors<T>(product + g * num_coefficients, num_coefficients,
                               flat);  // alone: in the same order in any group
                for (int64_t at = 0; at < num_coefficients; ++at)
                    z[(t + g) * num_coefficients + at] = inverse * flat[at];
                for (int j = 0; j < n_; ++j) store_statistics(statistics, (t + g) * n_ + j, T(0), T(0), inverse);
            }
            t += group;
        }
    }

    void coefficients(const Worker<T>& worker, int64_t first, int64_t count) const {
        const int64_t num_coefficients = args_.size.coefficients();
        T* z = static_cast<T*>(args_.logits) + first * num_coefficients;
        if (args_.connection.norm == HyperNorm::rms_all)
            logits_of_all(worker, first, count, z, static_cast<T*>(args_.statistics) + first * n_ * kHyperStatistics);
        T* c = static_cast<T*>(args_.coefficients) + first * num_coefficients;
        if (is_constrained(args_.connection)) {
            for (int64_t t = 0; t < count; t += lanes<T>) {
                constrained_coefficients(args_.connection, params_, n_, z + t * num_coefficients,
                                         c + t * num_coefficients, min<int64_t>(lanes<T>, count - t), *worker.sinkhorn);
            }
            return;
        }
        const bool tanh = args_.connection.form == HyperForm::tanh;
        for (int64_t t = 0; t < count; ++t)
            plain_coefficients(params_, tanh, z + t * num_coefficients, c + t * num_coefficients, num_coefficients);
    }

    void pre(const Worker<T>& worker, int64_t token) const {
        const HyperSizes& size = args_.size;
        const T* c = dynamic_ ? static_cast<const T*>(args_.coefficients) + token * size.coefficients() : params_.base;
        const T* rows[kMaxStreamsOf<N>];
        T a[kMaxStreamsOf<N>];
        read_streams(worker, token, rows);
        for (int j = 0; j < n_; ++j) a[j] = c[j * (n_ + 2)];
        T* x = write_target(size.dtype, args_.branch_input, token * size.width, worker.out + n_ * worker.row);
        mix_pre<T, N>(n_, rows, a, x, size.width);
        narrow_elements(size.dtype, x, args_.branch_input, token * size.width, size.width);
    }

    void block(const Worker<T>& worker, int64_t first, int64_t count) const {
        const bool has_post = args_.post.branch.data != nullptr;
        // Unless they are wanted together, tokens go one by one: then a token's rows are still in the caches.
        const bool together =
            dynamic_ && (args_.connection.norm == HyperNorm::rms_all || is_constrained(args_.connection));
        const int64_t step = together ? count : 1;
        for (int64_t t = first; t < first + count; t += step) {
            for (int64_t s = 0; s < step; ++s) {
                if (has_post) post(worker, t + s);
                if (dynamic_ && args_.connection.norm != HyperNorm::rms_all) logits(worker, t + s);
            }
            if (dynamic_) coefficients(worker, t, step);
            for (int64_t s = 0; args_.pre && s < step; ++s) pre(worker, t + s);
        }
    }

    void logits(const Worker<T>& worker, int64_t token) const {
        const T* rows[kMaxStreamsOf<N>];
        read_streams(worker, token, rows);
        const T* next_rows[kMaxStreamsOf<N>];
        const int64_t next = token_offset(args_.size, args_.in.stride, token) +
                             prefetch_distance<T>(args_.size, args_.size.dtype, args_.in.stride, token);
        for (int j = 0; j < n_; ++j)
            next_rows[j] = static_cast<const T*>(args_.in.data) + next + j * args_.in.stride[2];
        logits(rows, next_rows, static_cast<T*>(args_.logits) + token * args_.size.coefficients(),
               static_cast<T*>(args_.statistics) + token * n_ * kHyperStatistics);
    }

    const HyperForward& args_;
    int n_;
    bool dynamic_;
    CoefficientParameters<T> params_;
    T weight_sum_[kHyperMaxStreams + 2] = {};  // of each of the weight's rows, for layer
};

template <class T>
void run_forward(const HyperForward& args) {
    switch (args.size.streams) {
        case 2:
            return Forward<T, 2>(args).run();
        case 4:
            return Forward<T, 4>(args).run();
        case 8:
            return Forward<T, 8>(args).run();
        default:
            return Forward<T, 0>(args).run();
    }
}

}  // namespace

int64_t forward_workspace(const HyperForward& args) {
    const int64_t worker = args.size.dtype == DType::float64 ? worker_bytes<double>(args) : worker_bytes<float>(args);
    return product_of_sizes(args.pool.threads, worker);
}

void forward(const HyperForward& args) {
    if (args.size.dtype == DType::float64) return run_forward<double>(args);
    run_forward<float>(args);
}

}  // namespace xlayer::cpu::XLAYER_ISA::hyper
