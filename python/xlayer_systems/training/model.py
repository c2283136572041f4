"""Defines the interface between the training loop and a model: `TrainingModel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class TrainingModel(nn.Module):
    """Is the base class of the models that the loop trains; ``forward(**batch)`` returns an object with ``loss``.

    Attributes:
        frozen: models that are used but are no submodules: not trained, saved or put into checkpoints.
    """

    frozen: Sequence[nn.Module] = ()

    def begin_step(self, step: int) -> None:
        """Runs before every optimizer step, with its number from 0."""

    def usage(self, reset: bool = True) -> dict[str, Any] | None:
        """Returns what the model did in the forward passes since the last reset, to be logged; None logs nothing."""
        return None

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters by the name of their layer, whose gradient norms are logged with every evaluation."""
        return {}

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes activations in the backward pass instead of keeping them.

        Raises:
            ValueError: the model cannot.
        """
        raise ValueError(f"{type(self).__name__} has no gradient checkpointing; leave gradient_checkpointing at false")
