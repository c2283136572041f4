"""Mask rules of all attentions of the family.

Masks are boolean, True = may be used. A row without an allowed pair has context 0 and gradient 0. What a row may not
use cannot reach it or its gradients, even when it holds NaN or infinity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MaskedInputs(NamedTuple):
    """Inputs that are safe to multiply with zero weights, and the elements to restore afterwards."""

    query: Tensor
    key: Tensor
    value: Tensor
    allowed: Tensor | None  # bool [B, Sq, Sk]
    nonfinite_rows: Tensor | None  # bool [B, Sq, 1]: rows that may use a non-finite key
    nonfinite: Tensor | None  # bool [B, Sq, H]: context elements that a non-finite key or value reaches


def mask_inputs(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None
) -> MaskedInputs:
    """Zeroes the keys and values that no query may use, and the queries that may use no key.

    A pair mask may allow a key to some rows only. A non-finite key or value is then zeroed for all and the rows that
    may use it are remembered, because 0·NaN would carry it to the others.
    """
    if key_mask is None and attn_mask is None:
        return MaskedInputs(query, key, value, None, None, None)
    allowed = torch.ones((), dtype=torch.bool, device=query.device) if attn_mask is None else attn_mask
    if key_mask is not None:
        key = key.masked_fill(~key_mask.unsqueeze(-1), 0)
        value = value.masked_fill(~key_mask.unsqueeze(-1), 0)
        allowed = allowed & key_mask.unsqueeze(1)
    allowed = allowed.expand(query.shape[0], query.shape[1], key.shape[1])
    query = query.masked_fill(~allowed.any(-1, keepdim=True), 0)
    if attn_mask is None:
        return MaskedInputs(query, key, value, allowed, None, None)
    bad_key = ~key.isfinite().all(-1, keepdim=True)
    bad_value = ~value.isfinite()
    pairs = allowed.to(query.dtype)
    nonfinite_rows = pairs @ bad_key.to(query.dtype) > 0
    nonfinite = (pairs @ bad_value.to(query.dtype) > 0) | nonfinite_rows
    key = key.masked_fill(bad_key, 0)
    value = value.masked_fill(bad_value, 0)
    return MaskedInputs(query, key, value, allowed, nonfinite_rows, nonfinite)


def attend(logits: Tensor, inputs: MaskedInputs) -> tuple[Tensor, Tensor]:
    """Computes the masked softmax over keys of ``logits [B, Sq, Sk]``, then the weighted sum of values.

    Statistics are float32 (float64 for float64). Returns the context ``[B, Sq, H]`` and the mean entropy of the rows
    that have an allowed pair, in nats.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if inputs.allowed is None:
        log_weights = logits.log_softmax(-1)
        weights = log_weights.exp()
        terms = weights * log_weights
        rows = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    else:
        rows = inputs.allowed.any(-1)
        logits = logits.masked_fill(~inputs.allowed, -torch.inf).masked_fill(~rows.unsqueeze(-1), 0)
        log_weights = logits.log_softmax(-1).masked_fill(~inputs.allowed, 0)
        weights = log_weights.exp().masked_fill(~inputs.allowed, 0)
        terms = weights * log_weights
    context = weights.to(inputs.value.dtype) @ inputs.value
    row_entropy = -terms.sum(-1)
    if inputs.nonfinite is not None and inputs.nonfinite_rows is not None:
        context = context.masked_fill(inputs.nonfinite, torch.nan)
        row_entropy = row_entropy.masked_fill(inputs.nonfinite_rows.squeeze(-1), torch.nan)
    return context, row_entropy.sum() / rows.sum().clamp(min=1)
