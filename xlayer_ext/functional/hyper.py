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

from typing import Any, cast

import torch
from torch import Tensor

from xlayer_ext import reference
from xlayer_ext._backend import use_native
from xlayer_ext._ops.hyper import FORMS, MAX_STREAMS, NORMS
from xlayer_ext._ops.registration import accumulation, call
from xlayer_ext.functional._checks import (
    MAX_ITERATIONS,
    check_choice,
    check_floats,
    check_integer,
    check_not_negative,
)
from xlayer_ext.types import Connection

__all__ = ["Connection", "hyper_post", "hyper_post_pre", "hyper_pre"]


def hyper_pre(streams: Tensor, connection: Connection) -> tuple[Tensor, Tensor]:
    r"""Computes the sublayer input and mixing coefficients of n residual streams: :math:`x = \sum_j c_{j0} h_j`.

    The streams are read once, and not changed. Statistics, coefficients and accumulators are float32 (float64 for
    float64). The same input gives the same bits at any number of threads. Autocast changes nothing here.

    Args:
        streams: h, ``[..., n, d]``, as :func:`xlayer_ext.nn.expand_streams` makes them, float64, float32, bfloat16 or
            float16. A sequence of n tokens, ``[b, n, d]``, has such a shape too, and its tokens would be mixed as
            streams without an error: expand it first. Neighbours along d should be neighbours in memory; all other
            strides are free, so that streams packed into the batch, ``[(b n), s, d]``, need no copy:
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
    if not use_native("hyper_pre", streams, unsupported_reason=_unsupported_reason(streams)):
        return reference.hyper_pre(streams, connection)
    grid = _grid(streams)
    x, c, _, _ = call("hyper_pre", grid, *_operator_arguments(connection))
    return _row(x, streams), connection.base if connection.weight is None else _numbers(c, streams)


def hyper_post(streams: Tensor, branch_output: Tensor, coefficients: Tensor) -> Tensor:
    r"""Computes the streams after a sublayer: :math:`h'_k = c_{k,n+1}\, y + \sum_j c_{jk} h_j`.

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
    if not use_native("hyper_post", streams, unsupported_reason=_unsupported_reason(streams)):
        return reference.hyper_post(streams, branch_output, coefficients)
    out: Tensor = call("hyper_post", *_post_arguments(streams, branch_output, coefficients))
    return out.reshape(streams.shape)


def hyper_post_pre(
    streams: Tensor, branch_output: Tensor, coefficients: Tensor, connection: Connection
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes :func:`hyper_post` of one sublayer and :func:`hyper_pre` of the next, fused.

    Equal to the two calls, in one pass over memory; 2n+2 units instead of 3n+2, and 3n+3 instead of 8n+3 backward.

    Args:
        streams, branch_output, coefficients: of the sublayer that ends, as for :func:`hyper_post`.
        connection: of the sublayer that begins, as for :func:`hyper_pre`.

    Returns:
        h' ``[..., n, d]``, x ``[..., d]`` and c of the sublayer that begins.

    Raises:
        TypeError: a tensor is not floating point, or ``connection`` no :class:`Connection`.
        ValueError: as for :func:`hyper_post` and :func:`hyper_pre`.

    Example::

        >>> h = torch.randn(2, 5, 4, 64)  # batch, tokens, streams, width
        >>> residual = Connection(torch.cat([torch.eye(4)[:, :1], torch.eye(4), torch.ones(4, 1)], 1))
        >>> x, c = hyper_pre(h, residual)
        >>> after, x_next, c_next = hyper_post_pre(h, torch.tanh(x), c, residual)
        >>> torch.allclose(after, hyper_post(h, torch.tanh(x), c)) and torch.equal(x_next, after[:, :, 0])
        True
    """
    branch_output, coefficients = _checked_post(streams, branch_output, coefficients)
    connection = _checked_connection(streams, connection)
    if not use_native("hyper_post_pre", streams, unsupported_reason=_unsupported_reason(streams)):
        return reference.hyper_post_pre(streams, branch_output, coefficients, connection)
    out, x, c, _, _ = call(
        "hyper_post_pre", *_post_arguments(streams, branch_output, coefficients), *_operator_arguments(connection)
    )
    c = connection.base if connection.weight is None else _numbers(c, streams)
    return out.reshape(streams.shape), _row(x, streams), c


# ---- arguments -------------------------------------------------------------------------------------------------------


def _checked_connection(streams: Tensor, connection: Connection) -> Connection:
    """Checks the connection and casts its tensors to the accumulation type; without a weight its form is identity."""
    check_floats(streams=streams)
    n, d = _streams_shape(streams)
    if not isinstance(connection, Connection):
        raise TypeError(f"connection must be a Connection, got {type(connection).__name__}")
    base, weight, bias, scale, norm, form, sinkhorn_iters, eps = connection
    if isinstance(base, Tensor) and base.dim() == 2 and base.shape[1] == base.shape[0] + 2 and base.shape[0] != n:
        made_for = base.shape[0]
        raise ValueError(
            f"streams must have shape [..., {made_for}, d] for the base {list(base.shape)} of this connection of "
            f"{made_for} streams, got {list(streams.shape)}; expand_streams(x, {made_for}) makes streams of x [..., d]"
        )
    check_choice("norm", norm, NORMS[1:])
    check_choice("form", form, FORMS)
    constrained = form.startswith("sinkhorn")
    check_integer("sinkhorn_iters", sinkhorn_iters, 1 if constrained else 0, MAX_ITERATIONS)
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
    wide = accumulation(streams)
    base = base.to(wide)
    weight, bias, scale = (None if tensor is None else tensor.to(wide) for tensor in (weight, bias, scale))
    connection = Connection(base, weight, bias, scale, norm, form, sinkhorn_iters, eps)
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
    return branch_output, coefficients.to(accumulation(streams))


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


def _unsupported_reason(streams: Tensor) -> str | None:
    return f"n > {MAX_STREAMS}" if streams.shape[-2] > MAX_STREAMS else None


def _grid(tensor: Tensor, tail: int = 2) -> Tensor:
    """Reshapes the leading dimensions to two, outer and inner, as the operators take them."""
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
    return (*connection[:4], norm, FORMS.index(connection.form), connection.sinkhorn_iters, connection.eps)


def _post_arguments(streams: Tensor, branch_output: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
    shared = coefficients.dim() == 2 and streams.dim() > 2
    return _grid(streams), _grid(branch_output, 1), coefficients if shared else _grid(coefficients)
