"""Initializes parameters and buffers, for constructors and `reset_parameters`.

Every module of this package has ``reset_parameters()``. It gives all of the module, its own parameters and buffers and
those of the modules that it is made of, the values of a new one, by the draws that the constructor makes: after the
same seed both give the same bits. So ``to_empty(device=...)`` and one call make a module of the meta device usable, and
so does calling it on every submodule, outermost first, as FSDP does. What a caller hands in, such as a ``branch``, is
the caller's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def reset(*modules: nn.Module) -> None:
    """Resets modules in turn, and what containers such as ``nn.Sequential`` hold."""
    for module in modules:
        own = getattr(module, "reset_parameters", None)
        if own is None:
            reset(*module.children())
        else:
            own()


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Writes a whole value into a parameter or buffer; into one that FSDP2 has sharded, each process its shard."""
    whole: Any = value
    cut: Any = target
    if hasattr(cut, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        whole = value.to(target.device, target.dtype)
        whole = distribute_tensor(whole, cut.device_mesh, cut.placements, src_data_rank=None)
    target.copy_(whole)
