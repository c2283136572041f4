// xlayer::hyper_pre, hyper_post, hyper_post_pre and their backwards: schemas, checks, allocation. All six are one
// kernel forward and one backward, with or without its post and its pre half. Shapes and formulas: xlayer/hyper.h.
//
// If norm is none, the outputs that a norm would fill (coefficients, logits, statistics, and the gradients of
// weight, bias and scale) are empty.
#include "xlayer/hyper.h"

#include <tuple>
#include <utility>

#include "common.h"

namespace xlayer {
namespace {

HyperStreams<const void*> streams_view(const Tensor& streams, const char* name) {
    return {kernel_input(streams, name), {streams.stride(0), streams.stride(1), streams.stride(2)}};
}

HyperRows<const void*> rows_view(const Tensor& rows, const char* name) {
    return {kernel_input(rows, name), {rows.stride(0), rows.stride(1)}};
}

// The inputs of pre besides the streams.
struct Connection {
    const Tensor& base;
    const OptionalTensor &weight, &bias, &scale;
    int64_t norm, form, sinkhorn_iters;
    double eps;
};

// The arguments of all six operators; those of post and of pre are added where the operator has that half.
class HyperArguments {
  public:
    HyperSizes size{};
    HyperStreams<const void*> in{};
    HyperPost post{};
    HyperConnection connection{};

    explicit HyperArguments(const Tensor& streams) : streams_(unit_stride_last(streams)) {
        check_shape(streams, "streams", {-1, -1, -1, -1});
        size.dtype = size.branch_dtype = kernel_dtype(streams, "streams");
        size.outer = streams.size(0), size.inner = streams.size(1);
        size.streams = streams.size(2), size.width = streams.size(3);
        STD_TORCH_CHECK(size.streams >= 1 && size.streams <= kHyperMaxStreams, "streams must number 1 to ",
                        kHyperMaxStreams, ", got ", shape_string(streams));
        STD_TORCH_CHECK(size.width >= 1, "streams must have a width of at least 1, got ", shape_string(streams));
        in = streams_view(streams_, "streams");
        // New tensors keep n outside of inner if the input does, as functional/hyper.py has it for fake tensors.
        stream_major_ = size.inner > 1 && size.streams > 1 && streams.stride(2) > streams.stride(1);
    }

    void add_post(const Tensor& branch_output, const Tensor& coefficients) {
        check_shape(branch_output, "branch_output", {size.outer, size.inner, size.width});
        check_same_device(branch_output, "branch_output", streams_, "streams");
        size.branch_dtype = kernel_dtype(branch_output, "branch_output");
        const bool narrow = size.branch_dtype == DType::bfloat16 || size.branch_dtype == DType::float16;
        STD_TORCH_CHECK(size.branch_dtype == size.dtype || (size.dtype == DType::float32 && narrow),
                        "branch_output must have the dtype of streams, or 16 bits beside float32; got ",
                        torch::headeronly::toString(branch_output.scalar_type()));
        branch_ = unit_stride_last(branch_output);
        post.branch = rows_view(branch_, "branch_output");
        if (size.width == 0 || size.tokens() == 0) post.branch.data = &empty_;  // null would say that there is none
        post.shared = coefficients.dim() == 2;
        post.coefficients = coefficients_data(coefficients, "coefficients", post.shared, post_coefficients_);
    }

    void add_pre(const Connection& from) {
        STD_TORCH_CHECK(from.norm >= 0 && from.norm <= 3, "norm must be 0 to 3, got ", from.norm);
        STD_TORCH_CHECK(from.form >= 0 && from.form <= 3, "form must be 0 to 3, got ", from.form);
        STD_TORCH_CHECK(from.form < 2 || (from.sinkhorn_iters >= 1 && from.sinkhorn_iters <= kHyperMaxIterations),
                        "sinkhorn_iters must be 1 to ", kHyperMaxIterations, ", got ", from.sinkhorn_iters);
        STD_TORCH_CHECK(from.eps >= 0, "eps must not be negative, got ", from.eps);
        connection.norm = static_cast<HyperNorm>(from.norm);
        connection.form = static_cast<HyperForm>(from.form);
        connection.iterations = from.sinkhorn_iters;
        connection.eps = from.eps;
        const int64_t n = size.streams, columns = size.columns();
        connection.base = parameter(from.base, "base", {n, columns}, base_);
        const bool dynamic = connection.norm != HyperNorm::none;
        STD_TORCH_CHECK(dynamic == from.weight.has_value() && dynamic == from.scale.has_value(),
                        "weight and scale must be given where there is a norm, and nowhere else");
        STD_TORCH_CHECK(!from.bias || (dynamic && from.form < 2), "bias must be None for this norm and form");
        if (!dynamic) return;
        const bool all = connection.norm == HyperNorm::rms_all;
        connection.weight = parameter(*from.weight, "weight",
                                      {all ? n * columns : columns, all ? n * size.width : size.width}, weight_);
        if (from.bias) connection.bias = parameter(*from.bias, "bias", {columns}, bias_);
        connection.scale = parameter(*from.scale, "scale", {columns}, scale_);
    }

    bool dynamic() const { return connection.norm != HyperNorm::none; }

    ScalarType accumulation() const { return accumulation_type(size.dtype); }

    // A parameter, contiguous and of the accumulation type, kept in `owner`.
    const void* parameter(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, Tensor& owner) {
        check_shape(tensor, name, shape);
        check_dtype(tensor, name, accumulation());
        check_same_device(tensor, name, streams_, "streams");
        owner = as_contiguous(tensor);
        return kernel_input(owner, name);
    }

    // Coefficients, logits or their gradients: [outer, inner, n, columns] or, if shared, [n, n+2].
    const void* coefficients_data(const Tensor& tensor, const char* name, bool shared, Tensor& owner) {
        const int64_t n = size.streams;
        if (shared) return parameter(tensor, name, {n, n + 2}, owner);
        return parameter(tensor, name, {size.outer, size.inner, n, n + 2}, owner);
    }

    // A new tensor for streams, [outer, inner, n, d], laid out in memory as those of the call.
    Tensor new_streams(const char* name, HyperStreams<void*>* view) const {
        const int64_t n = size.streams, d = size.width;
        Tensor tensor = stream_major_ ? allocate(streams_, {size.outer, n, size.inner, d}, name)
                                      : allocate(streams_, {size.outer, size.inner, n, d}, name);
        view->data = tensor.mutable_data_ptr();
        if (stream_major_) tensor = torch::stable::transpose(tensor, 1, 2);
        for (int i = 0; i < 3; ++i) view->stride[i] = tensor.stride(i);
        return tensor;
    }

    Tensor new_rows(ScalarType dtype, const char* name) const {
        return allocate(streams_, {size.outer, size.inner, size.width}, dtype, name);
    }

    Tensor new_tensor(std::initializer_list<int64_t> shape, const char* name) const {
        return allocate(streams_, shape, accumulation(), name);
    }

    // Per token [n, columns], or empty where norm is none.
    Tensor new_coefficients(int64_t columns, const char* name) const {
        if (!dynamic()) return new_tensor({0}, name);
        return new_tensor({size.outer, size.inner, size.streams, columns}, name);
    }

    ScalarType dtype() const { return streams_.scalar_type(); }
    ScalarType branch_dtype() const { return branch_.scalar_type(); }

  private:
    Tensor streams_, branch_, post_coefficients_, base_, weight_, bias_, scale_;
    bool stream_major_ = false;
    static constexpr char empty_ = 0;
};

#ifndef XLAYER_EMULATED
void run(const CpuScope& scope, const Tensor& like, HyperForward& args) {
    scope.run(like, args, cpu::hyper::forward_workspace, cpu::hyper::forward);
}
void run(const CpuScope& scope, const Tensor& like, HyperBackward& args) {
    scope.run(like, args, cpu::hyper::backward_workspace, cpu::hyper::backward);
}
#endif
#ifdef XLAYER_HAS_CUDA_KERNELS
void run(const CudaScope& scope, const Tensor& like, HyperForward& args) {
    scope.run(like, args, cuda::hyper::forward_workspace, cuda::hyper::forward);
}
void run(const CudaScope& scope, const Tensor& like, HyperBackward& args) {
    scope.run(like, args, cuda::hyper::backward_workspace, cuda::hyper::backward);
}
#endif

template <class Scope>
struct Operators {
    using Pre = std::tuple<Tensor, Tensor, Tensor, Tensor>;
    using PostPre = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
    using PreGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
    using PostGrads = std::tuple<Tensor, Tensor, Tensor>;
    using PostPreGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

    static HyperForward forward_arguments(const HyperArguments& given, bool pre) {
        HyperForward args{};
        args.size = given.size, args.in = given.in, args.post = given.post;
        args.pre = pre, args.connection = given.connection;
        args.pool = torch_pool();
        return args;
    }

    static Pre allocate_pre(const HyperArguments& given, HyperForward& args) {
        Tensor x = given.new_rows(given.dtype(), "branch_input");
        Tensor coefficients = given.new_coefficients(given.size.columns(), "coefficients");
        Tensor logits = given.new_coefficients(given.size.columns(), "logits");
        Tensor statistics = given.new_coefficients(kHyperStatistics, "statistics");
        args.branch_input = x.mutable_data_ptr();
        if (given.dynamic()) {
            args.coefficients = coefficients.mutable_data_ptr();
            args.logits = logits.mutable_data_ptr();
            args.statistics = statistics.mutable_data_ptr();
        }
        return {x, coefficients, logits, statistics};
    }

    static Pre pre(const Tensor& streams, const Tensor& base, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& scale, int64_t norm, int64_t form, int64_t sinkhorn_iters, double eps) {
        const Scope scope(streams);
        HyperArguments given(streams);
        given.add_pre({base, weight, bias, scale, norm, form, sinkhorn_iters, eps});
        HyperForward args = forward_arguments(given, true);
        Pre out = allocate_pre(given, args);
        run(scope, streams, args);
        return out;
    }

    static Tensor post(const Tensor& streams, const Tensor& branch_output, const Tensor& coefficients) {
        const Scope scope(streams);
        HyperArguments given(streams);
        given.add_post(branch_output, coefficients);
        HyperForward args = forward_arguments(given, false);
        Tensor out = given.new_streams("out", &args.out);
        run(scope, streams, args);
        return out;
    }

    static PostPre post_pre(const Tensor& streams, const Tensor& branch_output, const Tensor& coefficients,
                            const Tensor& base, const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& scale, int64_t norm, int64_t form, int64_t sinkhorn_iters,
                            double eps) {
        const Scope scope(streams);
        HyperArguments given(streams);
        given.add_post(branch_output, coefficients);
        given.add_pre({base, weight, bias, scale, norm, form, sinkhorn_iters, eps});
        HyperForward args = forward_arguments(given, true);
        Tensor out = given.new_streams("out", &args.out);
        Pre pre = allocate_pre(given, args);
        run(scope, streams, args);
        return std::tuple_cat(std::make_tuple(out), pre);
    }

    // The saved tensors and the incoming gradients of a backward.
    struct Saved {
        Tensor grad_out, grad_x, grad_coefficients, coefficients, logits, statistics;

        void set_grad_out(const HyperArguments& given, const Tensor& grad, const Tensor& streams, HyperBackward& args) {
            check_shape(grad, "grad_streams",
                        {given.size.outer, given.size.inner, given.size.streams, given.size.width});
            check_dtype(grad, "grad_streams", given.dtype());
            check_same_device(grad, "grad_streams", streams, "streams");
            grad_out = unit_stride_last(grad);
            args.grad_out = streams_view(grad_out, "grad_streams");
        }

        void set_pre(HyperArguments& given, const Tensor& grad, const OptionalTensor& grad_c, const Tensor& streams,
                     const Tensor& c, const Tensor& z, const Tensor& stats, HyperBackward& args) {
            check_shape(grad, "grad_branch_input", {given.size.outer, given.size.inner, given.size.width});
            check_dtype(grad, "grad_branch_input", given.dtype());
            check_same_device(grad, "grad_branch_input", streams, "streams");
            grad_x = unit_stride_last(grad);
            args.grad_branch_input = rows_view(grad_x, "grad_branch_input");
            if (!given.dynamic()) {
                STD_TORCH_CHECK(!grad_c, "grad_coefficients must be None where there is no norm");
                return;
            }
            if (grad_c)
                args.grad_coefficients =
                    given.coefficients_data(*grad_c, "grad_coefficients", false, grad_coefficients);
            args.coefficients = given.coefficients_data(c, "next_coefficients", false, coefficients);
            args.logits = given.coefficients_data(z, "logits", false, logits);
            args.statistics =
                given.parameter(stats, "statistics",
                                {given.size.outer, given.size.inner, given.size.streams, kHyperStatistics}, statistics);
        }
    };

    static HyperBackward backward_arguments(const HyperArguments& given, bool pre) {
        HyperBackward args{};
        args.size = given.size, args.in = given.in, args.post = given.post;
        args.pre = pre, args.connection = given.connection;
        args.pool = torch_pool();
        return args;
    }

    static std::tuple<Tensor, Tensor> allocate_post_grads(const HyperArguments& given, HyperBackward& args) {
        const int64_t n = given.size.streams;
        Tensor branch = given.new_rows(given.branch_dtype(), "grad_branch_output");
        Tensor coefficients =
            given.post.shared ? given.new_tensor({n, n + 2}, "grad_coefficients")
                              : given.new_tensor({given.size.outer, given.size.inner, n, n + 2}, "grad_coefficients");
        args.grad_branch = branch.mutable_data_ptr();
        args.grad_post_coefficients = coefficients.mutable_data_ptr();
        return {branch, coefficients};
    }

    static std::tuple<Tensor, Tensor, Tensor, Tensor> allocate_pre_grads(const HyperArguments& given,
                                                                         const OptionalTensor& weight,
                                                                         HyperBackward& args) {
        const int64_t n = given.size.streams, columns = given.dynamic() ? given.size.columns() : 0;
        Tensor base = given.new_tensor({n, n + 2}, "grad_base");
        Tensor grad_weight = weight ? given.new_tensor({weight->size(0), weight->size(1)}, "grad_weight")
                                    : given.new_tensor({0}, "grad_weight");
        Tensor bias = given.new_tensor({columns}, "grad_bias"), scale = given.new_tensor({columns}, "grad_scale");
        args.grad_base = base.mutable_data_ptr();
        if (given.dynamic()) {
            args.grad_weight = grad_weight.mutable_data_ptr();
            args.grad_bias = bias.mutable_data_ptr();
            args.grad_scale = scale.mutable_data_ptr();
        }
        return {base, grad_weight, bias, scale};
    }

    static PreGrads pre_backward(const Tensor& grad_x, const OptionalTensor& grad_c, const Tensor& streams,
                                 const Tensor& c, const Tensor& z, const Tensor& statistics, const Tensor& base,
                                 const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
                                 int64_t norm, int64_t form, int64_t sinkhorn_iters, double eps) {
        const Scope scope(streams);
        HyperArguments given(streams);
        given.add_pre({base, weight, bias, scale, norm, form, sinkhorn_iters, eps});
        HyperBackward args = backward_arguments(given, true);
        Saved saved;
        saved.set_pre(given, grad_x, grad_c, streams, c, z, statistics, args);
        Tensor grad_streams = given.new_streams("grad_streams", &args.grad_in);
        auto grads = allocate_pre_grads(given, weight, args);
        run(scope, streams, args);
        return std::tuple_cat(std::make_tuple(grad_streams), grads);
    }

    static PostGrads post_backward(const Tensor& grad_out, const Tensor& streams, const Tensor& branch_output,
                                   const Tensor& coefficients) {
        const Scope scope(streams);
        HyperArguments given(streams);
        given.add_post(branch_output, coefficients);
        HyperBackward args = backward_arguments(given, false);
        Saved saved;
        saved.set_grad_out(given, grad_out, streams, args);
        Tensor grad_streams = given.new_streams("grad_streams", &args.grad_in);
        auto grads = allocate_post_grads(given, args);
        run(scope, streams, args);
        return std::tuple_cat(std::make_tuple(grad_streams), grads);
    }

    static PostPreGrads post_pre_backward(const OptionalTensor& grad_out, const Tensor& grad_x,
                                          const OptionalTensor& grad_c, const Tensor& streams,
                                          const Tensor& branch_output, const Tensor& coefficients, const Tensor& c,
                                          const Tensor& z, const Tensor& statistics, const Tensor& base,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& scale, int64_t norm, int64_t form,
                                          int64_t sinkhorn_iters, double eps) {
        const Scope scope(streams);
        HyperArguments given(streams);
        given.add_post(branch_output, coefficients);
        given.add_pre({base, weight, bias, scale, norm, form, sinkhorn_iters, eps});
        HyperBackward args = backward_arguments(given, true);
        Saved saved;
        if (grad_out) saved.set_grad_out(given, *grad_out, streams, args);
        saved.set_pre(given, grad_x, grad_c, streams, c, z, statistics, args);
        Tensor grad_streams = given.new_streams("grad_in", &args.grad_in);
        auto post_grads = allocate_post_grads(given, args);
        auto pre_grads = allocate_pre_grads(given, weight, args);
        run(scope, streams, args);
        return std::tuple_cat(std::make_tuple(grad_streams), post_grads, pre_grads);
    }
};

template <class Scope, class Library>
void register_kernels(Library& m) {
    using Ops = Operators<Scope>;
    m.impl("hyper_pre", TORCH_BOX(&Ops::pre));
    m.impl("hyper_post", TORCH_BOX(&Ops::post));
    m.impl("hyper_post_pre", TORCH_BOX(&Ops::post_pre));
    m.impl("hyper_pre_backward", TORCH_BOX(&Ops::pre_backward));
    m.impl("hyper_post_backward", TORCH_BOX(&Ops::post_backward));
    m.impl("hyper_post_pre_backward", TORCH_BOX(&Ops::post_pre_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(XLAYER_OPS, m) {
    const std::string connection =
        "Tensor base, Tensor? weight, Tensor? bias, Tensor? scale, int norm, int form, int sinkhorn_iters, float eps";
    const std::string post = "Tensor streams, Tensor branch_output, Tensor coefficients";
    const std::string saved = "Tensor next_coefficients, Tensor logits, Tensor statistics";
    const std::string connection_grads = "Tensor grad_base, Tensor grad_weight, Tensor grad_bias, Tensor grad_scale";
    const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
    define("hyper_pre(Tensor streams, " + connection + ") -> (Tensor branch_input, " + saved + ")");
    define("hyper_post(" + post + ") -> Tensor");
    define("hyper_post_pre(" + post + ", " + connection + ") -> (Tensor out, Tensor branch_input, " + saved + ")");
    define("hyper_pre_backward(Tensor grad_branch_input, Tensor? grad_coefficients, Tensor streams, " + saved + ", " +
           connection + ") -> (Tensor grad_streams, " + connection_grads + ")");
    define("hyper_post_backward(Tensor grad_out, " + post +
           ") -> (Tensor grad_streams, Tensor grad_branch_output, Tensor grad_coefficients)");
    define("hyper_post_pre_backward(Tensor? grad_out, Tensor grad_branch_input, Tensor? grad_coefficients, " + post +
           ", " + saved + ", " + connection +
           ") -> (Tensor grad_streams, Tensor grad_branch_output, Tensor grad_post_coefficients, " + connection_grads +
           ")");
}

#ifndef XLAYER_EMULATED
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, CPU, m) { register_kernels<CpuScope>(m); }
#endif

#ifdef XLAYER_HAS_CUDA_KERNELS
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, XLAYER_CUDA_KEY, m) { register_kernels<CudaScope>(m); }
#endif

}  // namespace xlayer
