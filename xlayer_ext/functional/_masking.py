"""Masks of attention through `torch.nn.functional.scaled_dot_product_attention`.

Masks are boolean, True = may be used. Its kernels multiply masked values by zero weights, which lets NaN and infinity
through; so values that nobody may use are zeroed first, and what they reach is put back afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MaskedInputs(NamedTuple):
    """Inputs that are safe to multiply by zero weights, and the elements to restore afterwards."""

    query: Tensor  # [B, Sq, D]
    key: Tensor  # [B, Sk, D]
    value: Tensor  # [B, Sk, H]
    allowed: Tensor | None  # bool [B, Sq, Sk]
    nonfinite: Tensor | None  # bool [B, Sq, H]: context elements that a non-finite key or value reaches


def mask_inputs(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None
) -> MaskedInputs:
    """Zeroes the keys and values that no query may use, and the queries that may use no key.

    A pair mask may allow a key to some queries only. A non-finite key or value is then zeroed for all of them, and the
    context elements that it would reach are returned in ``nonfinite``.
    """
    if key_mask is None and attn_mask is None:
        return MaskedInputs(query, key, value, None, None)
    allowed = torch.ones((), dtype=torch.bool, device=query.device) if attn_mask is None else attn_mask
    if key_mask is not None:
        key = key.masked_fill(~key_mask.unsqueeze(-1), 0)
        value = value.masked_fill(~key_mask.unsqueeze(-1), 0)
        allowed = allowed & key_mask.unsqueeze(1)
    allowed = allowed.expand(query.shape[0], query.shape[1], key.shape[1])
    query = query.masked_fill(~allowed.any(-1, keepdim=True), 0)
    if attn_mask is None:
        return MaskedInputs(query, key, value, allowed, None)
    bad_key = ~key.isfinite().all(-1, keepdim=True)
    bad_value = ~value.isfinite()
    pairs = allowed.to(query.dtype)
    nonfinite = (pairs @ bad_value.to(query.dtype) > 0) | (pairs @ bad_key.to(query.dtype) > 0)
    return MaskedInputs(query, key.masked_fill(bad_key, 0), value.masked_fill(bad_value, 0), allowed, nonfinite)


def unit(x: Tensor) -> Tensor:
    """Computes x / max(‖x‖, 1e-8) along the last dimension, in float32 at least, as 1e-8 is 0 in float16."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-8).to(x.dtype)
