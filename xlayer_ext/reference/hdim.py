"""Token-pair messaging in plain PyTorch: the formula, written to be read, and the oracle of the tests.

For target token i and source token j

    logit_ij = w2 · act(W1·[q_i; k_j; q_i∘k_j; |q_i − k_j|] + b1),  P = softmax_j(logit / temperature),  context = P·v.

A second bias would move every logit of a row alike, so the softmax removes it; it is no argument here.
The pair features ``[B, Sq, Sk, 4D]`` are materialized.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlayer_ext.reference._masking import attend, mask_inputs


def pair_features(query: Tensor, key: Tensor) -> Tensor:
    """Computes ``[q_i; k_j; q_i∘k_j; |q_i − k_j|]`` for every pair: ``[B, Sq, D], [B, Sk, D] → [B, Sq, Sk, 4D]``."""
    q, k = torch.broadcast_tensors(query.unsqueeze(2), key.unsqueeze(1))
    return torch.cat([q, k, q * k, (q - k).abs()], dim=-1)


def hdim_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    temperature: float = 1.0,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """Computes attention with the pair MLP as its scorer; returns (context ``[B, Sq, H]``, mean row entropy)."""
    inputs = mask_inputs(query, key, value, key_mask, attn_mask)
    hidden = F.linear(pair_features(inputs.query, inputs.key), weight1, bias1)
    hidden = F.relu(hidden) if activation == "relu" else F.gelu(hidden)
    return attend(hidden @ weight2.reshape(-1) / temperature, inputs)


def bilinear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Computes attention with logits ``q·Wb·kᵀ / temperature``; returns (context, mean row entropy)."""
    inputs = mask_inputs(query, key, value, key_mask, attn_mask)
    return attend(inputs.query @ weight @ inputs.key.transpose(-1, -2) / temperature, inputs)


def cosine_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Computes attention with logits ``10·cos(q, k) / temperature``; returns (context, mean row entropy)."""
    inputs = mask_inputs(query, key, value, key_mask, attn_mask)
    cosine = unit(inputs.query) @ unit(inputs.key).transpose(-1, -2)
    return attend(10 * cosine / temperature, inputs)


def unit(x: Tensor) -> Tensor:
    """Computes ``x / max(‖x‖, 1e-8)`` along the last dimension, in float32 at least, as 1e-8 is 0 in float16."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-8).to(x.dtype)


def fusion_blocks(context: Tensor, hidden: Tensor, mode: str) -> list[Tensor]:
    """Returns the input blocks of the value MLP, in the order of its weight's columns."""
    if mode == "concat_only":
        return [context, hidden]
    if mode == "concat_hadam":
        return [context, hidden, context * hidden]
    return [context, hidden, (context - hidden).abs(), context * hidden]


def value_fusion(context: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor:
    """Computes ``Linear([context; hidden; …])`` with the concatenation written out."""
    return F.linear(torch.cat(fusion_blocks(context, hidden, mode), dim=-1), weight, bias)
