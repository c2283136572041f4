"""Initializes parameters, for constructors and `reset_parameters` of a bridge's modules."""

from __future__ import annotations

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
def draw_normal(parameter: Tensor, deviation: float) -> None:
    """Fills with numbers of mean 0 and this standard deviation."""
    parameter.normal_().mul_(deviation)


class ZeroLinear(nn.Linear):
    """Linear layer with zero initialization."""

    def reset_parameters(self) -> None:
        """Draws as every linear layer, so that layers after it start alike, and then sets weight and bias to 0."""
        super().reset_parameters()
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
