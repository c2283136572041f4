r"""Aggregation over depth: a state that every token carries across the layers, updated by a tap of each layer.

:func:`ema_scan` is a gated average with LayerNorm of the taps fused in: one pass over memory. :func:`depth_gru` is a
gated recurrent unit that treats depth as time. :func:`depth_attention` lets the state attend to its last few taps. All
take taps stacked along the first dimension, ``[L, ..., d]``, and treat every token alone, so that they neither look
ahead nor need a cache over time.

Papers: Yu et al., Deep Layer Aggregation, CVPR 2018, arXiv 1707.06484; Cho et al., Learning Phrase Representations
using RNN Encoder-Decoder, 2014, arXiv 1406.1078 (the unit); Vaswani et al., Attention Is All You Need, 2017,
arXiv 1706.03762.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from xlayer_ext import reference
from xlayer_ext._backend import use_native
from xlayer_ext._ops.registration import call
from xlayer_ext.functional._checks import (
    autocast,
    autocasts,
    check_common,
    check_flag,
    check_floats,
    check_integer,
    check_not_negative,
    check_shapes,
    is_empty,
    needs_grad,
    with_zero_gradients,
)

__all__ = ["depth_attention", "depth_gru", "ema_scan"]


def ema_scan(
    x: Tensor,
    gate_logits: Tensor,
    initial_state: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    last_only: bool = False,
) -> Tensor:
    r"""Computes a gated average over depth: :math:`S_l = (1 - \sigma(a_l))\, S_{l-1} + \sigma(a_l)\, x_l`.

    With ``norm_weight`` the taps are normalized on the way, :math:`x_l` above being their LayerNorm over d. In units of
    d per token the least traffic is 2L for all states, L + 1 for the last, and in the backward 3L and 2L; nothing but
    the arguments is kept for it. Arithmetic and the carried state are float32 (float64 for float64), also under
    autocast.

    Args:
        x: taps, ``[L, ..., d]``, float64, float32, bfloat16 or float16. Unit stride along d spares a copy; layers and
            tokens may lie anyhow, ``[N, L, d]`` transposed needs none.
        gate_logits: a, ``[L]``, any floating point dtype.
        initial_state: :math:`S_{-1}`, ``[..., d]`` in the dtype of x; zeros by default.
        norm_weight: ``[d]``: normalizes the taps.
        norm_bias: ``[d]``, with ``norm_weight`` only.
        eps: of the LayerNorm, added to the variance.
        last_only: return only the last state.

    Returns:
        States ``[L, ..., d]``, or ``[..., d]`` with ``last_only``, in the dtype of x.

    Raises:
        TypeError: a tensor is not floating point, or ``initial_state`` has another dtype than x.
        ValueError: shapes or devices disagree, or a norm_bias without norm_weight.

    Example::

        >>> taps = torch.tensor([[[1.0, 3.0]], [[2.0, 4.0]]])  # two layers, one token
        >>> ema_scan(taps, torch.zeros(2))
        tensor([[[0.5000, 1.5000]],
                [[1.2500, 2.7500]]])
    """
    given = {"initial_state": initial_state, "norm_weight": norm_weight, "norm_bias": norm_bias}
    check_floats(x=x, gate_logits=gate_logits, **{name: t for name, t in given.items() if t is not None})
    if autocasts(x) and x.dtype != torch.float64:
        x = x.float()
        initial_state = None if initial_state is None else initial_state.float()
    if x.dim() < 2:
        raise ValueError(f"x must have shape [L, ..., d], got {list(x.shape)}")
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias needs norm_weight")
    layouts = {"gate_logits": "L", "norm_weight": "d", "norm_bias": "d"}
    sizes = {"L": x.shape[0], "d": x.shape[-1]}
    for name, tensor in {"gate_logits": gate_logits, "norm_weight": norm_weight, "norm_bias": norm_bias}.items():
        if tensor is not None and list(tensor.shape) != [sizes[layouts[name]]]:
            raise ValueError(f"{name} must have shape [{sizes[layouts[name]]}], as x {list(x.shape)} has it; got "
                             f"{list(tensor.shape)}")  # fmt: skip
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {tensor.device}")
    _check_initial_state(initial_state, x, x.shape[1:])
    check_not_negative(eps=eps)
    check_flag("last_only", last_only)
    wide = torch.promote_types(x.dtype, torch.float32)
    gate_logits = gate_logits.to(wide)
    norm_weight = None if norm_weight is None else norm_weight.to(wide)
    norm_bias = None if norm_bias is None else norm_bias.to(wide)
    if is_empty(x.shape):
        shape = x.shape[1:] if last_only else x.shape
        kept = initial_state if last_only and initial_state is not None else x.new_zeros(shape)
        return with_zero_gradients(kept, x, gate_logits, initial_state, norm_weight, norm_bias)
    if not use_native("ema_scan", x):
        return reference.ema_scan(x, gate_logits, initial_state, norm_weight, norm_bias, eps, last_only)
    taps, start = _flat(x, initial_state)
    states = call("ema_scan", taps, gate_logits, start, norm_weight, norm_bias, eps, last_only)
    return cast(Tensor, states.reshape(x.shape[1:] if last_only else x.shape))


def depth_gru(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    r"""Computes a gated recurrent unit over depth, with the parameters and results of :class:`torch.nn.GRUCell`:

    .. math::
        r &= \sigma(W_{ir} x_l + b_{ir} + W_{hr} h_{l-1} + b_{hr}) \\
        z &= \sigma(W_{iz} x_l + b_{iz} + W_{hz} h_{l-1} + b_{hz}) \\
        n &= \tanh(W_{in} x_l + b_{in} + r (W_{hn} h_{l-1} + b_{hn})) \\
        h_l &= (1 - z)\, n + z\, h_{l-1}

    Where a gradient is needed, r, z, n and :math:`W_{hn} h + b_{hn}` are kept beside the states, 4·d numbers per token
    and layer; else nothing is. Autocast casts all arguments, as for a linear layer.

    Args:
        x: taps, ``[L, ..., i]``, float64, float32, bfloat16 or float16.
        weight_ih: ``[3·d, i]``, gates in the order r, z, n.
        weight_hh: ``[3·d, d]``.
        bias_ih, bias_hh: ``[3·d]``; zeros by default.
        initial_state: ``[..., d]``; zeros by default.

    Returns:
        States h, ``[L, ..., d]``.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ.
        ValueError: shapes or devices disagree.

    Example::

        >>> cell = torch.nn.GRUCell(8, 16)
        >>> states = depth_gru(torch.randn(12, 4, 8), cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        >>> states.shape
        torch.Size([12, 4, 16])
    """
    named = {"x": x, "weight_ih": weight_ih, "weight_hh": weight_hh}
    optional = {"bias_ih": bias_ih, "bias_hh": bias_hh, "initial_state": initial_state}
    named = _cast_together({**named, **{name: t for name, t in optional.items() if t is not None}})
    x, weight_ih, weight_hh = named["x"], named["weight_ih"], named["weight_hh"]
    if x.dim() < 2:
        raise ValueError(f"x must have shape [L, ..., i], got {list(x.shape)}")
    layouts = {"weight_hh": "3d d", "weight_ih": "3d i", "x": "i", "bias_ih": "3d", "bias_hh": "3d"}
    biases = {name: named.get(name) for name in ("bias_ih", "bias_hh")}
    check_shapes(layouts, weight_hh=weight_hh, weight_ih=weight_ih, **biases)
    if weight_ih.shape[1] != x.shape[-1]:
        raise ValueError(f"weight_ih must have shape [3d, {x.shape[-1]}] for this x, got {list(weight_ih.shape)}")
    shape = (*x.shape[1:-1], weight_hh.shape[1])
    initial_state = named.get("initial_state")
    _check_initial_state(initial_state, x, torch.Size(shape))
    if is_empty((x.shape[0], *shape)):
        return with_zero_gradients(x.new_empty(x.shape[0], *shape), *named.values())
    taps, start = _flat(x, initial_state)
    bias_ih, bias_hh = (x.new_zeros(len(weight_ih)) if bias is None else bias for bias in biases.values())
    if use_native("depth_gru", x):
        keep = needs_grad(taps, weight_ih, weight_hh, bias_ih, bias_hh, start)
        states, _ = call("depth_gru", taps, weight_ih, weight_hh, bias_ih, bias_hh, start, keep)
    else:
        states = reference.depth_gru(taps, weight_ih, weight_hh, bias_ih, bias_hh, start)
    return states.reshape(x.shape[0], *shape)


def depth_attention(
    x: Tensor,
    weight_query: Tensor,
    weight_key: Tensor,
    weight_value: Tensor,
    weight_out: Tensor,
    initial_state: Tensor | None = None,
    *,
    num_heads: int = 1,
    window: int = 4,
) -> Tensor:
    r"""Computes a state that attends, layer by layer, to its last ``window`` taps, the present one included:

    .. math::
        S_l = S_{l-1} + W_o\, \mathrm{Attention}(W_q S_{l-1};\ W_k x_j,\ W_v x_j,\ l - \mathrm{window} < j \le l)

    with the usual scaled dot products, cut into heads. Keys and values of all layers are one product each. Where a
    gradient is needed, what the state attended to is kept beside the states; probabilities are computed again.
    Autocast casts all arguments, as for a linear layer.

    Args:
        x: taps, ``[L, ..., i]``, float64, float32, bfloat16 or float16.
        weight_query: ``[e, d]``; e is a multiple of ``num_heads``.
        weight_key, weight_value: ``[e, i]``.
        weight_out: ``[d, e]``.
        initial_state: :math:`S_{-1}`, ``[..., d]``; zeros by default, which attend to all taps alike.
        num_heads: number of heads.
        window: number of taps to attend to, at least 1; more than there are layers is as many as there are.

    Returns:
        States S, ``[L, ..., d]``.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ.
        ValueError: shapes or devices disagree, ``num_heads`` does not divide e, or ``window`` is below 1.
    """
    named = {"x": x, "weight_query": weight_query, "weight_key": weight_key, "weight_value": weight_value}
    named |= {"weight_out": weight_out, **({} if initial_state is None else {"initial_state": initial_state})}
    named = _cast_together(named)
    x, initial_state = named.pop("x"), named.pop("initial_state", None)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [L, ..., i], got {list(x.shape)}")
    check_shapes({"weight_query": "e d", "weight_key": "e i", "weight_value": "e i", "weight_out": "d e"}, **named)
    weight_query, weight_key, weight_value, weight_out = named.values()
    if weight_key.shape[1] != x.shape[-1]:
        raise ValueError(f"weight_key must have shape [e, {x.shape[-1]}] for this x, got {list(weight_key.shape)}")
    width = weight_query.shape[0]
    check_integer("num_heads", num_heads)
    if not 1 <= num_heads <= max(width, 1) or width % num_heads:
        raise ValueError(f"num_heads must divide e = {width}, got {num_heads}")
    check_integer("window", window, 1)
    shape = (*x.shape[1:-1], weight_out.shape[0])
    _check_initial_state(initial_state, x, torch.Size(shape))
    if is_empty((x.shape[0], *shape)):
        return with_zero_gradients(x.new_empty(x.shape[0], *shape), x, *named.values(), initial_state)
    window = min(window, x.shape[0])
    taps, start = _flat(x, initial_state)
    keys, values = linear(taps, weight_key), linear(taps, weight_value)
    head_width = width // num_heads
    scale = head_width**-0.5 if head_width else 1.0
    if use_native("depth_attention", x):
        keep = needs_grad(keys, values, weight_query, weight_out, start)
        states, _ = call(
            "depth_attention", keys, values, weight_query, weight_out, start, num_heads, window, scale, keep
        )
    else:
        states = reference.depth_attention(
            keys, values, weight_query, weight_out, start, num_heads=num_heads, window=window, scale=scale
        )
    return states.reshape(x.shape[0], *shape)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _cast_together(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checks the tensors, applies autocast, and checks that they share dtype and device."""
    check_floats(**named)
    named = dict(zip(named, autocast(*named.values()), strict=True))
    check_common(**named)
    return named


def _check_initial_state(initial_state: Tensor | None, x: Tensor, shape: torch.Size) -> None:
    if initial_state is None:
        return
    check_common(x=x, initial_state=initial_state)
    if initial_state.shape != shape:
        raise ValueError(
            f"initial_state must have shape {list(shape)}, a state per token; got {list(initial_state.shape)}"
        )


def _flat(x: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Reshapes the taps to ``[L, N, d]`` and the initial state to ``[N, d]``."""
    tokens = math.prod(x.shape[1:-1])
    start = None if initial_state is None else initial_state.reshape(tokens, initial_state.shape[-1])
    return x.reshape(x.shape[0], tokens, x.shape[-1]), start
