"""Hyper-connections in plain PyTorch: n residual streams, mixed before and after every sublayer.

Row j of a sublayer's coefficients ``c [..., n, n+2]`` is (α_j0, α_j1 … α_jn, β_j) of hyper-connections, and
(pre_j, M_1j … M_nj, post_j) of manifold-constrained ones: the sublayer reads ``x = Σ_j c[j, 0]·h_j`` and leaves
``h'_k = c[k, n+1]·y + Σ_j c[j, k]·h_j``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xlayer_ext.reference._precision import no_autocast
from xlayer_ext.types import Connection


def hyper_coefficients(streams: Tensor, connection: Connection) -> Tensor:
    """Computes a sublayer's coefficients from ``streams [..., n, d]``: ``[..., n, n+2]``, or ``[n, n+2]`` without a
    weight; in float32 (float64 for float64)."""
    with no_autocast(streams):
        return _coefficients(streams, connection)


def _coefficients(streams: Tensor, connection: Connection) -> Tensor:
    accumulate = torch.promote_types(streams.dtype, torch.float32)
    base = connection.base.to(accumulate)
    if connection.weight is None or connection.scale is None:
        return manifold(base, connection) if _constrained(connection) else base
    weight, scale = connection.weight.to(accumulate), connection.scale.to(accumulate)
    n = streams.shape[-2]
    h = streams.to(accumulate)
    if connection.norm == "rms_all":
        flat = h.flatten(-2)
        z = (flat * _inverse_root(flat, connection.eps) @ weight.T).unflatten(-1, (n, n + 2))
    else:
        if connection.norm == "layer":
            h = h - h.mean(-1, keepdim=True)
        z = h * _inverse_root(h, connection.eps) @ weight.T
    if _constrained(connection):
        return manifold(base + scale * z, connection)
    if connection.bias is not None:
        z = z + connection.bias.to(accumulate)
    return base + scale * (z.tanh() if connection.form == "tanh" else z)


def manifold(logits: Tensor, connection: Connection) -> Tensor:
    """Applies σ, 2σ and Sinkhorn to ``logits [..., n, n+2]``, for ``sinkhorn_rows`` and ``sinkhorn_columns``."""
    first, last = (-1, -2) if connection.form == "sinkhorn_rows" else (-2, -1)
    mixing = logits[..., 1:-1]  # [..., j, i] is M_ij
    # In logarithms: where logits lie far apart, all exponentials of a row or column may be 0.
    for _ in range(connection.sinkhorn_iters):
        mixing = mixing.log_softmax(first).log_softmax(last)
    return torch.cat([logits[..., :1].sigmoid(), mixing.exp(), 2 * logits[..., -1:].sigmoid()], -1)


def hyper_pre(streams: Tensor, connection: Connection) -> tuple[Tensor, Tensor]:
    """Computes branch input x ``[..., d]`` and coefficients of a sublayer from ``streams [..., n, d]``."""
    coefficients = hyper_coefficients(streams, connection)
    with no_autocast(streams):
        mixed = torch.einsum("...j,...jd->...d", coefficients[..., 0], streams.to(coefficients.dtype))
    return mixed.to(streams.dtype), coefficients


def hyper_post(streams: Tensor, branch_output: Tensor, coefficients: Tensor) -> Tensor:
    """Computes streams ``[..., n, d]`` after the sublayer with the output ``branch_output [..., d]``."""
    h, y = streams.to(coefficients.dtype), branch_output.to(coefficients.dtype)
    with no_autocast(streams):
        kept = torch.einsum("...jk,...jd->...kd", coefficients[..., 1:-1], h)
    return (kept + coefficients[..., -1:] * y.unsqueeze(-2)).to(streams.dtype)


def hyper_post_pre(
    streams: Tensor, branch_output: Tensor, coefficients: Tensor, connection: Connection
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes :func:`hyper_post` of one sublayer, then :func:`hyper_pre` of the next; returns streams, branch input
    and coefficients."""
    streams = hyper_post(streams, branch_output, coefficients)
    return streams, *hyper_pre(streams, connection)


def _constrained(connection: Connection) -> bool:
    return connection.form.startswith("sinkhorn")


def _inverse_root(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()
