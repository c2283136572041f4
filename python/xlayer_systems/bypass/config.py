"""Configuration of a bypass, and of an adapter of the same size to compare it with."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

from xlayer_systems.training.options import LoopOptions, check_fields, option, redefault

Stage = Literal["both", "reconstruct", "task"]


@dataclasses.dataclass(frozen=True)
class BypassConfig:
    """Defines a bypass.

    Raises:
        ValueError: a value is out of range.
    """

    model: str = option("", "name of the frozen model that it is for, for the record")
    latent: int = option(
        256,
        "numbers that one token's hidden states of all layers (full) or of one (offset) are compressed to",
        minimum=1,
    )
    variant: Literal["full", "offset"] = option(
        "full",
        "full: one latent of all layers, from which every layer gets its bias; offset: the bias of layer l comes from "
        "the latent of layer l + offset alone",
    )
    offset: int = option(1, "layers between source and target in the variant offset", minimum=1)
    layers: tuple[int, ...] | None = option(
        None, "those that get a bias, counted from 0; none: all that can", minimum=0
    )
    stage: Stage = option(
        "both",
        "reconstruct trains encoder and projectors to give the hidden states back, task trains the projectors on a "
        "task behind a frozen encoder, both is for runs: one after the other",
    )
    encoder: str | None = option(None, "folder of a bypass whose encoder the task begins with; none: a random one")

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        check_fields(self)

    def injected(self, depth: int) -> tuple[int, ...]:
        """Returns the layers of a model with ``depth`` layers that get a bias."""
        possible = depth if self.variant == "full" else depth - self.offset
        if possible < 1:
            raise ValueError(f"offset must be below the model's {depth} layers, got {self.offset}")
        chosen = tuple(range(possible)) if self.layers is None else self.layers
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= layer < possible for layer in chosen):
            raise ValueError(f"layers must be different numbers from 0 to {possible - 1}, got {list(chosen)}")
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able dict; ``BypassConfig(**d)`` is the inverse."""
        return {**dataclasses.asdict(self), "layers": None if self.layers is None else list(self.layers)}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Defines LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) on every linear layer of the same frozen model.

    Raises:
        ValueError: a value is out of range.
    """

    model: str = option("", "name of the frozen model that it is for, for the record")
    latent: int = option(256, "the adapter is about as large as the projectors of a bypass with this latent", minimum=1)
    rank: int | None = option(None, "rank of the adapter; wins over latent", minimum=1)
    stage: Literal["both", "task"] = option("both", "as in a bypass; an adapter has nothing to reconstruct")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class BypassOptions(LoopOptions):
    """Holds how to train a bypass on a frozen language model: first to reconstruct hidden states, then on the task."""

    epochs: int = redefault(LoopOptions, "epochs", 100)
    max_steps: int | None = redefault(
        LoopOptions,
        "max_steps",
        2000,
        "optimizer steps on the task; where you set it, the first stage takes no more, and statistics no more tokens",
    )
    batch_size: int = redefault(LoopOptions, "batch_size", 16)
    max_length: int = redefault(LoopOptions, "max_length", 256, "tokens of a block; the model sees no further back")
    weight_decay: float = redefault(LoopOptions, "weight_decay", 0.0)
    learning_rate: float = option(
        1e-5,
        "learning rate of the projectors on the task: a step of Adam moves a bias by up to this times the latent, in "
        "every layer at once, so that much higher rates soon lose what a deep model knew",
        minimum=0,
    )
    reconstruct_steps: int = option(1000, "optimizer steps of the first stage", minimum=1)
    reconstruct_rate: float = option(1e-3, "learning rate of the first stage", minimum=0)
    lora_rate: float = option(
        1e-3, "learning rate of the LoRA that the bypass is compared with, trained on as many batches", minimum=0
    )
    eval_batch_size: int = redefault(LoopOptions, "eval_batch_size", 32)
    eval_every: int | None = redefault(LoopOptions, "eval_every", 200)
    calibration_tokens: int = option(
        16384, "training tokens that the statistics of the hidden states come from", minimum=1
    )
    pca_tokens: int = option(65536, "training tokens that the principal components come from", minimum=1)
    eval_blocks: int | None = option(
        128,
        "blocks of the validation text that evaluations during training use, evenly spaced; none: all; where you set "
        "it, the comparison at the end uses no more",
        minimum=1,
    )
    compare_blocks: int | None = option(1024, "the same for the comparison at the end", minimum=1)
    compare: bool = option(True, "train the LoRA as well, with which a bypass is compared; as a flag all or none")

    def bounded(self, asked: Collection[str], given: Collection[str]) -> BypassOptions:
        """Caps stage 1 at ``max_steps``, statistics at as many tokens, and the comparison at ``eval_blocks``."""
        bounds = {}
        if "max_steps" in asked and self.max_steps is not None:
            tokens = self.max_steps * self.batch_size * self.max_length
            bounds = {"reconstruct_steps": self.max_steps, "calibration_tokens": tokens, "pca_tokens": tokens}
        if "eval_blocks" in asked and self.eval_blocks is not None:
            bounds["compare_blocks"] = self.eval_blocks
        return self._capped(given, **bounds)
