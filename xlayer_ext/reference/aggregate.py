"""States carried across layers in plain PyTorch: a gated average, a recurrent unit and attention to earlier taps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from xlayer_ext.reference._precision import no_autocast


def ema_scan(
    x: Tensor,
    gate_logits: Tensor,
    initial_state: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    last_only: bool = False,
) -> Tensor:
    """Computes states ``[L, ..., d]`` (the last one, ``[..., d]``, for ``last_only``) of the taps ``x [L, ..., d]``, in
    float32 (float64 for float64); returns them in the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    start = x.new_zeros(x.shape[1:], dtype=wide) if initial_state is None else initial_state.to(wide)
    state, states = start, []
    for tap, gate in zip(x, torch.sigmoid(gate_logits.to(wide)), strict=True):
        value = tap.to(wide)
        if norm_weight is not None:
            bias = None if norm_bias is None else norm_bias.to(wide)
            value = layer_norm(value, value.shape[-1:], norm_weight.to(wide), bias, eps)
        state = (1 - gate) * state + gate * value
        states.append(state)
    return state.to(x.dtype) if last_only else _stack(states, start).to(x.dtype)


def depth_gru(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Computes states ``[L, N, d]`` of a gated recurrent unit that reads the taps ``x [L, N, i]`` one after another."""
    start = x.new_zeros(x.shape[1], weight_hh.shape[1]) if initial_state is None else initial_state
    state, states = start, []
    with no_autocast(x):
        for from_input in linear(x, weight_ih, bias_ih):
            from_state = linear(state, weight_hh, bias_hh)
            reset_i, update_i, new_i = from_input.chunk(3, dim=-1)
            reset_h, update_h, new_h = from_state.chunk(3, dim=-1)
            update = torch.sigmoid(update_i + update_h)
            new = torch.tanh(new_i + torch.sigmoid(reset_i + reset_h) * new_h)
            state = (1 - update) * new + update * state
            states.append(state)
    return _stack(states, start)


def depth_attention(
    keys: Tensor,
    values: Tensor,
    weight_query: Tensor,
    weight_out: Tensor,
    initial_state: Tensor | None = None,
    *,
    num_heads: int,
    window: int,
    scale: float,
) -> Tensor:
    """Computes states ``[L, N, d]`` that attend by heads to the last ``window`` ``keys`` and ``values [L, N, e]``."""
    tokens = keys.shape[1]
    start = keys.new_zeros(tokens, weight_out.shape[0]) if initial_state is None else initial_state
    by_head = (*keys.shape[:2], num_heads, keys.shape[2] // num_heads)
    keys, values = keys.reshape(by_head), values.reshape(by_head)
    state, states = start, []
    with no_autocast(keys):
        for layer in range(len(keys)):
            last = slice(max(0, layer - window + 1), layer + 1)
            query = linear(state, weight_query).reshape(by_head[1:])
            score = (query * scale * keys[last]).sum(-1, keepdim=True)
            attended = (score.softmax(0) * values[last]).sum(0)
            state = state + linear(attended.flatten(1), weight_out)
            states.append(state)
    return _stack(states, start)


def _stack(states: list[Tensor], start: Tensor) -> Tensor:
    """Stacks the states, of which there may be none."""
    return torch.stack(states) if states else start.unsqueeze(0)[:0]
