r"""Hyper-connections: n residual streams, mixed around every sublayer by fused kernels.

A token has n streams :math:`h_1 \dots h_n` of width d, and a sublayer T reads and writes them through coefficients
``c [n, n+2]``, whose row j is :math:`(\alpha_{j0}, \alpha_{j1} \dots \alpha_{jn}, \beta_j)`:

.. math::
    x = \sum_j \alpha_{j0} h_j, \qquad y = T(x), \qquad h'_k = \beta_k y + \sum_j \alpha_{jk} h_j

:func:`hyper_pre` makes x (and c, from the streams), :func:`hyper_post` makes h', and :func:`hyper_post_pre` does the
post of one sublayer and the pre of the next in one pass over memory: the boundary between two sublayers, forward and
backward. In units of d per token the least traffic is n+1 for pre, 2n+1 for post, 2n+2 for the boundary and 3n+3 for
its backward. Only streams, branch outputs and O(n²) numbers per token are kept for the backward, (n+1)·d in all.

Papers: Zhu et al., Hyper-Connections, ICLR 2025, arXiv 2409.19606; the manifold-constrained kind: arXiv 2512.24880.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from xlayer_ext import reference
from xlayer_ext._backend import native_available, use_native
from xlayer_ext.functional._checks import (
    MAX_ITERATIONS,
    check_choice,
    check_floats,
    check_integer,
    check_not_negative,
    check_one_device,
    forbid_second_derivative,
)
from xlayer_ext.reference.hyper import Connection

NORMS = ("none", "layer", "rms", "rms_all")
FORMS = ("identity", "tanh", "sinkhorn_rows", "sinkhorn_columns")
MOST_STREAMS = 16  # in the native kernels
STATISTICS = 3  # numbers that a row's norm keeps for the backward: kHyperStatistics of xlayer/hyper.h
Function = Callable[..., Any]

__all__ = ["Connection", "hyper_post", "hyper_post_pre", "hyper_pre"]


def hyper_pre(streams: Tensor, connection: Connection) -> tuple[Tensor, Tensor]:
    r"""What a sublayer reads of n residual streams, and its coefficients: :math:`x = \sum_j c_{j0} h_j`.

    The streams are read once, and not changed. Statistics, coefficients and accumulators are float32 (float64 for
    float64). The same input gives the same bits at any number of threads. Autocast changes nothing here.

    Args:
        streams: h, ``[..., n, d]``, float64, float32, bfloat16 or float16. Neighbours along d should be neighbours in
            memory; all other strides are free, so that streams packed into the batch, ``[(b n), s, d]``, need no copy:
            ``packed.unflatten(0, (-1, n)).transpose(1, 2)``.
        connection: how the coefficients come about: :class:`Connection`.

    Returns:
        x, ``[..., d]``, in the dtype of the streams; c, ``[..., n, n+2]``, or ``[n, n+2]`` where ``connection`` has no
        weight, in float32 (float64 for float64).

    Raises:
        TypeError: a tensor is not floating point, or ``connection`` no :class:`Connection`.
        ValueError: shapes or devices disagree, n or d is 0, an unknown norm or form, more than 1000 iterations.

    Example::

        >>> h = torch.randn(2, 5, 4, 64)  # batch, tokens, streams, width
        >>> identity = torch.cat([torch.eye(4)[:, :1], torch.eye(4), torch.ones(4, 1)], 1)
        >>> x, c = hyper_pre(h, Connection(identity))
        >>> torch.equal(x, h[:, :, 0])
        True
    """
    connection = _checked_connection(streams, connection)
    if not use_native("hyper_pre", streams, beyond=_beyond(streams)):
        return reference.hyper_pre(streams, connection)
    grid = _grid(streams)
    x, c, _, _ = torch.ops.xlayer.hyper_pre(grid, *_operator_arguments(connection))
    return _row(x, streams), connection.base if connection.weight is None else _numbers(c, streams)


def hyper_post(streams: Tensor, branch_output: Tensor, coefficients: Tensor) -> Tensor:
    r"""What a sublayer leaves in the streams: :math:`h'_k = c_{k,n+1}\, y + \sum_j c_{jk} h_j`.

    Args:
        streams: h, ``[..., n, d]``, as for :func:`hyper_pre`.
        branch_output: y, ``[..., d]``. It may have another dtype than the streams, as autocast makes it: bfloat16 or
            float16 beside float32 streams; anything else is first cast to the streams' dtype.
        coefficients: c, ``[..., n, n+2]`` or ``[n, n+2]``, of :func:`hyper_pre`.

    Returns:
        h', ``[..., n, d]``, in the dtype and the memory layout of ``streams``.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices disagree.
    """
    branch_output, coefficients = _checked_post(streams, branch_output, coefficients)
    if not use_native("hyper_post", streams, beyond=_beyond(streams)):
        return reference.hyper_post(streams, branch_output, coefficients)
    out = torch.ops.xlayer.hyper_post(*_post_arguments(streams, branch_output, coefficients))
    return out.reshape(streams.shape)


def hyper_post_pre(
    streams: Tensor, branch_output: Tensor, coefficients: Tensor, connection: Connection
) -> tuple[Tensor, Tensor, Tensor]:
    """The boundary between two sublayers: :func:`hyper_post` of one, then :func:`hyper_pre` of the next.

    Equal to the two calls, in one pass over memory; 2n+2 units instead of 3n+2, and 3n+3 instead of 8n+3 backward.

    Args:
        streams, branch_output, coefficients: of the sublayer that ends, as for :func:`hyper_post`.
        connection: of the sublayer that begins, as for :func:`hyper_pre`.

    Returns:
        h' ``[..., n, d]``, x ``[..., d]`` and c of the sublayer that begins.
    """
    branch_output, coefficients = _checked_post(streams, branch_output, coefficients)
    connection = _checked_connection(streams, connection)
    if not use_native("hyper_post_pre", streams, beyond=_beyond(streams)):
        return reference.hyper_post_pre(streams, branch_output, coefficients, connection)
    out, x, c, _, _ = torch.ops.xlayer.hyper_post_pre(
        *_post_arguments(streams, branch_output, coefficients), *_operator_arguments(connection)
    )
    c = connection.base if connection.weight is None else _numbers(c, streams)
    return out.reshape(streams.shape), _row(x, streams), c


# ---- arguments -------------------------------------------------------------------------------------------------------


def _checked_connection(streams: Tensor, connection: Connection) -> Connection:
    """The connection with its tensors in the accumulation type; one without a weight in its plainest form."""
    check_floats(streams=streams)
    n, d = _streams_shape(streams)
    if not isinstance(connection, Connection):
        raise TypeError(f"connection must be a Connection, got {type(connection).__name__}")
    base, weight, bias, scale, norm, form, iterations, eps = connection
    check_choice("norm", norm, NORMS[1:])
    check_choice("form", form, FORMS)
    constrained = form.startswith("sinkhorn")
    check_integer("iterations", iterations, 1 if constrained else 0, MAX_ITERATIONS)
    check_not_negative(eps=eps)
    if weight is None and (bias is not None or scale is not None):
        raise ValueError("bias and scale belong to a weight, and there is none")
    if weight is not None and scale is None:
        raise ValueError("scale must be a tensor of shape [n + 2] where there is a weight, got None")
    if constrained and bias is not None:
        raise ValueError(f"bias must be None for form {form}; base is what is added there")
    weight_shape = (n * (n + 2), n * d) if norm == "rms_all" else (n + 2, d)
    shapes = {"base": (n, n + 2), "weight": weight_shape, "bias": (n + 2,), "scale": (n + 2,)}
    for (name, shape), tensor in zip(shapes.items(), (base, weight, bias, scale), strict=True):
        if tensor is not None or name == "base":
            _check_tensor(name, cast(Tensor, tensor), shape, streams)
    wide = _accumulation(streams)
    base = base.to(wide)
    weight, bias, scale = (None if tensor is None else tensor.to(wide) for tensor in (weight, bias, scale))
    connection = Connection(base, weight, bias, scale, norm, form, iterations, eps)
    if weight is None and constrained:
        return Connection(reference.manifold(connection.base, connection), form="identity")
    return connection


def _checked_post(streams: Tensor, branch_output: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    check_floats(streams=streams)
    n, d = _streams_shape(streams)
    lead = tuple(streams.shape[:-2])
    _check_tensor("branch_output", branch_output, (*lead, d), streams)
    if isinstance(coefficients, Tensor) and coefficients.dim() == 2:
        _check_tensor("coefficients", coefficients, (n, n + 2), streams)
    else:
        _check_tensor("coefficients", coefficients, (*lead, n, n + 2), streams)
    mixed = streams.dtype == torch.float32 and branch_output.dtype in (torch.bfloat16, torch.float16)
    if not mixed:
        branch_output = branch_output.to(streams.dtype)
    return branch_output, coefficients.to(_accumulation(streams))


def _streams_shape(streams: Tensor) -> tuple[int, int]:
    if streams.dim() < 2 or streams.shape[-1] == 0 or streams.shape[-2] == 0:
        raise ValueError(f"streams must have shape [..., n, d] with n and d at least 1, got {list(streams.shape)}")
    return streams.shape[-2], streams.shape[-1]


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], streams: Tensor) -> None:
    check_floats(**{name: tensor})
    if tensor.shape != shape:
        n, d = streams.shape[-2:]
        raise ValueError(f"{name} must have shape {list(shape)} for n = {n}, d = {d}; got {list(tensor.shape)}")
    if tensor.device != streams.device:
        raise ValueError(f"{name} must be on the device of streams, {streams.device}; got {tensor.device}")


def _accumulation(streams: Tensor) -> torch.dtype:
    return torch.promote_types(streams.dtype, torch.float32)


def _beyond(streams: Tensor) -> str | None:
    return f"n > {MOST_STREAMS}" if streams.shape[-2] > MOST_STREAMS else None


def _grid(tensor: Tensor, tail: int = 2) -> Tensor:
    """The leading dimensions as two, outer and inner, which is how the operators count tokens."""
    lead = tensor.dim() - tail
    while lead < 2:
        tensor, lead = tensor.unsqueeze(0), lead + 1
    return tensor.flatten(0, lead - 2) if lead > 2 else tensor


def _row(x: Tensor, streams: Tensor) -> Tensor:
    return x.reshape(*streams.shape[:-2], streams.shape[-1])


def _numbers(c: Tensor, streams: Tensor) -> Tensor:
    return c.reshape(*streams.shape[:-2], *c.shape[-2:])


def _operator_arguments(connection: Connection) -> tuple[Any, ...]:
    norm = 0 if connection.weight is None else NORMS.index(connection.norm)
    return (*connection[:4], norm, FORMS.index(connection.form), connection.iterations, connection.eps)


def _post_arguments(streams: Tensor, branch_output: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
    shared = coefficients.dim() == 2 and streams.dim() > 2
    return _grid(streams), _grid(branch_output, 1), coefficients if shared else _grid(coefficients)


# ---- fake tensors ----------------------------------------------------------------------------------------------------


def _new_streams(streams: Tensor) -> Tensor:
    """A new tensor like ``streams [outer, inner, n, d]``, n outside of inner in memory if it is so there."""
    outer, inner, n, d = streams.shape
    if inner > 1 and n > 1 and streams.stride(2) > streams.stride(1):
        return streams.new_empty((outer, n, inner, d)).transpose(1, 2)
    return streams.new_empty((outer, inner, n, d))


def _fake_pre(streams: Tensor, base: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    check_one_device(streams, base, *rest)
    outer, inner, n, d = streams.shape
    x = streams.new_empty((outer, inner, d))
    if rest[3] == 0:
        return x, base.new_empty((0,)), base.new_empty((0,)), base.new_empty((0,))
    c = base.new_empty((outer, inner, n, n + 2))
    return x, c, torch.empty_like(c), base.new_empty((outer, inner, n, STATISTICS))


def _fake_post(streams: Tensor, branch_output: Tensor, coefficients: Tensor) -> Tensor:
    check_one_device(streams, branch_output, coefficients)
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
    check_one_device(grad_x, grad_c, streams, c, z, statistics, base, weight, bias, scale)
    return _new_streams(streams), *_fake_connection_grads(base, weight, norm)


def _fake_post_backward(
    grad_out: Tensor, streams: Tensor, branch_output: Tensor, coefficients: Tensor
) -> tuple[Tensor, ...]:
    check_one_device(grad_out, streams, branch_output, coefficients)
    return (
        _new_streams(streams),
        branch_output.new_empty(branch_output.shape),
        coefficients.new_empty(coefficients.shape),
    )


def _fake_post_pre_backward(
    grad_out: Tensor | None, grad_x: Tensor, grad_c: Tensor | None, streams: Tensor, branch_output: Tensor,
    coefficients: Tensor, c: Tensor, z: Tensor, statistics: Tensor, base: Tensor, weight: Tensor | None,
    bias: Tensor | None, scale: Tensor | None, norm: int, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_one_device(grad_out, grad_x, grad_c, c, z, statistics, base, weight, bias, scale)
    grads = _fake_post_backward(streams, streams, branch_output, coefficients)
    return *grads, *_fake_connection_grads(base, weight, norm)


# ---- autograd --------------------------------------------------------------------------------------------------------


class _Options(NamedTuple):
    """The arguments of an operator that are no tensors."""

    norm: int
    form: int
    iterations: int
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
    grads = torch.ops.xlayer.hyper_pre_backward(
        grad_x, _dynamic(ctx, grad_c), streams, c, z, statistics, base, weight, bias, scale, *ctx.options
    )
    return grads[0], *_connection_grads(grads[1:], weight, bias, scale), *(None for _ in ctx.options)


def _setup_post(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_post(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = torch.ops.xlayer.hyper_post_backward(grad_out, *ctx.saved_tensors)
    return grads


def _backward_post_pre(
    ctx: Any, grad_out: Tensor | None, grad_x: Tensor | None, grad_c: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    streams, branch_output, coefficients, base, weight, bias, scale, c, z, statistics = ctx.saved_tensors
    grad_x = _zero_rows(streams) if grad_x is None else grad_x
    grads = torch.ops.xlayer.hyper_post_pre_backward(
        grad_out, grad_x, _dynamic(ctx, grad_c), streams, branch_output, coefficients, c, z, statistics,
        base, weight, bias, scale, *ctx.options,
    )  # fmt: skip
    return *grads[:3], *_connection_grads(grads[3:], weight, bias, scale), *(None for _ in ctx.options)


def _dynamic(ctx: Any, grad_c: Tensor | None) -> Tensor | None:
    return grad_c if ctx.options.norm else None  # without a norm the operator's c is empty


def _zero_rows(streams: Tensor) -> Tensor:
    return streams.new_zeros(()).expand(*streams.shape[:2], streams.shape[3])


def _connection_grads(grads: Sequence[Tensor], *optional: Tensor | None) -> tuple[Tensor | None, ...]:
    return grads[0], *(None if x is None else grad for x, grad in zip(optional, grads[1:], strict=True))


if native_available("hyper_pre"):
    for _op, _fake, _fake_grad, _setup_context, _backward in (
        ("hyper_pre", _fake_pre, _fake_pre_backward, _setup_pre, _backward_pre),
        ("hyper_post", _fake_post, _fake_post_backward, _setup_post, _backward_post),
        ("hyper_post_pre", _fake_post_pre, _fake_post_pre_backward, _setup_post_pre, _backward_post_pre),
    ):
        torch.library.register_fake(f"xlayer::{_op}", cast(Function, _fake))
        torch.library.register_fake(f"xlayer::{_op}_backward", cast(Function, _fake_grad))
        torch.library.register_autograd(
            f"xlayer::{_op}", cast(Function, _backward), setup_context=cast(Function, _setup_context)
        )
        forbid_second_derivative(f"{_op}_backward")
