"""What the references share about precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(like: Tensor) -> AbstractContextManager[None]:
    """Products stay in the type they are given in: autocast would round what is to be exact."""
    device = like.device.type
    # As in functional._checks.autocast: torch.compile of torch 2.11 cannot trace the question for meta tensors.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
