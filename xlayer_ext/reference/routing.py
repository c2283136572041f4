"""Pooling for the layer router in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes the mean over the tokens that ``mask [B, S]`` allows, ``[B, S, H] → [B, H]``; 0 where it allows none.

    Accumulates in float32 (float64 for float64). A masked token may hold NaN.
    """
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=x.device).expand(x.shape[:2])
    total = x.masked_fill(~mask.unsqueeze(-1), 0).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)
