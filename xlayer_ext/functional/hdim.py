"""Token-pair messaging: attention scored by a small MLP, a bilinear form or a cosine, and the fusion of its values."""

from __future__ import annotations

import math
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from xlayer_ext import reference
from xlayer_ext._backend import use_native
from xlayer_ext._ops.registration import call
from xlayer_ext.functional._checks import (
    autocast,
    check_choice,
    check_common,
    check_floats,
    check_mask,
    check_positive,
    check_shapes,
    is_empty,
    tf32_allowed,
    with_zero_gradients,
)
from xlayer_ext.functional._masking import mask_inputs, unit
from xlayer_ext.types import Activation, Fusion

ACTIVATIONS = get_args(Activation)
CUDA_MAX_COLUMNS = 64  # of query and key, in the CUDA kernels
FUSIONS: dict[Fusion, int] = {"concat_hadam": 3, "concat_only": 2, "concat_diff_hadam": 4}  # mode → number of blocks

_LAYOUTS = {
    "query": "B Sq D",
    "key": "B Sk D",
    "value": "B Sk H",
    "weight1": "M 4D",
    "bias1": "M",
    "weight2": "M",
    "key_mask": "B Sk",
    "attn_mask": "B Sq Sk",
    "weight": "D D",
}


def hdim_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    temperature: float = 1.0,
    activation: Activation = "relu",
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Computes attention with a pair MLP as its scorer.

    .. math::
        \ell_{ij} = w_2 \cdot \mathrm{act}\big(W_1 [q_i;\, k_j;\, q_i \circ k_j;\, |q_i - k_j|] + b_1\big) + b_2,
        \qquad \mathrm{ctx}_i = \sum_j \mathrm{softmax}_j(\ell_{ij} / \tau)\, v_j

    The native kernel never writes the pair features ``[B, Sq, Sk, 4D]`` or the hidden layer ``[B, Sq, Sk, M]``, forward
    or backward. The same input gives the same bits at any number of threads. Statistics and accumulators are float32
    (float64 for float64). Under autocast every float tensor is cast to its dtype; the entropy stays float32.

    On CUDA the tensor cores do the work. Products of float32 are made of three tf32 ones there and keep 21 bits of each
    factor, or of one where :func:`torch.set_float32_matmul_precision` allows tf32. D above 64 runs the reference, and a
    pair whose query or key holds NaN or infinity gets the logit NaN.

    A row without an allowed pair has context 0 and gradient 0. A masked key changes nothing, even when it holds NaN.
    The derivative of \|a − b\| at a = b is 0. ``bias2`` cannot act through the softmax: its gradient is exactly 0.

    Args:
        query: ``[B, Sq, D]``, float64, float32, bfloat16 or float16; any strides, here and below.
        key: ``[B, Sk, D]``.
        value: ``[B, Sk, H]``.
        weight1: ``[M, 4D]``, columns in the order of the formula.
        bias1: ``[M]``.
        weight2: ``[M]`` or ``[1, M]``.
        bias2: one element.
        key_mask: bool ``[B, Sk]``, True = may be used.
        attn_mask: bool ``[B, Sq, Sk]``, True = may be used; both masks must allow a pair. It may be expanded.
        temperature: τ > 0.
        activation: ``"relu"`` or ``"gelu"`` (exact).
        return_entropy: also return the entropy.

    Returns:
        Context ``[B, Sq, H]``; with ``return_entropy`` also the entropy of the softmax in nats, a scalar: the mean over
        the rows that have an allowed pair, 0 if there are none. Both are differentiable, once.

    Raises:
        TypeError: a tensor is not floating point, dtypes differ, a mask is not boolean.
        ValueError: shapes disagree, τ ≤ 0, an unknown activation.

    Example::

        >>> q, k, v = torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 64)
        >>> w1, b1, w2, b2 = torch.randn(96, 96), torch.zeros(96), torch.randn(96), torch.zeros(1)
        >>> hdim_attention(q, k, v, w1, b1, w2, b2).shape
        torch.Size([2, 5, 64])
    """
    floats = {"query": query, "key": key, "value": value, "weight1": weight1, "bias1": bias1, "weight2": weight2}
    check_floats(**floats, bias2=bias2)
    query, key, value, weight1, bias1, weight2, bias2 = autocast(*floats.values(), bias2)
    if weight2.dim() == 2 and weight2.shape[0] == 1:
        weight2 = weight2.squeeze(0)
    floats = {"query": query, "key": key, "value": value, "weight1": weight1, "bias1": bias1, "weight2": weight2}
    _check_attention(floats, key_mask, attn_mask, temperature)
    check_common(query=query, bias2=bias2)
    check_choice("activation", activation, ACTIVATIONS)
    if bias2.numel() != 1:
        raise ValueError(f"bias2 must have one element, got shape {list(bias2.shape)}")
    # Keeps bias2 in the graph, with gradient 0 and no way for its value to act, not even NaN.
    bias1 = bias1 + bias2.reshape(1).masked_fill(torch.ones_like(bias2, dtype=torch.bool).reshape(1), 0)

    shape = (*query.shape[:2], value.shape[2])
    if is_empty(shape) and not return_entropy:
        return with_zero_gradients(query.new_empty(shape), query, key, value, weight1, bias1, weight2)
    wide = query.device.type == "cuda" and query.shape[-1] > CUDA_MAX_COLUMNS
    unsupported_reason = f"D > {CUDA_MAX_COLUMNS} on {query.device}" if wide else None
    if use_native("hdim_attention", query, unsupported_reason=unsupported_reason):
        context, statistics, row_entropy = call(
            "hdim_attention", query, key, value, weight1, bias1, weight2, key_mask, attn_mask,
            temperature, activation == "gelu", query.dtype == torch.float32 and tf32_allowed(),
        )  # fmt: skip
        if not return_entropy:
            return context
        # In two steps: a sum over everything at once would be split by the number of threads.
        return context, row_entropy.sum(1).sum() / (statistics[..., 1] != 0).sum().clamp(min=1)
    context, entropy = reference.hdim_attention(
        query, key, value, weight1, bias1, weight2,
        key_mask=key_mask, attn_mask=attn_mask, temperature=temperature, activation=activation,
    )  # fmt: skip
    return (context, entropy) if return_entropy else context


def bilinear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Computes attention with a bilinear scorer, :math:`\ell_{ij} = q_i W_b k_j^\top`.

    Runs through :func:`torch.nn.functional.scaled_dot_product_attention`, unless the entropy is wanted, which needs the
    softmax itself. Masks, shapes, dtypes, autocast and errors as in :func:`hdim_attention`.

    Args:
        query, key, value: ``[B, Sq, D]``, ``[B, Sk, D]``, ``[B, Sk, H]``.
        weight: ``[D, D]``.
        key_mask, attn_mask, temperature, return_entropy: as in :func:`hdim_attention`.

    Returns:
        Context ``[B, Sq, H]``, or (context, entropy).
    """
    check_floats(query=query, key=key, value=value, weight=weight)
    query, key, value, weight = autocast(query, key, value, weight)
    floats = {"query": query, "key": key, "value": value, "weight": weight}
    _check_attention(floats, key_mask, attn_mask, temperature)
    if return_entropy:
        return reference.bilinear_attention(
            query, key, value, weight, key_mask=key_mask, attn_mask=attn_mask, temperature=temperature
        )
    return _dot_product_attention(query, key, value, weight, key_mask, attn_mask, 1 / temperature)


def cosine_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Computes attention with a cosine scorer, :math:`\ell_{ij} = 10 \cos(q_i, k_j)`.

    Otherwise as :func:`bilinear_attention`; norms are taken in float32 at least and below 1e-8 count as 1e-8.

    Args:
        query, key, value: ``[B, Sq, D]``, ``[B, Sk, D]``, ``[B, Sk, H]``.
        key_mask, attn_mask, temperature, return_entropy: as in :func:`hdim_attention`.

    Returns:
        Context ``[B, Sq, H]``, or (context, entropy).
    """
    check_floats(query=query, key=key, value=value)
    query, key, value = autocast(query, key, value)
    _check_attention({"query": query, "key": key, "value": value}, key_mask, attn_mask, temperature)
    if return_entropy:
        return reference.cosine_attention(
            query, key, value, key_mask=key_mask, attn_mask=attn_mask, temperature=temperature
        )
    return _dot_product_attention(query, key, value, None, key_mask, attn_mask, 10 / temperature)


def value_fusion(context: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, mode: Fusion) -> Tensor:
    r"""Computes the first layer of the value MLP, a Linear over blocks made of the context and the receiving token.

    ``concat_only`` reads :math:`[c; h]`, ``concat_hadam`` :math:`[c; h; c \circ h]`, ``concat_diff_hadam``
    :math:`[c; h; |c - h|; c \circ h]`. The concatenation is never written: each block meets its own columns of the
    weight, and the products are accumulated.

    Args:
        context: c, ``[..., H]``.
        hidden: h, ``[..., H]``, the shape of ``context``.
        weight: ``[E, n·H]`` with n = 2, 3 or 4 blocks.
        bias: ``[E]`` or ``None``.
        mode: ``"concat_only"``, ``"concat_hadam"`` or ``"concat_diff_hadam"``.

    Returns:
        ``[..., E]``. Under autocast in its dtype.

    Raises:
        TypeError: a tensor is not floating point, dtypes differ.
        ValueError: shapes disagree, an unknown mode.
    """
    tensors = {"context": context, "hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_floats(**tensors)
    check_choice("mode", mode, tuple(FUSIONS))
    tensors = dict(zip(tensors, autocast(*tensors.values()), strict=True))
    check_common(**tensors)
    context, hidden, weight, bias = tensors["context"], tensors["hidden"], tensors["weight"], tensors.get("bias")
    if context.dim() < 1:
        raise ValueError(f"context must have shape [..., H], got {list(context.shape)}")
    width = context.shape[-1]
    if hidden.shape != context.shape:
        raise ValueError(f"hidden must have the shape of context, {list(context.shape)}; got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != FUSIONS[mode] * width:
        needed = f"[E, {FUSIONS[mode] * width}] for {mode} of width {width}"
        raise ValueError(f"weight must have shape {needed}, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {list(weight.shape[:1])}, got {list(bias.shape)}")
    # Built one by one, so that no two product blocks live at once unless autograd keeps them. `split` rather than
    # slices: its backward writes the weight's gradient once, not once a block.
    columns = weight.split(width, dim=1) if width else (weight,) * FUSIONS[mode]
    lead = context.shape[:-1]
    context, hidden = (t.reshape(math.prod(lead), width) for t in (context, hidden))
    out = F.linear(context, columns[0], bias)
    out = torch.addmm(out, hidden, columns[1].t())
    if mode == "concat_diff_hadam":
        out = torch.addmm(out, (context - hidden).abs(), columns[2].t())
    if mode != "concat_only":
        out = torch.addmm(out, context * hidden, columns[-1].t())
    return out.reshape(*lead, len(weight))


def _check_attention(
    floats: dict[str, Tensor], key_mask: Tensor | None, attn_mask: Tensor | None, temperature: float
) -> None:
    check_common(**floats)
    check_mask("key_mask", key_mask, floats["query"])
    check_mask("attn_mask", attn_mask, floats["query"])
    check_shapes(_LAYOUTS, **floats, key_mask=key_mask, attn_mask=attn_mask)
    check_positive(temperature=temperature)


def _dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Computes fused attention with the mask rules of the family; by cosine where there is no bilinear weight."""
    shape = (*query.shape[:2], value.shape[2])
    if is_empty(shape):
        return with_zero_gradients(query.new_empty(shape), query, key, value, weight)
    inputs = mask_inputs(query, key, value, key_mask, attn_mask)
    query, key = (unit(inputs.query), unit(inputs.key)) if weight is None else (inputs.query @ weight, inputs.key)
    mask = inputs.allowed
    if mask is not None:
        blocked = ~mask.any(-1, keepdim=True)
        mask = (mask | blocked).unsqueeze(1)  # kernels differ on rows without a key: open them, zero them below
    context = F.scaled_dot_product_attention(
        query.unsqueeze(1), key.unsqueeze(1), inputs.value.unsqueeze(1), attn_mask=mask, scale=scale
    ).squeeze(1)
    if mask is not None:
        context = context.masked_fill(blocked, 0)
    return context if inputs.nonfinite is None else context.masked_fill(inputs.nonfinite, torch.nan)
