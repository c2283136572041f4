"""Registers the operators of aggregation over depth: fake tensors and gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xlayer_ext._backend import native_available
from xlayer_ext._ops.registration import (
    accumulation,
    call,
    check_fake,
    check_fake_as,
    check_kept,
    check_one_device,
    register,
    register_derivative,
)


def _like(given: Tensor | None, like: Tensor) -> Tensor:
    """Makes an empty gradient of the given tensor; of length 0 where there is none."""
    return like.new_empty(0) if given is None else like.new_empty(given.shape, dtype=given.dtype)


def _fake_ema_scan(
    x: Tensor, gate_logits: Tensor, initial_state: Any, weight: Any, bias: Any, eps: float, last: bool
) -> Any:
    check_one_device(x, gate_logits, initial_state, weight, bias)
    check_fake(x, x=(x, (None, None, None)), initial_state=(initial_state, x.shape[1:]))
    if bias is not None and weight is None:
        raise ValueError("norm_bias needs norm_weight")
    vectors = {"gate_logits": (gate_logits, x.shape[:1])}
    vectors |= {"norm_weight": (weight, x.shape[2:]), "norm_bias": (bias, x.shape[2:])}
    check_fake_as(accumulation(x), **vectors)
    return x.new_empty(x.shape[1:] if last else x.shape)


def _fake_ema_scan_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    check_one_device(grad, x, *rest)
    check_fake(x, grad=(grad, _fake_ema_scan(x, *rest).shape))
    gate_logits, initial_state, weight, bias = rest[:4]
    return x.new_empty(x.shape), *(_like(given, x) for given in (gate_logits, initial_state, weight, bias))


def _setup_ema_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.last_only = inputs
    ctx.save_for_backward(*tensors)


def _backward_ema_scan(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = call("ema_scan_backward", grad, *tensors, ctx.eps, ctx.last_only)
    return *_of_given(tensors, grads), None, None


def _check_depth_gru(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, initial_state: Any) -> tuple[int, int, int]:
    """Checks the shapes; returns the numbers of layers and tokens, and the width."""
    check_fake(x, x=(x, (None, None, None)), weight_hh=(weight_hh, (None, None)))
    (layers, tokens, inputs), width = x.shape, weight_hh.shape[1]
    matrices = {"weight_hh": (weight_hh, (3 * width, width)), "weight_ih": (weight_ih, (3 * width, inputs))}
    check_fake(x, **matrices, initial_state=(initial_state, (tokens, width)))
    return layers, tokens, width


def _fake_depth_gru(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor, initial_state: Any, keep: bool
) -> tuple[Tensor, Tensor]:
    check_one_device(x, weight_ih, weight_hh, bias_ih, bias_hh, initial_state)
    layers, tokens, width = _check_depth_gru(x, weight_ih, weight_hh, initial_state)
    check_fake(x, bias_ih=(bias_ih, (3 * width,)), bias_hh=(bias_hh, (3 * width,)))
    gates = x.new_empty((layers, tokens, 4, width) if keep else 0)
    return x.new_empty(layers, tokens, width), gates


def _fake_depth_gru_backward(
    grad: Tensor, states: Tensor, gates: Tensor, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, initial_state: Any
) -> tuple[Tensor, ...]:
    check_one_device(grad, states, gates, x, weight_ih, weight_hh, initial_state)
    layers, tokens, width = _check_depth_gru(x, weight_ih, weight_hh, initial_state)
    kept = {"states": (states, (layers, tokens, width)), "gates": (gates, (layers, tokens, 4, width))}
    check_fake(x, grad=(grad, (layers, tokens, width)), **kept)
    biases = (x.new_empty(weight_ih.shape[0]) for _ in range(2))
    return x.new_empty(x.shape), _like(weight_ih, x), _like(weight_hh, x), *biases, _like(initial_state, x)


def _setup_depth_gru(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight_ih, weight_hh, _, _, initial_state, ctx.keep = inputs
    ctx.save_for_backward(*output, x, weight_ih, weight_hh, initial_state)
    ctx.mark_non_differentiable(output[1])


def _backward_depth_gru(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    check_kept(ctx.keep, "depth_gru")
    tensors = ctx.saved_tensors
    grads = call("depth_gru_backward", grad, *tensors)
    return *grads[:5], *_of_given(tensors[-1:], grads[5:]), None


def _fake_depth_attention(
    keys: Tensor, values: Tensor, query: Tensor, out: Tensor, initial_state: Any, num_heads: int, window: int,
    scale: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_one_device(keys, values, query, out, initial_state)
    check_fake(keys, keys=(keys, (None, None, None)), weight_out=(out, (None, None)))
    (layers, tokens, inner), width = keys.shape, out.shape[0]
    if num_heads < 1 or inner % num_heads:
        raise ValueError(f"num_heads must divide the width of the keys, {inner}, got {num_heads}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    matrices = {"weight_query": (query, (inner, width)), "weight_out": (out, (width, inner))}
    check_fake(keys, values=(values, keys.shape), **matrices, initial_state=(initial_state, (tokens, width)))
    return keys.new_empty(layers, tokens, width), keys.new_empty(keys.shape if keep else 0)


def _fake_depth_attention_backward(
    grad: Tensor, states: Tensor, attended: Tensor, keys: Tensor, values: Tensor, query: Tensor, out: Tensor,
    initial_state: Any, num_heads: int, window: int, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_one_device(grad, states, attended, keys, values, query, out, initial_state)
    shape = _fake_depth_attention(keys, values, query, out, initial_state, num_heads, window, scale, False)[0].shape
    check_fake(keys, grad=(grad, shape), states=(states, shape), attended=(attended, keys.shape))
    return tuple(_like(given, keys) for given in (keys, values, query, out, initial_state))


def _setup_depth_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, num_heads, window, scale, ctx.keep = inputs
    ctx.options = num_heads, window, scale
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward_depth_attention(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    check_kept(ctx.keep, "depth_attention")
    tensors = ctx.saved_tensors
    grads = call("depth_attention_backward", grad, *tensors, *ctx.options)
    return *_of_given(tensors[2:], grads), None, None, None, None


def _of_given(given: Any, grads: Any) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else grad for tensor, grad in zip(given, grads, strict=True))


if native_available("ema_scan"):
    register("ema_scan", _fake_ema_scan, _backward_ema_scan, _setup_ema_scan)
    register("depth_gru", _fake_depth_gru, _backward_depth_gru, _setup_depth_gru)
    register("depth_attention", _fake_depth_attention, _backward_depth_attention, _setup_depth_attention)
    register_derivative("ema_scan_backward", _fake_ema_scan_backward)
    register_derivative("depth_gru_backward", _fake_depth_gru_backward)
    register_derivative("depth_attention_backward", _fake_depth_attention_backward)
