"""Registers the operators of token-pair messaging: fake tensors and gradients."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from xlayer_ext._backend import native_available
from xlayer_ext._ops.registration import (
    accumulation,
    call,
    check_fake,
    check_fake_as,
    check_one_device,
    register,
    register_derivative,
)


def _fake(
    query: Tensor, key: Tensor, value: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor,
    key_mask: Tensor | None, attn_mask: Tensor | None, temperature: float, gelu: bool, tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_one_device(query, key, value, weight1, bias1, weight2, key_mask, attn_mask)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    check_fake(query, query=(query, (None, None, None)), bias1=(bias1, (None,)))
    (batch, queries, width), (hidden,) = query.shape, bias1.shape
    check_fake(query, key=(key, (batch, None, width)))
    keys = key.shape[1]
    check_fake(query, value=(value, (batch, keys, None)), weight1=(weight1, (hidden, 4 * width)))
    check_fake(query, weight2=(weight2, (hidden,)))
    check_fake_as(torch.bool, key_mask=(key_mask, (batch, keys)), attn_mask=(attn_mask, (batch, queries, keys)))
    statistics = accumulation(query)
    return (
        query.new_empty((batch, queries, value.shape[2])),
        query.new_empty((batch, queries, 3), dtype=statistics),
        query.new_empty((batch, queries), dtype=statistics),
    )


def _fake_backward(
    grad_context: Tensor, grad_row_entropy: Tensor | None, *arguments: Tensor | float | bool | None
) -> tuple[Tensor, ...]:
    check_one_device(grad_context, grad_row_entropy, *arguments)
    inputs, outputs, options = arguments[:8], arguments[8:10], arguments[10:]
    fake = _fake(*inputs, *options)  # type: ignore[arg-type]
    for name, output, wanted in zip(("context", "statistics"), outputs, fake, strict=False):
        check_fake_as(wanted.dtype, **{name: (cast(Tensor, output), wanted.shape)})
    check_fake_as(fake[0].dtype, grad_context=(grad_context, fake[0].shape))
    check_fake_as(fake[2].dtype, grad_row_entropy=(grad_row_entropy, fake[2].shape))
    # query, key, value, weight1, bias1, weight2; shaped by hand because empty_like would keep strides
    return tuple(t.new_empty(t.shape) for t in inputs[:6] if isinstance(t, Tensor))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.gelu, ctx.tf32 = inputs
    ctx.save_for_backward(*tensors, *output[:2])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_context: Tensor | None, grad_statistics: Tensor | None, grad_row_entropy: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_context is None:
        grad_context = torch.zeros((), dtype=saved[0].dtype, device=saved[0].device).expand(saved[8].shape)
    options = (ctx.temperature, ctx.gelu, ctx.tf32)
    grads = call("hdim_attention_backward", grad_context, grad_row_entropy, *saved, *options)
    return (*grads, None, None, *(None for _ in options))


if native_available("hdim_attention"):
    register("hdim_attention", _fake, _backward, _setup_context)
    register_derivative("hdim_attention_backward", _fake_backward)
