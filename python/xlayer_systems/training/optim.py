"""Schedules of learning rates, and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def linear_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> torch.optim.lr_scheduler.LambdaLR:
    """Makes a schedule that rises linearly over the share ``warmup`` of all ``steps`` and then falls linearly to 0."""
    rising = round(steps * warmup)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return max(0.0, (steps - step) / max(1, steps - rising))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Tells whether a parameter has more than one dimension: weights have, biases and scales of norms have not."""
    return parameter.ndim > 1


def decay_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    weight_decay: float,
    decays: Callable[[str, nn.Parameter], bool] = is_matrix,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Divides parameters into groups for AdamW: those with weight decay and those without; an empty one is left out.

    Args:
        parameters: with their names.
        decays: tells whether a parameter has weight decay.
        name: of the groups, ``name`` and ``name_no_decay``; None leaves them without one.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for key, parameter in parameters:
        groups[decays(key, parameter)].append(parameter)
    made = []
    for decayed, found in groups.items():
        if found:
            label = {} if name is None else {"name": name if decayed else f"{name}_no_decay"}
            made.append({**label, "params": found, "lr": learning_rate, "weight_decay": weight_decay * decayed})
    return made
