"""Precision of the references."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(like: Tensor) -> AbstractContextManager[None]:
    """Returns a context without autocast on the device of ``like``, which would round products that must be exact."""
    device = like.device.type
    # torch.compile of torch 2.11 cannot trace the question for meta tensors.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
