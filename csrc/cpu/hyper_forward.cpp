// CPU kernel of hyper, forward (xlayer/hyper.h). Bound by memory: in units of d per token it reads n (+1) and writes
// n (+1); 2n+2 for the boundary. A token's rows stay in the caches between the steps: mix, norm and products, x. Tokens
// do not depend on each other, so neither do the bits on how they fall on threads.
#include "hyper_coefficients.h"

namespace xlayer::cpu::XLAYER_ISA {
namespace {

// Tokens whose coefficients are made together: one to a lane of Sinkhorn's vectors; rows of four share a weight's load.
template <class T>
constexpr int64_t kBlock = lanes<T> > 4 ? lanes<T> : 4;
constexpr int64_t kBlocksPerTask = 2;

// Scratch of one worker: bytes.
template <class T>
int64_t worker_size(const HyperForward& args) {
    const int64_t rows = (2 * args.size.streams + 2) * row_size<T>(args.size);
    return round_up(static_cast<int64_t>(sizeof(ConstrainedScratch<T>) + rows * sizeof(T)), 64);
}

template <class T, int N>
class Forward {
  public:
    Forward(const HyperForward& args)
        : args_(args), n_(streams_of<N>(args.size.streams)), with_(args.connection, args.pre ? n_ : 0) {
        dynamic_ = args.pre && args.connection.norm != HyperNorm::none;
    }

    void run() {
        const int64_t blocks = ceil_div(args_.size.tokens(), kBlock<T>);
        parallel_tasks(args_.pool, ceil_div(blocks, kBlocksPerTask), [&](int64_t worker, int64_t task) {
            Worker with(args_, worker);
            const int64_t last = lesser(blocks, (task + 1) * kBlocksPerTask);
            for (int64_t b = task * kBlocksPerTask; b < last; ++b) {
                const int64_t first = b * kBlock<T>;
                block(with, first, lesser(kBlock<T>, args_.size.tokens() - first));
            }
        });
    }

  private:
    struct Worker {
        ConstrainedScratch<T>* constrained;
        int64_t row;
        T *in, *out;  // n+1 rows each, for streams that are not of type T, and y or x

        Worker(const HyperForward& args, int64_t index) {
            char* memory = static_cast<char*>(args.workspace) + index * worker_size<T>(args);
            constrained = reinterpret_cast<ConstrainedScratch<T>*>(memory);
            row = row_size<T>(args.size);
            in = reinterpret_cast<T*>(memory + sizeof(ConstrainedScratch<T>));
            out = in + (args.size.streams + 1) * row;
        }
    };

    // The streams that pre reads, h', of one token.
    void read_streams(const Worker& with, int64_t token, const T** rows) const {
        const bool post = args_.post.branch.data != nullptr;
        const int64_t* stride = post ? args_.out.stride : args_.in.stride;
        const void* data = post ? args_.out.data : args_.in.data;
        for (int j = 0; j < n_; ++j) {
            rows[j] = read_elements(args_.size.dtype, data, token_offset(args_.size, stride, token) + j * stride[2],
                                    args_.size.width, with.out + j * with.row);
        }
    }

    void post(const Worker& with, int64_t token) const {
        const HyperSizes& size = args_.size;
        const T* in[kMost<N> + 1];
        T* out[kMost<N>];
        for (int j = 0; j < n_; ++j) {
            in[j] = read_elements(size.dtype, args_.in.data,
                                  token_offset(args_.size, args_.in.stride, token) + j * args_.in.stride[2], size.width,
                                  with.in + j * with.row);
            out[j] = write_target(size.dtype, args_.out.data,
                                  token_offset(args_.size, args_.out.stride, token) + j * args_.out.stride[2],
                                  with.out + j * with.row);
        }
        in[n_] = read_elements(size.branch_dtype, args_.post.branch.data,
                               token_offset(args_.size, args_.post.branch.stride, token), size.width,
                               with.in + n_ * with.row);
        const T* c = static_cast<const T*>(args_.post.coefficients);
        if (!args_.post.shared) c += token * size.coefficients();
        T a[kMost<N> * (kMost<N> + 1)];
        for (int k = 0; k < n_; ++k)
            for (int j = 0; j <= n_; ++j)
                a[k * (n_ + 1) + j] = j < n_ ? c[j * (n_ + 2) + 1 + k] : c[k * (n_ + 2) + n_ + 1];
        mix_post<T, N>(n_, in, a, out, size.width);
        for (int k = 0; k < n_; ++k) {
            narrow_elements(size.dtype, out[k], args_.out.data,
                            token_offset(args_.size, args_.out.stride, token) + k * args_.out.stride[2], size.width);
        }
    }

    // Mean (0 without one) and 1 / root of variance + eps of each stream, or of all together.
    void statistics(const T* const* rows, T* mean, T* inverse) const {
        const int64_t d = args_.size.width;
        const bool layer = args_.connection.norm == HyperNorm::layer;
        const T width = static_cast<T>(d), eps = static_cast<T>(args_.connection.eps);
        T rest[kMost<N>], square[kMost<N>];
        for (int j = 0; j < n_; ++j) mean[j] = 0;
        if (layer) {
            total_rows<T, N>(n_, rows, d, mean);
            for (int j = 0; j < n_; ++j) mean[j] /= width;
        }
        moments<T, N>(n_, rows, mean, d, rest, square);
        T all = 0;
        for (int j = 0; j < n_; ++j) {
            if (layer) {  // what rounding left of the sum, which counts where the mean is large
                rest[j] /= width;
                mean[j] += rest[j];
                square[j] -= rest[j] * rest[j] * width;
            }
            all += square[j];
        }
        for (int j = 0; j < n_; ++j) {
            const bool together = args_.connection.norm == HyperNorm::rms_all;
            const T variance = together ? all / (static_cast<T>(n_) * width) : square[j] / width;
            inverse[j] = 1 / std::sqrt(variance + eps);
        }
    }

    // z and statistics of `count` tokens. With rms_all, four tokens at a time meet the weight, which is large.
    void logits(const Worker& with, int64_t first, int64_t count) const {
        const HyperSizes& size = args_.size;
        const int64_t numbers = size.coefficients(), columns = size.columns();
        const T* weight = static_cast<const T*>(args_.connection.weight);
        T* z = static_cast<T*>(args_.logits) + first * numbers;
        T* kept = static_cast<T*>(args_.statistics) + first * n_ * 2;
        T mean[kMost<N>], inverse[kMost<N>];
        const T* rows[kMost<N>];
        const bool all = args_.connection.norm == HyperNorm::rms_all;
        for (int64_t t = 0; t < count; ++t) {
            if (args_.post.branch.data != nullptr) post(with, first + t);
            read_streams(with, first + t, rows);
            statistics(rows, mean, inverse);
            for (int j = 0; j < n_; ++j) {
                kept[(t * n_ + j) * 2] = mean[j];
                kept[(t * n_ + j) * 2 + 1] = inverse[j];
            }
            if (all) continue;
            products(n_, columns, rows, mean, weight, size.width, size.width, z + t * numbers, columns, false);
            for (int64_t at = 0; at < numbers; ++at) z[t * numbers + at] *= inverse[at / columns];
        }
        if (all) logits_of_all(with, first, count, z, kept);
    }

    void logits_of_all(const Worker& with, int64_t first, int64_t count, T* z, const T* kept) const {
        const HyperSizes& size = args_.size;
        const int64_t numbers = size.coefficients();
        const T* weight = static_cast<const T*>(args_.connection.weight);
        const bool own = size.dtype == own_dtype<T>;
        const T zero[4] = {};
        for (int64_t t = 0; t < count;) {
            // Rows of another dtype are widened into one token's scratch, so there each token meets the weight alone.
            const int64_t group = own && count - t >= 4 ? 4 : 1;
            const T* rows[4][kMost<N>];
            for (int64_t g = 0; g < group; ++g) read_streams(with, first + t + g, rows[g]);
            for (int j = 0; j < n_; ++j) {
                const T* stream[4];
                for (int64_t g = 0; g < group; ++g) stream[g] = rows[g][j];
                products(group, numbers, stream, zero, weight + j * size.width, n_ * size.width, size.width,
                         z + t * numbers, numbers, j > 0);
            }
            for (int64_t at = 0; at < group * numbers; ++at) {
                z[t * numbers + at] *= kept[(t + at / numbers) * n_ * 2 + 1];
            }
            t += group;
        }
    }

    void coefficients(const Worker& with, int64_t first, int64_t count) const {
        const int64_t numbers = args_.size.coefficients();
        const T* z = static_cast<const T*>(args_.logits) + first * numbers;
        T* c = static_cast<T*>(args_.coefficients) + first * numbers;
        if (is_constrained(args_.connection)) {
            for (int64_t t = 0; t < count; t += lanes<T>) {
                constrained_coefficients(args_.connection, with_, n_, z + t * numbers, c + t * numbers,
                                         lesser<int64_t>(lanes<T>, count - t), *with.constrained);
            }
            return;
        }
        const bool tanh = args_.connection.form == HyperForm::tanh;
        for (int64_t t = 0; t < count; ++t) plain_coefficients(with_, tanh, z + t * numbers, c + t * numbers, numbers);
    }

    void pre(const Worker& with, int64_t token) const {
        const HyperSizes& size = args_.size;
        const T* c = dynamic_ ? static_cast<const T*>(args_.coefficients) + token * size.coefficients() : with_.base;
        const T* rows[kMost<N>];
        T a[kMost<N>];
        read_streams(with, token, rows);
        for (int j = 0; j < n_; ++j) a[j] = c[j * (n_ + 2)];
        T* x = write_target(size.dtype, args_.branch_input, token * size.width, with.out + n_ * with.row);
        mix_pre<T, N>(n_, rows, a, x, size.width);
        narrow_elements(size.dtype, x, args_.branch_input, token * size.width, size.width);
    }

    void block(const Worker& with, int64_t first, int64_t count) const {
        if (dynamic_) {
            // Unless Sinkhorn wants them together, tokens go one by one: then a token's rows are still in the caches.
            const bool one = args_.connection.norm != HyperNorm::rms_all && !is_constrained(args_.connection);
            const int64_t step = one ? 1 : count;
            for (int64_t t = 0; t < count; t += step) {
                logits(with, first + t, step);
                coefficients(with, first + t, step);
                for (int64_t s = 0; s < step; ++s) pre(with, first + t + s);
            }
            return;
        }
        for (int64_t t = 0; t < count; ++t) {
            if (args_.post.branch.data != nullptr) post(with, first + t);
            if (args_.pre) pre(with, first + t);
        }
    }

    const HyperForward& args_;
    int n_;
    bool dynamic_;
    CoefficientParameters<T> with_;
};

template <class T>
void forward(const HyperForward& args) {
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

int64_t hyper_forward_workspace(const HyperForward& args) {
    const int64_t worker = args.size.dtype == DType::float64 ? worker_size<double>(args) : worker_size<float>(args);
    return args.pool.threads * worker;
}

void hyper_forward(const HyperForward& args) {
    if (args.size.dtype == DType::float64) return forward<double>(args);
    forward<float>(args);
}

}  // namespace xlayer::cpu::XLAYER_ISA
