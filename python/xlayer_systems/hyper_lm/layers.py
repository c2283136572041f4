"""The sublayers: causal self-attention with rotary positions, and the MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlayer_systems.hyper_lm.config import HyperLMConfig


class KeyValues:
    """Keys and values ``[B, num_heads, T, head_size]`` of the tokens that one layer has seen."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends those of new tokens; returns all."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values


class Attention(nn.Module):
    """Computes causal self-attention. Rotary positions: Su et al. 2021, arXiv 2104.09864."""

    def __init__(self, config: HyperLMConfig) -> None:
        super().__init__()
        self.num_heads, self.head_size = config.num_heads, config.head_size
        self.input = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, past: KeyValues | None = None) -> Tensor:
        """Computes the output ``[B, S, d]`` for ``x``; ``past`` holds earlier keys and values, and grows."""
        queries_keys, values = self.input(x).unflatten(-1, (3, self.num_heads, self.head_size)).split([2, 1], dim=2)
        queries, keys = rotate(queries_keys, rotation).transpose(1, 3).unbind(2)  # [B, num_heads, S, head_size]
        values = values.squeeze(2).transpose(1, 2)
        mask = None
        if past is not None:
            mask = _cached_mask(x.shape[1], len(past), x.device)
            keys, values = past.extend(keys, values)
        is_causal = mask is None and x.shape[1] == keys.shape[2]
        context = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal)
        return self.output(context.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Applies Linear, GELU, Linear."""

    def __init__(self, config: HyperLMConfig) -> None:
        super().__init__()
        self.input = nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.output = nn.Linear(config.inner_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.gelu(self.input(x)))


def rotations(start: int, length: int, head_size: int, base: float, like: Tensor) -> Tensor:
    """Returns cosines and sines ``[2, S, 1, 1, head_size/2]`` of the positions from ``start`` on, for `rotate`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    half = head_size // 2
    frequencies = base ** -(torch.arange(half, device=like.device, dtype=dtype) / half)
    positions = torch.arange(start, start + length, device=like.device, dtype=dtype)
    angles = (positions[:, None] * frequencies)[:, None, None]
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates features i and i + head_size/2 of ``x [B, S, 2, num_heads, head_size]`` by their position's angle."""
    cosine, sine = rotation.to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def _cached_mask(new: int, past: int, device: torch.device) -> Tensor | None:
    """Returns which of ``past + new`` keys each of ``new`` queries may read; None where a flag of SDPA suffices."""
    if new == 1 or past == 0:
        return None
    return torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)
