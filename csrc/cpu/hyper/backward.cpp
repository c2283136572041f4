// hyper backward (xlayer/hyper.h); h' is recomputed. Two steps per token, its rows in the caches between: the products
// of ∂L/∂x and h', from which ∂L/∂z follows; then, per chunk of columns, ∂L/∂h', the weight's gradient, and from ∂L/∂h'
// the gradients of post's inputs.
//
// Gradients of what tokens share (base, weight, …) are summed over runs of tokens whose number depends on the sizes
// alone, then over the runs in order: the bits do not depend on the threads.
#include "cpu/hyper/coefficients.h"
#include "cpu/hyper/gradients.h"
#include "xlayer/workspace.h"

namespace xlayer::cpu::XLAYER_ISA::hyper {
namespace {

constexpr int64_t kColumnChunk = 512;  // elements of d at a time in the second step
constexpr int64_t kMaxRuns = 256;
constexpr int64_t kGroup = 4;  // tokens that meet the weight of rms_all together

// Split of the tokens into runs, and the sums of one run: `sums` numbers in double and the gradient of
// `weights` elements in T.
template <class T>
struct Runs {
    int64_t tokens, length, count, sums, weights;

    explicit Runs(const HyperBackward& args) {
        const HyperSizes& size = args.size;
        tokens = size.tokens();
        weights = PackedWeight<T>(args).size();
        sums = 2 * size.coefficients() + 2 * size.columns();  // base and post's coefficients; bias and scale
        // A run's sums are written and read once more: they shall be few beside what its tokens move.
        const int64_t moved = (3 * size.streams + 3) * size.width;
        length = max<int64_t>(max<int64_t>(16, 8 * weights / moved), ceil_div(tokens, kMaxRuns));
        length = round_up(length, 16);
        count = ceil_div(tokens, length);
    }
};

template <class T>
int64_t scratch_rows(const HyperBackward& args) {  // of one token
    return 4 * args.size.streams + 4;
}

template <class T, int N>
class Backward {
  public:
    explicit Backward(const HyperBackward& args)
        : args_(args),
          n_(streams_of<N>(args.size.streams)),
          dynamic_(args.pre && args.connection.norm != HyperNorm::none),
          all_(args.pre && args.connection.norm == HyperNorm::rms_all),
          post_(args.post.branch.data != nullptr),
          runs_(args),
          packed_(args),
          params_(args.connection, args.pre ? n_ : 0) {
        Workspace space(args.workspace), worker_space(nullptr), run_space(nullptr);
        Worker(args, worker_space);
        Sums(*this, run_space);
        worker_bytes_ = worker_space.bytes, run_bytes_ = run_space.bytes;
        worker_memory_ = space.take<char>(args.pool.threads, worker_bytes_);
        run_memory_ = space.take<char>(runs_.count, run_bytes_);
        packed_weight_ = space.take<T>(runs_.weights);
        bytes_ = space.bytes;
        if (args.workspace == nullptr) return;
        if (dynamic_ && args.connection.norm == HyperNorm::layer)
            sum_weights(static_cast<const T*>(args.connection.weight), args.size, weight_sum_);
        for (int64_t block = 0; block < packed_.streams * packed_.blocks; ++block) {
            packed_.for_each_vector(block, [&](int64_t to, int64_t from, int64_t count) {
                const T* row = static_cast<const T*>(args.connection.weight) + from;
                for (int64_t l = 0; l < lanes<T>; ++l) packed_weight_[to + l] = l < count ? row[l] : T(0);
            });
        }
    }

    int64_t bytes() const { return bytes_; }

    void run() {
        parallel_tasks(args_.pool, runs_.count, [&](int64_t index, int64_t run) {
            Workspace space(worker_memory_ + index * worker_bytes_);
            Worker worker(args_, space);
            for (int64_t e = 0; e < worker.row; ++e) worker.zeros[e] = 0;
            Sums sums = sums_of(run);
            sums.clear(runs_);
            const int64_t last = min(runs_.tokens, (run + 1) * runs_.length);
            const int64_t step = is_constrained(args_.connection) && dynamic_ ? lanes<T> : all_ ? kGroup : 1;
            for (int64_t first = run * runs_.length; first < last; first += step)
                block(worker, sums, first, min(step, last - first));
        });
        add_runs();
    }

  private:
    // Rows of one token, where they lie or widened.
    struct Token {
        const T* h[kMaxStreamsOf<N> + 1];  // and y
        const T* next[kMaxStreamsOf<N>];   // h', what pre read, where there is a norm
        const T* grad_x;
        T product[kMaxStreamsOf<N>];  // ⟨h'_j, ∂L/∂x⟩
        const T* grad_next[kMaxStreamsOf<N>];
        T* out[kMaxStreamsOf<N> + 1];                   // ∂L/∂h, and ∂L/∂y
        T* scratch;                                     // scratch_rows() rows
        int64_t prefetch_offset[kMaxStreamsOf<N> + 1];  // from h, and from y, to the next token's
        int64_t prefetch_offset_out[kMaxStreamsOf<N> + 1];
    };

    // One worker's arrays.
    struct Worker {
        SinkhornBuffers<T>* sinkhorn;
        Vec<T>* history;
        Token token[kGroup];
        StreamGradient<T> gradient[kGroup];
        T* chunk_grad;  // [kGroup][n][kColumnChunk] ∂L/∂h'
        T* zeros;       // a row
        T *grad_c, *grad_z;
        int64_t row;

        Worker(const HyperBackward& args, Workspace& space) : row(row_size<T>(args.size)) {
            const int64_t n = args.size.streams, block = max<int64_t>(lanes<T>, kGroup);
            const int64_t steps = is_constrained(args.connection) ? 2 * args.connection.iterations : 0;
            sinkhorn = space.take<SinkhornBuffers<T>>(1);
            history = space.take<Vec<T>>(steps, n, n);
            for (Token& one : token) one.scratch = space.take<T>(scratch_rows<T>(args), row);
            chunk_grad = space.take<T>(kGroup, n, kColumnChunk);
            zeros = space.take<T>(row);
            grad_c = space.take<T>(block, kMaxCoefficients);
            grad_z = space.take<T>(block, kMaxCoefficients);
        }
    };

    // The sums of one run.
    struct Sums {
        double *base, *post, *bias, *scale;
        T* weight;

        Sums(const Backward& of, Workspace& space) {
            const HyperSizes& size = of.args_.size;
            base = space.take<double>(of.runs_.sums);
            weight = space.take<T>(of.runs_.weights);
            if (base == nullptr) return;
            post = base + size.coefficients();
            bias = post + size.coefficients();
            scale = bias + size.columns();
        }
        void clear(const Runs<T>& runs) const {
            for (int64_t at = 0; at < runs.sums; ++at) base[at] = 0;
            if (runs.weights > 0) std::memset(weight, 0, static_cast<size_t>(runs.weights) * sizeof(T));
        }
    };

    Sums sums_of(int64_t run) const {
        Workspace space(run_memory_ + run * run_bytes_);
        return Sums(*this, space);
    }

    void read(const Worker& worker, int64_t index, Token& token) const {
        const HyperSizes& size = args_.size;
        T* scratch = token.scratch;
        auto take = [&] {
            T* row = scratch;
            scratch += worker.row;
            return row;
        };
        const int64_t h = token_offset(size, args_.in.stride, index);
        const int64_t grad_in = token_offset(size, args_.grad_in.stride, index);
        const int64_t prefetch_offset = prefetch_distance<T>(size, size.dtype, args_.in.stride, index);
        const int64_t prefetch_offset_out = prefetch_distance<T>(size, size.dtype, args_.grad_in.stride, index);
        for (int j = 0; j < n_; ++j) {
            token.h[j] = read_elements(size.dtype, args_.in.data, h + j * args_.in.stride[2], size.width, take());
            token.next[j] = token.h[j];
            token.prefetch_offset[j] = prefetch_offset;
            token.prefetch_offset_out[j] = prefetch_offset_out;
            token.out[j] = write_target(size.dtype, args_.grad_in.data, grad_in + j * args_.grad_in.stride[2], take());
            T* widened = take();
            token.grad_next[j] = worker.zeros;
            if (args_.grad_out.data != nullptr) {
                const int64_t at = token_offset(size, args_.grad_out.stride, index) + j * args_.grad_out.stride[2];
                token.grad_next[j] = read_elements(size.dtype, args_.grad_out.data, at, size.width, widened);
            }
        }
        if (post_) {
            const int64_t y = token_offset(size, args_.post.branch.stride, index);
            token.prefetch_offset[n_] = prefetch_distance<T>(size, size.branch_dtype, args_.post.branch.stride, index);
            const int64_t rows[2] = {size.inner * size.width, size.width};
            token.prefetch_offset_out[n_] = prefetch_distance<T>(size, size.branch_dtype, rows, index);
            token.h[n_] = read_elements(size.branch_dtype, args_.post.branch.data, y, size.width, take());
            token.out[n_] = write_target(size.branch_dtype, args_.grad_branch, index * size.width, take());
        }
        if (!args_.pre) return;
        token.grad_x = read_elements(size.dtype, args_.grad_branch_input.data,
                                     token_offset(size, args_.grad_branch_input.stride, index), size.width, take());
        Vec<T> product[kMaxStreamsOf<N> + 1];
        if (!post_) {
            dot_rows<T, N, 0>(n_, token.h, token.grad_x, size.width, product);
            for (int j = 0; j < n_; ++j) token.product[j] = sum_lanes<T>(product[j]);
        } else if (dynamic_) {
            recompute_streams(index, token, take);
        } else {  // nothing needs h' itself
            dot_rows<T, N, 1>(n_, token.h, token.grad_x, size.width, product);
            const T* c = post_coefficients(index);
            for (int k = 0; k < n_; ++k) {
                token.product[k] = 0;
                for (int j = 0; j <= n_; ++j) token.product[k] += post_coefficient(c, j, k) * sum_lanes<T>(product[j]);
            }
        }
    }

    const T* post_coefficients(int64_t index) const {
        const T* c = static_cast<const T*>(args_.post.coefficients);
        return args_.post.shared ? c : c + index * args_.size.coefficients();
    }

    // Post's coefficient of row j (the streams, then y) in row k.
    T post_coefficient(const T* c, int j, int k) const {
        return j < n_ ? c[j * (n_ + 2) + 1 + k] : c[k * (n_ + 2) + n_ + 1];
    }

    template <class Take>
    void recompute_streams(int64_t index, Token& token, Take take) const {
        const T* c = post_coefficients(index);
        T a[kMaxStreamsOf<N> * (kMaxStreamsOf<N> + 1)];
        T* rows[kMaxStreamsOf<N>];
        for (int k = 0; k < n_; ++k) {
            for (int j = 0; j <= n_; ++j) a[k * (n_ + 1) + j] = post_coefficient(c, j, k);
            rows[k] = take();
        }
        Vec<T> product[kMaxStreamsOf<N>];
        mix_and_dot<T, N>(n_, token.h, a, rows, token.grad_x, args_.size.width, product);
        for (int k = 0; k < n_; ++k) {
            round_elements(args_.size.dtype, rows[k], args_.size.width);
            token.next[k] = rows[k];
            token.product[k] = sum_lanes<T>(product[k]);
        }
    }

    // First step: ∂L/∂c of one token, complete.
    void coefficient_gradient(int64_t index, const Token& token, T* grad_c) const {
        const int64_t num_coefficients = args_.size.coefficients(), columns = args_.size.columns();
        const T* given = static_cast<const T*>(args_.grad_coefficients);
        for (int64_t at = 0; at < num_coefficients; ++at)
            grad_c[at] = given != nullptr ? given[index * num_coefficients + at] : T(0);
        for (int j = 0; j < n_; ++j) grad_c[j * columns] += token.product[j];
    }

    // From ∂L/∂c of `count` tokens to ∂L/∂z, and their shares of the gradients of base, bias and scale.
    void logit_gradient(Worker& worker, Sums& sums, int64_t first, int64_t count) const {
        const int64_t num_coefficients = args_.size.coefficients(), columns = args_.size.columns();
        const T* z = static_cast<const T*>(args_.logits) + first * num_coefficients;
        if (!dynamic_) {
            for (int64_t t = 0; t < count; ++t)
                for (int64_t at = 0; at < num_coefficients; ++at)
                    sums.base[at] += worker.grad_c[t * num_coefficients + at];
            return;
        }
        if (is_constrained(args_.connection)) {
            T* grad_a = worker.grad_z;
            constrained_coefficients_backward(args_.connection, params_, n_, z, worker.grad_c, grad_a, count,
                                              *worker.sinkhorn, worker.history);
            for (int64_t t = 0; t < count; ++t) {
                T* grad = grad_a + t * num_coefficients;
                for (int64_t j = 0, at = 0; j < n_; ++j) {
                    for (int64_t m = 0; m < columns; ++m, ++at) {
                        sums.base[at] += grad[at];
                        sums.scale[m] += static_cast<double>(grad[at]) * z[t * num_coefficients + at];
                        grad[at] *= params_.scale[at];
                    }
                }
            }
            return;
        }
        for (int64_t t = 0; t < count; ++t) {
            T scale[kMaxCoefficients];
            const T* grad_c = worker.grad_c + t * num_coefficients;
            T* grad_z = worker.grad_z + t * num_coefficients;
            plain_coefficients_backward(params_, args_.connection.form == HyperForm::tanh, z + t * num_coefficients,
                                        grad_c, grad_z, scale, num_coefficients);
            for (int64_t j = 0, at = 0; j < n_; ++j) {
                for (int64_t m = 0; m < columns; ++m, ++at) {
                    sums.base[at] += grad_c[at];
                    sums.scale[m] += scale[at];
                    sums.bias[m] += grad_z[at];
                }
            }
        }
    }

    // Prepares the second step's terms of one token.
    void prepare(int64_t index, const Token& token, const T* grad_z, StreamGradient<T>& out) const {
        const int64_t num_coefficients = args_.size.coefficients(), columns = args_.size.columns(),
                      d = args_.size.width;
        const T* c = dynamic_ ? static_cast<const T*>(args_.coefficients) + index * num_coefficients : params_.base;
        out.grad_x = token.grad_x;
        out.prefetch_offset_x =
            prefetch_distance<T>(args_.size, args_.size.dtype, args_.grad_branch_input.stride, index);
        out.prefetch_offset = args_.grad_out.data == nullptr
                                  ? 0
                                  : prefetch_distance<T>(args_.size, args_.size.dtype, args_.grad_out.stride, index);
        out.prefetch_offset_h = post_ ? 0 : token.prefetch_offset[0];
        out.prefetch_offset_out = post_ ? 0 : token.prefetch_offset_out[0];
        for (int j = 0; j < n_; ++j) {
            out.pre[j] = c[j * columns];
            out.slope[j] = out.level[j] = out.mean[j] = out.rest[j] = 0;
        }
        if (!dynamic_) return;
        const T* z = static_cast<const T*>(args_.logits) + index * num_coefficients;
        const T* statistics = static_cast<const T*>(args_.statistics) + index * n_ * kHyperStatistics;
        T along_all = 0;
        for (int j = 0; j < n_; ++j) {
            const T* of = statistics + j * kHyperStatistics;
            const T inverse = of[2];
            T along = 0, level = 0;  // ⟨∂L/∂norm(h), norm(h)⟩ and the sum of ∂L/∂norm(h)
            for (int64_t m = 0; m < columns; ++m) {
                const T grad = grad_z[j * columns + m];
                along += grad * z[j * columns + m];
                level += grad * weight_sum_[m];
                out.logits[j * columns + m] = grad * inverse;
            }
            along_all += along;
            out.mean[j] = of[0], out.rest[j] = of[1];
            out.slope[j] = -inverse * inverse * along / static_cast<T>(d);
            if (args_.connection.norm == HyperNorm::layer) out.level[j] = -inverse * level / static_cast<T>(d);
        }
        for (int j = 0; all_ && j < n_; ++j) {
            const T inverse = statistics[2];
            out.slope[j] = -inverse * inverse * along_all / static_cast<T>(n_ * d);
        }
    }

    // Second step, for `count` ≤ kGroup tokens from `index` on: all gradients that are as long as d.
    void streams_gradient(Worker& worker, Sums& sums, int64_t index, int64_t count) const {
        const int64_t d = args_.size.width, num_coefficients = args_.size.coefficients();
        Vec<T> products[kGroup][(kMaxStreamsOf<N> + 1) * kMaxStreamsOf<N>] = {};
        T a[kGroup][(kMaxStreamsOf<N> + 1) * kMaxStreamsOf<N>];
        for (int64_t g = 0; post_ && g < count; ++g)
            for (int j = 0; j <= n_; ++j)
                for (int k = 0; k < n_; ++k) a[g][j * n_ + k] = post_coefficient(post_coefficients(index + g), j, k);
        for (int64_t begin = 0; begin < d; begin += kColumnChunk) {
            const int64_t length = min(kColumnChunk, d - begin);
            T* grad[kGroup][kMaxStreamsOf<N>];
            for (int64_t g = 0; g < count; ++g) {
                for (int j = 0; j < n_; ++j)
                    grad[g][j] =
                        post_ ? worker.chunk_grad + (g * n_ + j) * kColumnChunk : worker.token[g].out[j] + begin;
            }
            if (args_.pre) chunk_gradient(worker, sums, count, begin, length, grad);
            for (int64_t g = 0; post_ && g < count; ++g) {
                const T* from[kMaxStreamsOf<N>];
                for (int j = 0; j < n_; ++j) from[j] = args_.pre ? grad[g][j] : worker.token[g].grad_next[j] + begin;
                post_chunk<T, N>(n_, from, worker.token[g].h, a[g], worker.token[g].out, begin, length,
                                 worker.token[g].prefetch_offset, worker.token[g].prefetch_offset_out, products[g]);
            }
        }
        for (int64_t g = 0; g < count; ++g) {
            write(worker.token[g], index + g);
            if (!post_) continue;
            T flat[(kMaxStreamsOf<N> + 1) * kMaxStreamsOf<N> + lanes<T>];
            sum_vectors<T>(products[g], (n_ + 1) * n_, flat);
            T* out = static_cast<T*>(args_.grad_post_coefficients) +
                     (args_.post.shared ? 0 : (index + g) * num_coefficients);
            for (int k = 0; k < n_; ++k) {
                for (int j = 0; j <= n_; ++j) {
                    const T product = flat[j * n_ + k];
                    const int64_t at = j < n_ ? j * (n_ + 2) + 1 + k : k * (n_ + 2) + n_ + 1;
                    if (args_.post.shared) {
                        sums.post[at] += product;
                    } else {
                        out[at] = product;
                    }
                }
                if (!args_.post.shared) out[k * (n_ + 2)] = 0;  // post does not use c_j0
            }
        }
    }

    void chunk_gradient(Worker& worker, Sums& sums, int64_t count, int64_t begin, int64_t length,
                        T* const (*grad)[kMaxStreamsOf<N>]) const {
        const int64_t num_coefficients = args_.size.coefficients();
        if (!all_) {
            for (int64_t g = 0; g < count; ++g) {
                const auto function = dynamic_ ? stream_gradient<T, N, true> : stream_gradient<T, N, false>;
                function(n_, worker.gradient[g], worker.token[g].grad_next, worker.token[g].next, packed_weight_,
                         sums.weight, begin, length, grad[g]);
            }
            return;
        }
        for (int j = 0; j < n_; ++j) {
            auto stream = [&](int64_t g, auto tokens) {
                constexpr int kTokens = decltype(tokens)::value;
                const T *grad_next[kTokens], *next[kTokens];
                T* out[kTokens];
                for (int i = 0; i < kTokens; ++i) {
                    grad_next[i] = worker.token[g + i].grad_next[j];
                    next[i] = worker.token[g + i].next[j];
                    out[i] = grad[g + i][j];
                }
                stream_gradient_all<T, kTokens>(j, num_coefficients, worker.gradient + g, grad_next, next,
                                                packed_weight_ + packed_.of_stream(j),
                                                sums.weight + packed_.of_stream(j), begin, length, out);
            };
            int64_t g = 0;
            for (; g + kGroup <= count; g += kGroup) stream(g, Number<kGroup>{});
            for (; g < count; ++g) stream(g, Number<1>{});
        }
    }

    void write(const Token& token, int64_t index) const {
        const HyperSizes& size = args_.size;
        const int64_t grad_in = token_offset(size, args_.grad_in.stride, index);
        for (int j = 0; j < n_; ++j) {
            narrow_elements(size.dtype, token.out[j], args_.grad_in.data, grad_in + j * args_.grad_in.stride[2],
                            size.width);
        }
        if (post_) narrow_elements(size.branch_dtype, token.out[n_], args_.grad_branch, index * size.width, size.width);
    }

    void block(Worker& worker, Sums& sums, int64_t first, int64_t count) const {
        const int64_t num_coefficients = args_.size.coefficients();
        if (args_.pre) {
            for (int64_t t = 0; t < count; ++t) {
                read(worker, first + t, worker.token[t % kGroup]);
                coefficient_gradient(first + t, worker.token[t % kGroup], worker.grad_c + t * num_coefficients);
            }
            logit_gradient(worker, sums, first, count);
        }
        const int64_t group = all_ ? kGroup : 1;
        for (int64_t t = 0; t < count; t += group) {
            const int64_t tokens = min(group, count - t);
            for (int64_t g = 0; g < tokens; ++g) {
                // After the first step of a small block its rows are still there.
                if (!args_.pre || count > group) read(worker, first + t + g, worker.token[g]);
                if (args_.pre)
                    prepare(first + t + g, worker.token[g], worker.grad_z + (t + g) * num_coefficients,
                            worker.gradient[g]);
            }
            streams_gradient(worker, sums, first + t, tokens);
        }
    }

    // Adds the runs' sums, each element in the order of the runs.
    void add_runs() const {
        const HyperSizes& size = args_.size;
        auto add = [&](int64_t at) {
            double sum = 0;
            for (int64_t run = 0; run < runs_.count; ++run) sum += sums_of(run).base[at];
            return static_cast<T>(sum);
        };
        const int64_t num_coefficients = size.coefficients(), columns = size.columns();
        auto write_sums = [&](void* to, int64_t from, int64_t count) {
            if (to != nullptr)
                for (int64_t at = 0; at < count; ++at) static_cast<T*>(to)[at] = add(from + at);
        };
        if (args_.pre) write_sums(args_.grad_base, 0, num_coefficients);
        if (post_ && args_.post.shared) write_sums(args_.grad_post_coefficients, num_coefficients, num_coefficients);
        if (!dynamic_) return;
        write_sums(args_.grad_bias, 2 * num_coefficients, columns);
        write_sums(args_.grad_scale, 2 * num_coefficients + columns, columns);
        parallel_for_each(args_.pool, packed_.streams * packed_.blocks, [&](int64_t block) {
            packed_.for_each_vector(block, [&](int64_t from, int64_t to, int64_t count) {
                double sum[lanes<T>] = {};
                for (int64_t run = 0; run < runs_.count; ++run) {
                    const T* part = sums_of(run).weight + from;
                    for (int64_t l = 0; l < lanes<T>; ++l) sum[l] += part[l];
                }
                for (int64_t l = 0; l < count; ++l) static_cast<T*>(args_.grad_weight)[to + l] = static_cast<T>(sum[l]);
            });
        });
    }

    template <int Value>
    struct Number {
        static constexpr int value = Value;
    };

    const HyperBackward& args_;
    int n_;
    bool dynamic_, all_, post_;
    Runs<T> runs_;
    PackedWeight<T> packed_;
    CoefficientParameters<T> params_;
    T weight_sum_[kHyperMaxStreams + 2] = {};  // of each of the weight's rows, for layer
    int64_t worker_bytes_, run_bytes_, bytes_;
    char *worker_memory_, *run_memory_;
    T* packed_weight_;
};

template <class T>
void run_backward(const HyperBackward& args) {
    switch (args.size.streams) {
        case 2:
            return Backward<T, 2>(args).run();
        case 4:
            return Backward<T, 4>(args).run();
        case 8:
            return Backward<T, 8>(args).run();
        default:
            return Backward<T, 0>(args).run();
    }
}

// The layout depends on the number of streams, but not on whether the compiler knows it.
template <class T>
int64_t workspace_bytes(HyperBackward args) {
    args.workspace = nullptr;
    return Backward<T, 0>(args).bytes();
}

}  // namespace

int64_t backward_workspace(const HyperBackward& args) {
    return args.size.dtype == DType::float64 ? workspace_bytes<double>(args) : workspace_bytes<float>(args);
}

void backward(const HyperBackward& args) {
    if (args.size.dtype == DType::float64) return run_backward<double>(args);
    run_backward<float>(args);
}

}  // namespace xlayer::cpu::XLAYER_ISA::hyper
