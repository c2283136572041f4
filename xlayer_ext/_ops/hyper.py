"""Registers the operators of hyper-connections: fake tensors and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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

NORMS = ("none", "layer", "rms", "rms_all")  # by their numbers in the operators
FORMS = ("identity", "tanh", "sinkhorn_rows", "sinkhorn_columns")
MAX_STREAMS = 16  # in the native kernels
STATISTICS = 3  # numbers that a row's norm keeps for the backward: kHyperStatistics of xlayer/hyper.h


# ---- fake tensors ----------------------------------------------------------------------------------------------------


def _new_streams(streams: Tensor) -> Tensor:
    """Makes an empty tensor like ``streams [outer, inner, n, d]``, with the same order of n and inner in memory."""
    outer, inner, n, d = streams.shape
    if inner > 1 and n > 1 and streams.stride(2) > streams.stride(1):
        return streams.new_empty((outer, n, inner, d)).transpose(1, 2)
    return streams.new_empty((outer, inner, n, d))


def _check_streams(streams: Tensor, **others: Tensor | None) -> None:
    check_one_device(streams, *others.values())
    check_fake(streams, streams=(streams, (None, None, None, None)))
    n, d = streams.shape[2:]
    if not 1 <= n <= MAX_STREAMS or d < 1:
        raise ValueError(
            f"streams must number 1 to {MAX_STREAMS} and have a width of at least 1, got {list(streams.shape)}"
        )


def _check_post(streams: Tensor, branch_output: Tensor, coefficients: Tensor) -> None:
    _check_streams(streams, branch_output=branch_output, coefficients=coefficients)
    outer, inner, n, d = streams.shape
    mixed = streams.dtype == torch.float32 and branch_output.dtype in (torch.bfloat16, torch.float16)
    dtype = branch_output.dtype if mixed else streams.dtype
    check_fake_as(dtype, branch_output=(branch_output, (outer, inner, d)))
    lead = () if coefficients.dim() == 2 else (outer, inner)
    check_fake_as(accumulation(streams), coefficients=(coefficients, (*lead, n, n + 2)))


def _check_pre(
    streams: Tensor, base: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, norm: int,
    form: int, sinkhorn_iters: int, eps: float,
) -> None:  # fmt: skip
    _check_streams(streams, base=base, weight=weight, bias=bias, scale=scale)
    if not 0 <= norm < len(NORMS) or not 0 <= form < len(FORMS):
        raise ValueError(f"norm and form must be 0 to 3, got {norm} and {form}")
    if form >= 2 and sinkhorn_iters < 1:
        raise ValueError(f"sinkhorn_iters must be at least 1, got {sinkhorn_iters}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if (weight is None) != (norm == 0) or (scale is None) != (norm == 0):
        raise ValueError("weight and scale must be given where there is a norm, and nowhere else")
    if bias is not None and (norm == 0 or form >= 2):
        raise ValueError("bias must be None for this norm and form")
    n, d = streams.shape[2:]
    shape = (n * (n + 2), n * d) if NORMS[norm] == "rms_all" else (n + 2, d)
    vectors = {"bias": (bias, (n + 2,)), "scale": (scale, (n + 2,))}
    check_fake_as(accumulation(streams), base=(base, (n, n + 2)), weight=(weight, shape), **vectors)


def _check_pre_grads(
    streams: Tensor, grad_x: Tensor, grad_c: Tensor | None, saved: dict[str, Tensor], norm: int
) -> None:
    """Checks the gradients of the outputs of pre, and ``saved``, the tensors that it keeps."""
    check_one_device(streams, grad_x, grad_c, *saved.values())
    outer, inner, n, d = streams.shape
    check_fake(streams, grad_branch_input=(grad_x, (outer, inner, d)))
    if norm == 0:
        if grad_c is not None:
            raise ValueError("grad_coefficients must be None where there is no norm")
        return
    columns = {"grad_coefficients": n + 2, "next_coefficients": n + 2, "logits": n + 2, "statistics": STATISTICS}
    tensors = {"grad_coefficients": grad_c, **saved}
    checked = {name: (tensor, (outer, inner, n, columns[name])) for name, tensor in tensors.items()}
    check_fake_as(accumulation(streams), **checked)


def _fake_pre(streams: Tensor, base: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _check_pre(streams, base, *rest)
    outer, inner, n, d = streams.shape
    x = streams.new_empty((outer, inner, d))
    if rest[3] == 0:
        return x, base.new_empty((0,)), base.new_empty((0,)), base.new_empty((0,))
    c = base.new_empty((outer, inner, n, n + 2))
    return x, c, torch.empty_like(c), base.new_empty((outer, inner, n, STATISTICS))


def _fake_post(streams: Tensor, branch_output: Tensor, coefficients: Tensor) -> Tensor:
    _check_post(streams, branch_output, coefficients)
    return _new_streams(streams)


def _fake_post_pre(
    streams: Tensor, branch_output: Tensor, coefficients: Tensor, *connection: Any
) -> tuple[Tensor, ...]:
    return _fake_post(streams, branch_output, coefficients), *_fake_pre(streams, *connection)


def _fake_connection_grads(base: Tensor, weight: Tensor | None, norm: int) -> tuple[Tensor, ...]:
    columns = base.shape[1] if norm else 0
    grad_weight = base.new_empty((0,)) if weight is None else base.new_empty(weight.shape)
    return base.new_empty(base.shape), grad_weight, base.new_empty((columns,)), base.new_empty((columns,))


def _fake_pre_backward(
    grad_x: Tensor, grad_c: Tensor | None, streams: Tensor, c: Tensor, z: Tensor, statistics: Tensor, base: Tensor,
    weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, norm: int, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_pre(streams, base, weight, bias, scale, norm, *rest)
    saved = {"next_coefficients": c, "logits": z, "statistics": statistics}
    _check_pre_grads(streams, grad_x, grad_c, saved, norm)
    return _new_streams(streams), *_fake_connection_grads(base, weight, norm)


def _fake_post_backward(
    grad_out: Tensor, streams: Tensor, branch_output: Tensor, coefficients: Tensor
) -> tuple[Tensor, ...]:
    _check_post(streams, branch_output, coefficients)
    check_one_device(grad_out, streams)
    check_fake(streams, grad_streams=(grad_out, streams.shape))
    return (
        _new_streams(streams),
        branch_output.new_empty(branch_output.shape),
        coefficients.new_empty(coefficients.shape),
    )


def _fake_post_pre_backward(
    grad_out: Tensor | None, grad_x: Tensor, grad_c: Tensor | None, streams: Tensor, branch_output: Tensor,
    coefficients: Tensor, c: Tensor, z: Tensor, statistics: Tensor, *connection: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    post = _fake_post_backward(streams if grad_out is None else grad_out, streams, branch_output, coefficients)
    return *post, *_fake_pre_backward(grad_x, grad_c, streams, c, z, statistics, *connection)[1:]


# ---- autograd --------------------------------------------------------------------------------------------------------


class _Options(NamedTuple):
    """Arguments of an operator that are not tensors."""

    norm: int
    form: int
    sinkhorn_iters: int
    eps: float


def _setup_pre(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, inputs, tensors=5, output=output[1:])


def _setup_post_pre(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, inputs, tensors=7, output=output[2:])


def _setup(ctx: Any, inputs: tuple[Any, ...], tensors: int, output: Sequence[Tensor]) -> None:
    ctx.options = _Options(*inputs[tensors:])
    ctx.save_for_backward(*inputs[:tensors], *output)
    _, logits, statistics = output
    ctx.mark_non_differentiable(logits, statistics)
    ctx.set_materialize_grads(False)


def _backward_pre(ctx: Any, grad_x: Tensor | None, grad_c: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    streams, base, weight, bias, scale, c, z, statistics = ctx.saved_tensors
    grad_x = _zero_rows(streams) if grad_x is None else grad_x
    grads = call(
        "hyper_pre_backward", grad_x, _dynamic(ctx, grad_c), streams, c, z, statistics,
        base, weight, bias, scale, *ctx.options,
    )  # fmt: skip
    return grads[0], *_connection_grads(grads[1:], weight, bias, scale), *(None for _ in ctx.options)


def _setup_post(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_post(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = call("hyper_post_backward", grad_out, *ctx.saved_tensors)
    return grads


def _backward_post_pre(
    ctx: Any, grad_out: Tensor | None, grad_x: Tensor | None, grad_c: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    streams, branch_output, coefficients, base, weight, bias, scale, c, z, statistics = ctx.saved_tensors
    grad_x = _zero_rows(streams) if grad_x is None else grad_x
    grads = call(
        "hyper_post_pre_backward", grad_out, grad_x, _dynamic(ctx, grad_c), streams, branch_output, coefficients,
        c, z, statistics, base, weight, bias, scale, *ctx.options,
    )  # fmt: skip
    return *grads[:3], *_connection_grads(grads[3:], weight, bias, scale), *(None for _ in ctx.options)


def _dynamic(ctx: Any, grad_c: Tensor | None) -> Tensor | None:
    return grad_c if ctx.options.norm else None  # without a norm the operator's c is empty


def _zero_rows(streams: Tensor) -> Tensor:
    return streams.new_zeros(()).expand(*streams.shape[:2], streams.shape[3])


def _connection_grads(grads: Sequence[Tensor], *optional: Tensor | None) -> tuple[Tensor | None, ...]:
    return grads[0], *(None if x is None else grad for x, grad in zip(optional, grads[1:], strict=True))


if native_available("hyper_pre"):
    register("hyper_pre", _fake_pre, _backward_pre, _setup_pre)
    register("hyper_post", _fake_post, _backward_post, _setup_post)
    register("hyper_post_pre", _fake_post_pre, _backward_post_pre, _setup_post_pre)
    register_derivative("hyper_pre_backward", _fake_pre_backward)
    register_derivative("hyper_post_backward", _fake_post_backward)
    register_derivative("hyper_post_pre_backward", _fake_post_pre_backward)
