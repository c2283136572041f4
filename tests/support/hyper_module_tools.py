"""Kinds of hyper-connections as modules, and parameters far from their start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from oracle import draw
from xlayer_ext.nn import HyperConnection, ManifoldHyperConnection

D = 12
Connection = HyperConnection | ManifoldHyperConnection
KINDS: dict[str, Callable[..., Any]] = {
    "shc": lambda *a, **k: HyperConnection(*a, static_weights=True, **k),
    "dhc": HyperConnection,
    "dhc-linear": lambda *a, **k: HyperConnection(*a, use_tanh=False, **k),
    "dhc-rms": lambda *a, **k: HyperConnection(*a, norm="rms", **k),
    "mhc": ManifoldHyperConnection,
    "mhc-per-stream": lambda *a, **k: ManifoldHyperConnection(*a, coefficients="per_stream", **k),
}


def randomize(module: nn.Module, generator: torch.Generator) -> Any:
    """Draws coefficients far from the identity, different for every stream and token."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            step = 0.4 * draw(generator, *parameter.shape)
            parameter += (step + 0.5 if name.endswith("scale") else step).to(parameter)
    return module
