// xlayer::masked_mean and its backward: schemas, checks, allocation. Shapes and formulas: xlayer/routing.h.
#include "xlayer/routing.h"

#include "common.h"

namespace xlayer {
namespace {

TokenMask token_mask(const std::optional<Tensor>& mask, const Tensor& like, const char* like_name, int64_t tokens) {
    if (!mask) return {nullptr, 0, 0};
    check_dtype(*mask, "mask", ScalarType::Bool);
    check_shape(*mask, "mask", {like.size(0), tokens});
    check_same_device(*mask, "mask", like, like_name);
    return {static_cast<const uint8_t*>(kernel_input(*mask, "mask")), mask->stride(0), mask->stride(1)};
}

template <class Kernel>
Tensor masked_mean(const Tensor& x, const std::optional<Tensor>& mask, const Kernel& kernel) {
    check_shape(x, "x", {-1, -1, -1});
    MaskedMeanForward args{};
    args.dtype = kernel_dtype(x, "x");
    args.batch = x.size(0), args.tokens = x.size(1), args.width = x.size(2);
    args.mask = token_mask(mask, x, "x", args.tokens);
    const Tensor rows = unit_stride_last(x);
    args.x = kernel_input(rows, "x");
    args.x_batch_stride = rows.stride(0), args.x_token_stride = rows.stride(1);
    Tensor out = allocate(x, {args.batch, args.width}, "out");
    args.out = out.mutable_data_ptr();
    if (out.numel() > 0) kernel(args);
    return out;
}

template <class Kernel>
Tensor masked_mean_backward(const Tensor& grad, const std::optional<Tensor>& mask, int64_t tokens,
                            const Kernel& kernel) {
    check_shape(grad, "grad", {-1, -1});
    STD_TORCH_CHECK(tokens >= 0, "tokens must not be negative, got ", tokens);
    MaskedMeanBackward args{};
    args.dtype = kernel_dtype(grad, "grad");
    args.batch = grad.size(0), args.tokens = tokens, args.width = grad.size(1);
    args.mask = token_mask(mask, grad, "grad", tokens);
    const Tensor rows = unit_stride_last(grad);
    args.grad = kernel_input(rows, "grad");
    args.grad_batch_stride = rows.stride(0);
    Tensor grad_x = allocate(grad, {args.batch, args.tokens, args.width}, "grad_x");
    args.grad_x = grad_x.mutable_data_ptr();
    if (grad_x.numel() > 0) kernel(args);
    return grad_x;
}

#ifndef XLAYER_EMULATED
Tensor masked_mean_cpu(const Tensor& x, const std::optional<Tensor>& mask) {
    return masked_mean(x, mask, [](MaskedMeanForward& args) {
        args.pool = torch_pool();
        cpu::hdim::masked_mean_forward(args);
    });
}

Tensor masked_mean_backward_cpu(const Tensor& grad, const std::optional<Tensor>& mask, int64_t tokens) {
    return masked_mean_backward(grad, mask, tokens, [](MaskedMeanBackward& args) {
        args.pool = torch_pool();
        cpu::hdim::masked_mean_backward(args);
    });
}
#endif

#ifdef XLAYER_HAS_CUDA_KERNELS
Tensor masked_mean_cuda(const Tensor& x, const std::optional<Tensor>& mask) {
    const CudaScope scope(x);
    return masked_mean(x, mask,
                       [&](const MaskedMeanForward& args) { cuda::hdim::masked_mean_forward(args, scope.stream()); });
}

Tensor masked_mean_backward_cuda(const Tensor& grad, const std::optional<Tensor>& mask, int64_t tokens) {
    const CudaScope scope(grad);
    return masked_mean_backward(grad, mask, tokens, [&](const MaskedMeanBackward& args) {
        cuda::hdim::masked_mean_backward(args, scope.stream());
    });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(XLAYER_OPS, m) {
    m.def("masked_mean(Tensor x, Tensor? mask) -> Tensor");
    m.def("masked_mean_backward(Tensor grad, Tensor? mask, SymInt tokens) -> Tensor");
}

#ifndef XLAYER_EMULATED
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, CPU, m) {
    m.impl("masked_mean", TORCH_BOX(&masked_mean_cpu));
    m.impl("masked_mean_backward", TORCH_BOX(&masked_mean_backward_cpu));
}
#endif

#ifdef XLAYER_HAS_CUDA_KERNELS
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, XLAYER_CUDA_KEY, m) {
    m.impl("masked_mean", TORCH_BOX(&masked_mean_cuda));
    m.impl("masked_mean_backward", TORCH_BOX(&masked_mean_backward_cuda));
}
#endif

}  // namespace xlayer
