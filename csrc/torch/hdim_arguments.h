// Arguments of the hdim operators, checked and in the form of the contract (xlayer/hdim.h).
#pragma once

#include <tuple>

#include "common.h"
#include "xlayer/hdim.h"

namespace xlayer {

// The arguments that hdim_attention and its backward share.
struct HdimArguments {
    HdimInputs args{};
    Tensor weight1, bias1, weight2;

    HdimArguments(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weight1_,
                  const Tensor& bias1_, const Tensor& weight2_, const OptionalTensor& key_mask,
                  const OptionalTensor& attn_mask, double temperature, bool gelu, bool tf32)
        : weight1(as_contiguous(weight1_)), bias1(as_contiguous(bias1_)), weight2(as_contiguous(weight2_)) {
        args.dtype = kernel_dtype(query, "query");
        args.gelu = gelu;
        args.tf32 = tf32;
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
        const auto at_least_one = [](int64_t size) { return size > 1 ? size : 1; };
        STD_TORCH_CHECK(product_of_sizes(at_least_one(args.batch), at_least_one(args.queries), at_least_one(args.keys),
                                         at_least_one(args.mlp_dim)) < kMaxBytes,
                        "query and key must have less than 2^61 hidden units of pairs");
        STD_TORCH_CHECK(args.keys <= INT32_MAX, "key must have at most 2^31 - 1 tokens, got ", args.keys);
        const std::pair<const Tensor*, const char*> floats[] = {
            {&key, "key"}, {&value, "value"}, {&weight1, "weight1"}, {&bias1, "bias1"}, {&weight2, "weight2"}};
        for (const auto& [tensor, name] : floats) {
            check_dtype(*tensor, name, query.scalar_type());
            check_same_device(*tensor, name, query, "query");
        }
        args.query = kernel_input(query, "query");
        args.key = kernel_input(key, "key");
        args.value = kernel_input(value, "value");
        args.weight1 = kernel_input(weight1, "weight1");
        args.bias1 = kernel_input(bias1, "bias1");
        args.weight2 = kernel_input(weight2, "weight2");
        for (int64_t d = 0; d < 3; ++d) {
            args.query_stride[d] = query.stride(d);
            args.key_stride[d] = key.stride(d);
            args.value_stride[d] = value.stride(d);
        }
        if (key_mask) {
            check_mask(*key_mask, "key_mask", query, {args.batch, args.keys});
            args.key_mask = static_cast<const uint8_t*>(kernel_input(*key_mask, "key_mask"));
            for (int64_t d = 0; d < 2; ++d) args.key_mask_stride[d] = key_mask->stride(d);
        }
        if (attn_mask) {
            check_mask(*attn_mask, "attn_mask", query, {args.batch, args.queries, args.keys});
            args.attn_mask = static_cast<const uint8_t*>(kernel_input(*attn_mask, "attn_mask"));
            for (int64_t d = 0; d < 3; ++d) args.attn_mask_stride[d] = attn_mask->stride(d);
        }
    }

    static void check_mask(const Tensor& mask, const char* name, const Tensor& query,
                           std::initializer_list<int64_t> shape) {
        check_dtype(mask, name, ScalarType::Bool);
        check_shape(mask, name, shape);
        check_same_device(mask, name, query, "query");
    }

    ScalarType accumulation() const { return accumulation_type(args.dtype); }
};

// The other arguments of the backward: contiguous, of the right shape and dtype, and on the query's device.
struct HdimBackwardArguments {
    Tensor grad_context, context, statistics;
    OptionalTensor grad_row_entropy;

    HdimBackwardArguments(const HdimArguments& in, const Tensor& query, const Tensor& grad_context_,
                          const OptionalTensor& grad_row_entropy_, const Tensor& context_, const Tensor& statistics_) {
        const int64_t B = in.args.batch, Sq = in.args.queries, H = in.args.value_dim;
        auto checked = [&](const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape,
                           ScalarType dtype) {
            check_shape(tensor, name, shape);
            check_dtype(tensor, name, dtype);
            check_same_device(tensor, name, query, "query");
            return as_contiguous(tensor);
        };
        grad_context = checked(grad_context_, "grad_context", {B, Sq, H}, query.scalar_type());
        context = checked(context_, "context", {B, Sq, H}, query.scalar_type());
        statistics = checked(statistics_, "statistics", {B, Sq, kHdimStatistics}, in.accumulation());
        if (grad_row_entropy_)
            grad_row_entropy = checked(*grad_row_entropy_, "grad_row_entropy", {B, Sq}, in.accumulation());
    }
    const void* grad_entropy_data() const {
        return grad_row_entropy ? kernel_input(*grad_row_entropy, "grad_row_entropy") : nullptr;
    }
};

// The gradients that the kernels themselves write.
struct HdimGradTensors {
    Tensor query, key, weight1, bias1, weight2;

    HdimGradTensors(const HdimArguments& in, const Tensor& like) {
        const HdimInputs& a = in.args;
        query = allocate(like, {a.batch, a.queries, a.proj_dim}, "grad_query");
        key = allocate(like, {a.batch, a.keys, a.proj_dim}, "grad_key");
        weight1 = allocate(like, {a.mlp_dim, 4 * a.proj_dim}, "grad_weight1");
        bias1 = allocate(like, {a.mlp_dim}, "grad_bias1");
        weight2 = allocate(like, {a.mlp_dim}, "grad_weight2");
    }
};

using HdimOutputs = std::tuple<Tensor, Tensor, Tensor>;  // context, statistics, row_entropy
using HdimGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace xlayer
