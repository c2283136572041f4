"""What defines a bypass, and an adapter of the same size to compare it with."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from xlayer_systems.errors import UserError
from xlayer_systems.training.options import LoopOptions

Stage = Literal["both", "reconstruct", "task"]


@dataclasses.dataclass(frozen=True)
class BypassConfig:
    """A bypass.

    Attributes:
        model: name of the frozen model that it is for, for the record.
        latent: numbers that one token's hidden states of all layers are compressed to (``full``), or those of one
            layer (``offset``).
        variant: ``full``: one latent of all layers, from which every layer gets its bias. ``offset``: the bias of layer
            l comes from the latent of layer l + ``offset`` alone.
        offset: layers between source and target in the variant ``offset``.
        layers: those that get a bias, counted from 0; None: all that can.
        stage: ``reconstruct`` trains encoder and projectors to give the hidden states back, ``task`` trains the
            projectors on a task, behind a frozen encoder. ``both`` is for runs: one after the other.
        encoder: folder of a bypass whose encoder ``task`` begins with; None: a random one.
    """

    model: str = ""
    latent: int = 256
    variant: Literal["full", "offset"] = "full"
    offset: int = 1
    layers: tuple[int, ...] | None = None
    stage: Stage = "both"
    encoder: str | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        _check_choice("variant", self.variant, ("full", "offset"))
        _check_choice("stage", self.stage, ("both", "reconstruct", "task"))
        for name in ("latent", "offset"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    def injected(self, depth: int) -> tuple[int, ...]:
        """The layers of a model with ``depth`` layers that get a bias."""
        possible = depth if self.variant == "full" else depth - self.offset
        if possible < 1:
            raise UserError(f"offset must be below the model's {depth} layers, got {self.offset}")
        chosen = tuple(range(possible)) if self.layers is None else self.layers
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= layer < possible for layer in chosen):
            raise UserError(f"layers must be different numbers from 0 to {possible - 1}, got {list(chosen)}")
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``BypassConfig(**d)`` is the inverse."""
        return {**dataclasses.asdict(self), "layers": None if self.layers is None else list(self.layers)}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) on every linear layer of the same frozen model.

    Attributes:
        model: its name.
        latent: the adapter is about as large as the projectors of a bypass with this latent.
        rank: wins over ``latent``.
        stage: as in `BypassConfig`; an adapter has nothing to reconstruct.
    """

    model: str = ""
    latent: int = 256
    rank: int | None = None
    stage: Literal["both", "task"] = "both"

    def __post_init__(self) -> None:
        _check_choice("stage", self.stage, ("both", "task"))
        if self.latent < 1 or (self.rank is not None and self.rank < 1):
            raise UserError(f"latent and rank must be at least 1, got {self.latent} and {self.rank}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"unknown {name} {value!r}; expected one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class BypassOptions(LoopOptions):
    """How to train a bypass on a frozen language model: first to reconstruct hidden states, then on the task.

    Attributes:
        max_steps: of the task.
        max_length: tokens of a block; the model sees no further back.
        learning_rate: of the projectors on the task.
        reconstruct_steps, reconstruct_rate: of the first stage.
        lora_rate: of the LoRA of the same size that the bypass is compared with, trained on as many batches.
        calibration_tokens: of training, that the statistics of the hidden states come from.
        pca_tokens: of training, that the principal components come from.
        eval_blocks: blocks of the validation text that evaluations during training use, evenly spaced; None: all.
        compare_blocks: the same for the comparison at the end.
        compare: train the LoRA as well.
    """

    epochs: int = 100
    max_steps: int | None = 2000
    batch_size: int = 16
    max_length: int = 256
    weight_decay: float = 0.0
    learning_rate: float = 1e-3
    reconstruct_steps: int = 1000
    reconstruct_rate: float = 1e-3
    lora_rate: float = 1e-3
    eval_batch_size: int = 32
    eval_every: int | None = 200
    calibration_tokens: int = 16384
    pca_tokens: int = 65536
    eval_blocks: int | None = 128
    compare_blocks: int | None = 1024
    compare: bool = True

    counts: ClassVar[tuple[str, ...]] = (
        *LoopOptions.counts, "reconstruct_steps", "calibration_tokens", "pca_tokens", "eval_blocks", "compare_blocks",
    )  # fmt: skip
    rates: ClassVar[tuple[str, ...]] = (*LoopOptions.rates, "learning_rate", "reconstruct_rate", "lora_rate")
