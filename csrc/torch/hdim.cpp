// xlayer::hdim_attention and its backward: schemas, checks, allocation. Shapes and formulas: xlayer/hdim.h.
#include "xlayer/hdim.h"

#include <tuple>

#include "common.h"

namespace xlayer {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The tensors that a HdimInputs points into, alive as long as it is.
struct Inputs {
    HdimInputs args{};
    Tensor weight1, bias1, weight2;

    Inputs(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weight1_, const Tensor& bias1_,
           const Tensor& weight2_, const OptionalTensor& key_mask, const OptionalTensor& pair_mask, double temperature,
           bool gelu)
        : weight1(torch::stable::contiguous(weight1_)),
          bias1(torch::stable::contiguous(bias1_)),
          weight2(torch::stable::contiguous(weight2_)) {
        args.dtype = kernel_dtype(query, "query");
        args.gelu = gelu;
        args.temperature = temperature;
        STD_TORCH_CHECK(temperature > 0, "temperature must be positive, got ", temperature);
        check_shape(query, "query", {-1, -1, -1});
        args.batch = query.size(0), args.queries = query.size(1), args.proj_dim = query.size(2);
        check_shape(key, "key", {args.batch, -1, args.proj_dim});
        args.keys = key.size(1);
        check_shape(value, "value", {args.batch, args.keys, -1});
        args.value_dim = value.size(2);
        check_shape(bias1, "bias1", {-1});
        args.mlp_dim = bias1.size(0);
        check_shape(weight1, "weight1", {args.mlp_dim, 4 * args.proj_dim});
        check_shape(weight2, "weight2", {args.mlp_dim});
        STD_TORCH_CHECK(args.keys <= INT32_MAX, "key must have at most 2^31 - 1 tokens, got ", args.keys);
        const std::pair<const Tensor*, const char*> floats[] = {
            {&key, "key"}, {&value, "value"}, {&weight1, "weight1"}, {&bias1, "bias1"}, {&weight2, "weight2"}};
        for (const auto& [tensor, name] : floats) {
            check_dtype(*tensor, name, query.scalar_type());
            check_same_device(*tensor, name, query, "query");
        }
        args.query = query.const_data_ptr();
        args.key = key.const_data_ptr();
        args.value = value.const_data_ptr();
        args.weight1 = weight1.const_data_ptr();
        args.bias1 = bias1.const_data_ptr();
        args.weight2 = weight2.const_data_ptr();
        for (int64_t d = 0; d < 3; ++d) {
            args.query_stride[d] = query.stride(d);
            args.key_stride[d] = key.stride(d);
            args.value_stride[d] = value.stride(d);
        }
        if (key_mask) {
            check_mask(*key_mask, "key_mask", query, {args.batch, args.keys});
            args.key_mask = static_cast<const bool*>(key_mask->const_data_ptr());
            for (int64_t d = 0; d < 2; ++d) args.key_mask_stride[d] = key_mask->stride(d);
        }
        if (pair_mask) {
            check_mask(*pair_mask, "pair_mask", query, {args.batch, args.queries, args.keys});
            args.pair_mask = static_cast<const bool*>(pair_mask->const_data_ptr());
            for (int64_t d = 0; d < 3; ++d) args.pair_mask_stride[d] = pair_mask->stride(d);
        }
    }

    static void check_mask(const Tensor& mask, const char* name, const Tensor& query,
                           std::initializer_list<int64_t> shape) {
        check_dtype(mask, name, ScalarType::Bool);
        check_shape(mask, name, shape);
        check_same_device(mask, name, query, "query");
    }

    ScalarType accumulation() const { return args.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float; }
};

// Scratch for one call; `bytes` past the first 64-byte boundary.
Tensor allocate_workspace(int64_t bytes, const Tensor& like, void** aligned) {
    Tensor buffer = torch::stable::new_empty(like, {bytes + 64}, ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(buffer.mutable_data_ptr());
    *aligned = reinterpret_cast<void*>((address + 63) / 64 * 64);
    return buffer;
}

std::tuple<Tensor, Tensor, Tensor> hdim_attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                                      const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                                                      const OptionalTensor& key_mask, const OptionalTensor& pair_mask,
                                                      double temperature, bool gelu) {
    const Inputs in(query, key, value, weight1, bias1, weight2, key_mask, pair_mask, temperature, gelu);
    const int64_t B = in.args.batch, Sq = in.args.queries;
    Tensor context = torch::stable::new_empty(query, {B, Sq, in.args.value_dim});
    Tensor logsumexp = torch::stable::new_empty(query, {B, Sq}, in.accumulation());
    Tensor row_entropy = torch::stable::new_empty(query, {B, Sq}, in.accumulation());
    HdimForward args{
        in.args,     context.mutable_data_ptr(), logsumexp.mutable_data_ptr(), row_entropy.mutable_data_ptr(), nullptr,
        torch_pool()};
    const Tensor workspace = allocate_workspace(cpu::hdim_forward_workspace(args), query, &args.workspace);
    cpu::hdim_forward(args);
    return {context, logsumexp, row_entropy};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hdim_attention_backward_cpu(
    const Tensor& grad_context, const OptionalTensor& grad_row_entropy, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
    const OptionalTensor& key_mask, const OptionalTensor& pair_mask, const Tensor& context, const Tensor& logsumexp,
    const Tensor& row_entropy, double temperature, bool gelu) {
    const Inputs in(query, key, value, weight1, bias1, weight2, key_mask, pair_mask, temperature, gelu);
    const int64_t B = in.args.batch, Sq = in.args.queries, Sk = in.args.keys;
    const int64_t D = in.args.proj_dim, M = in.args.mlp_dim, H = in.args.value_dim;

    // Contiguous, of the right shape and dtype, and where the query is.
    auto checked = [&](const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, ScalarType dtype) {
        check_shape(tensor, name, shape);
        check_dtype(tensor, name, dtype);
        check_same_device(tensor, name, query, "query");
        return torch::stable::contiguous(tensor);
    };
    const ScalarType dtype = query.scalar_type();
    const Tensor grad = checked(grad_context, "grad_context", {B, Sq, H}, dtype);
    const Tensor output = checked(context, "context", {B, Sq, H}, dtype);
    const Tensor lse = checked(logsumexp, "logsumexp", {B, Sq}, in.accumulation());
    const Tensor entropy = checked(row_entropy, "row_entropy", {B, Sq}, in.accumulation());
    OptionalTensor grad_entropy;
    if (grad_row_entropy) grad_entropy = checked(*grad_row_entropy, "grad_row_entropy", {B, Sq}, in.accumulation());

    Tensor grad_query = torch::stable::new_empty(query, {B, Sq, D});
    Tensor grad_key = torch::stable::new_empty(query, {B, Sk, D});
    Tensor grad_value = torch::stable::new_empty(query, {B, Sk, H});
    Tensor grad_weight1 = torch::stable::new_empty(query, {M, 4 * D});
    Tensor grad_bias1 = torch::stable::new_empty(query, {M});
    Tensor grad_weight2 = torch::stable::new_empty(query, {M});
    HdimBackward args{};
    args.in = in.args;
    args.grad_context = grad.const_data_ptr();
    args.grad_row_entropy = grad_entropy ? grad_entropy->const_data_ptr() : nullptr;
    args.context = output.const_data_ptr();
    args.logsumexp = lse.const_data_ptr();
    args.row_entropy = entropy.const_data_ptr();
    args.grad_query = grad_query.mutable_data_ptr();
    args.grad_key = grad_key.mutable_data_ptr();
    args.grad_value = grad_value.mutable_data_ptr();
    args.grad_weight1 = grad_weight1.mutable_data_ptr();
    args.grad_bias1 = grad_bias1.mutable_data_ptr();
    args.grad_weight2 = grad_weight2.mutable_data_ptr();
    args.pool = torch_pool();
    const Tensor workspace = allocate_workspace(cpu::hdim_backward_workspace(args), query, &args.workspace);
    cpu::hdim_backward(args);
    return {grad_query, grad_key, grad_value, grad_weight1, grad_bias1, grad_weight2};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(XLAYER_OPS, m) {
    m.def(
        "hdim_attention(Tensor query, Tensor key, Tensor value, Tensor weight1, Tensor bias1, Tensor weight2, "
        "Tensor? key_mask, Tensor? pair_mask, float temperature, bool gelu) "
        "-> (Tensor context, Tensor logsumexp, Tensor row_entropy)");
    m.def(
        "hdim_attention_backward(Tensor grad_context, Tensor? grad_row_entropy, Tensor query, Tensor key, "
        "Tensor value, Tensor weight1, Tensor bias1, Tensor weight2, Tensor? key_mask, Tensor? pair_mask, "
        "Tensor context, Tensor logsumexp, Tensor row_entropy, float temperature, bool gelu) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight1, Tensor grad_bias1, "
        "Tensor grad_weight2)");
}

#ifndef XLAYER_EMULATED
STABLE_TORCH_LIBRARY_IMPL(XLAYER_OPS, CPU, m) {
    m.impl("hdim_attention", TORCH_BOX(&hdim_attention_cpu));
    m.impl("hdim_attention_backward", TORCH_BOX(&hdim_attention_backward_cpu));
}
#endif

}  // namespace xlayer
