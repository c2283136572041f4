"""Checks the arguments of a bridge's modules; every error names the argument, what it got and what it needs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_floats(**tensors: Tensor) -> None:
    """Checks that each is a dense tensor of float64, float32, bfloat16 or float16."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got one of layout {tensor.layout}")


def check_states(x: Tensor, mask: Tensor | None, width: int) -> None:
    """Checks states ``[B, T, width]`` and a bool mask ``[B, T]`` or None."""
    check_floats(x=x)
    if x.dim() != 3 or x.shape[2] != width:
        raise ValueError(f"x must have shape [B, T, {width}], got {list(x.shape)}")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True = may be read) or None, got {got}")
    if mask.device != x.device:
        raise ValueError(f"mask must be on {x.device} like x, got {mask.device}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mask must have shape {list(x.shape[:2])}, got {list(mask.shape)}")


def check_integer(name: str, value: int, least: int = 1, most: int = 2**63 - 1) -> None:
    """Checks that a value is an integer in [least, most]."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be between {least} and {most}, got {value}")


def check_sizes(**sizes: int) -> None:
    """Checks that each is an integer of at least 1."""
    for name, size in sizes.items():
        check_integer(name, size)


def check_number(name: str, value: float, *, minimum: float = -math.inf, above: float = -math.inf) -> None:
    """Checks that a value is a finite number of at least ``minimum`` and more than ``above``."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not math.isfinite(value) or value < minimum or value <= above:
        bounds = [f"at least {minimum}"] if minimum > -math.inf else []
        bounds += [f"more than {above}"] if above > -math.inf else []
        raise ValueError(f"{name} must be {' and '.join(['finite', *bounds])}, got {value}")
