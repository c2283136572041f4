// xlayer::masked_mean and its backward: schemas, checks, allocation. Shapes and formulas: xlayer/routing.h.
#include "xlayer/routing.h"

#include "common.h"

namespace xlayer {
namespace {

TokenMask token_mask(const OptionalTensor& mask, const Tensor& like, const char* like_name, int64_t tokens) {
    if (!mask) return {nullptr, 0, 0};
    check_dtype(*mask, "mask", ScalarType::Bool);
    check_shape(*mask, "mask", {like.size(0), tokens});
    check_same_device(*mask, "mask", like, like_name);
    return {static_cast<const uint8_t*>(kernel_input(*mask, "mask")), mask->stride(0), mask->stride(1)};
}

class MaskedMeanArguments {
  public:
    MaskedMeanForward args{};

    MaskedMeanArguments(const Tensor& x, const OptionalTensor& mask) {
        check_shape(x, "x", {-1, -1, -1});
        args.dtype = kernel_dtype(x, "x");
        args.batch = x.size(0), args.tokens = x.size(1), args.width = x.size(2);
        args.mask = token_mask(mask, x, "x", args.tokens);
        x_ = unit_stride_last(x);
        args.x = kernel_input(x_, "x");
        args.x_batch_stride = x_.stride(0), args.x_token_stride = x_.stride(1);
        args.pool = torch_pool();
    }

  private:
    Tensor x_;
};

class MaskedMeanBackwardArguments {
  public:
    MaskedMeanBackward args{};

    MaskedMeanBackwardArguments(const Tensor& grad, const OptionalTensor& mask, int64_t tokens) {
        check_shape(grad, "grad", {-1, -1});
        STD_TORCH_CHECK(tokens >= 0, "tokens must not be negative, got ", tokens);
        args.dtype = kernel_dtype(grad, "grad");
        args.batch = grad.size(0), args.tokens = tokens, args.width = grad.size(1);
        args.mask = token_mask(mask, grad, "grad", tokens);
        grad_ = unit_stride_last(grad);
        args.grad = kernel_input(grad_, "grad");
        args.grad_batch_stride = grad_.stride(0);
        args.pool = torch_pool();
    }

  private:
    Tensor grad_;
};

#ifndef XLAYER_EMULATED
void run(const CpuScope& scope, const MaskedMeanForward& args) { scope.run(args, cpu::hdim::masked_mean_forward); }
void run(const CpuScope& scope, const MaskedMeanBackward& args) { scope.run(args, cpu::hdim::masked_mean_backward); }
#endif
#ifdef XLAYER_HAS_CUDA_KERNELS
void run(const CudaScope& scope, const MaskedMeanForward& args) { scope.run(args, cuda::hdim::masked_mean_forward); }
void run(const CudaScope& scope, const MaskedMeanBackward& args) { scope.run(args, cuda::hdim::masked_mean_backward); }
#endif

template <class Scope>
Tensor masked_mean(const Tensor& x, const OptionalTensor& mask) {
    const Scope scope(x);
    MaskedMeanArguments given(x, mask);
    Tensor out = allocate(x, {given.args.batch, given.args.width}, "out");
    given.args.out = out.mutable_data_ptr();
    if (out.numel() > 0) run(scope, given.args);
    return out;
}

template <class Scope>
Tensor masked_mean_backward(const Tensor& grad, const OptionalTensor& mask, int64_t tokens) {
    const Scope scope(grad);
    MaskedMeanBackwardArguments given(grad, mask, tokens);
    Tensor grad_x = allocate(grad, {given.args.batch, given.args.tokens, given.args.width}, "grad_x");
    given.args.grad_x = grad_x.mutable_data_ptr();
    if (grad_x.numel() > 0) run(scope, given.args);
    return grad_x;
}

template <class Scope, class Library>
void register_kernels(Library& m) {
    m.impl("masked_mean", TORCH_BOX(&masked_mean<Scope>));
    m.impl("masked_mean_backward", TORCH_BOX(&masked_mean_backward<Scope>));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(XLAYER_OPS, m) {
    m.def("masked_mean(Tensor x, Tensor? mask) -> Tensor");
    m.def("masked_mean_backward(Tensor grad, Tensor? mask, SymInt tokens) -> Tensor");
}

#ifndef XLAYER_EMULATED
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, CPU, m) { register_kernels<CpuScope>(m); }
#endif

#ifdef XLAYER_HAS_CUDA_KERNELS
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, XLAYER_CUDA_KEY, m) { register_kernels<CudaScope>(m); }
#endif

}  // namespace xlayer
