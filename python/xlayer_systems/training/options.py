"""The options of the shared training loop, and how ``--set key=value`` changes a dataclass."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from xlayer_systems.errors import UserError

MAX_SEED = 2**32 - 1  # what every generator takes
DTYPES = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # to Accelerate's names for mixed precision


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """What every run of the shared loop has. A subclass per kind of training adds its rates and its defaults.

    Attributes:
        epochs: passes over the training set.
        max_steps: end after so many optimizer steps, if that comes first.
        batch_size: examples per optimizer step, over all processes and accumulation steps together, so that a run
            means the same on one CPU and on eight GPUs.
        accumulate: micro-batches per optimizer step and process.
        max_length: tokens of an example.
        warmup: share of all steps in which the rate rises linearly; it falls linearly to 0 over the rest.
        clip: largest norm of the gradient.
        dtype: float32, or bfloat16 and float16 for mixed precision.
        stop_below: stop after the first epoch when its validation accuracy is below this.
        eval_every: steps between evaluations, beside the one at the end of every epoch.
        checkpoint_every: steps between checkpoints, beside the one at the end of every epoch.
    """

    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    max_length: int = 128
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    stop_below: float | None = None
    eval_batch_size: int = 64
    eval_every: int | None = None
    log_every: int = 20
    checkpoint_every: int = 200
    tensorboard: bool = True

    unused_parameters: ClassVar[bool] = False  # whether steps may leave parameters without a gradient; DDP must know
    counts: ClassVar[tuple[str, ...]] = (
        "max_steps", "batch_size", "accumulate", "max_length", "eval_batch_size", "eval_every", "log_every",
        "checkpoint_every",
    )  # fmt: skip
    rates: ClassVar[tuple[str, ...]] = ("weight_decay",)  # with the learning rates: finite and not negative
    shares: ClassVar[tuple[str, ...]] = ("warmup",)  # between 0 and 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        for name in self.counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.epochs < 0:
            raise UserError(f"epochs must not be negative, got {self.epochs}")
        for name in self.rates:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{name} must be finite and not negative, got {value}")
        for name in self.shares:
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"{name} must be between 0 and 1, got {value}")
        if not 0 < self.clip < math.inf:
            raise UserError(f"clip must be finite and more than 0, got {self.clip}")
        if self.stop_below is not None and not math.isfinite(self.stop_below):
            raise UserError(f"stop_below must be finite, got {self.stop_below}")

    def micro_batch(self, processes: int) -> int:
        """Examples per process and forward pass."""
        parts = processes * self.accumulate
        if self.batch_size % parts:
            expected = f"a multiple of processes x accumulate = {processes} x {self.accumulate}"
            raise UserError(f"batch_size {self.batch_size} must be {expected}")
        return self.batch_size // parts


@dataclasses.dataclass(frozen=True)
class TrainOptions(LoopOptions):
    """How to fine-tune an encoder. The defaults are the published ones for roberta-large on RTE.

    Attributes:
        bridge_lr: learning rate of the parameters that a system adds; None gives them the encoder's, as published.
    """

    encoder_lr: float = 1.5e-5
    head_lr: float = 3e-4
    bridge_lr: float | None = None
    label_smoothing: float = 0.05
    head_dropout: float = 0.1

    rates: ClassVar[tuple[str, ...]] = (*LoopOptions.rates, "encoder_lr", "head_lr", "bridge_lr")
    shares: ClassVar[tuple[str, ...]] = (*LoopOptions.shares, "label_smoothing", "head_dropout")


@dataclasses.dataclass(frozen=True)
class LanguageModelOptions(LoopOptions):
    """How to train a language model from random parameters.

    Attributes:
        max_length: tokens of a block; the model sees no further back.
        beta2: AdamW's decay of the average of squared gradients.
        eval_blocks: blocks of the validation text that evaluations during training use, evenly spaced; None: all.
    """

    epochs: int = 1
    batch_size: int = 32
    max_length: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta2: float = 0.95
    eval_batch_size: int = 32
    eval_blocks: int | None = 1024
    eval_every: int | None = 200

    counts: ClassVar[tuple[str, ...]] = (*LoopOptions.counts, "eval_blocks")
    rates: ClassVar[tuple[str, ...]] = (*LoopOptions.rates, "learning_rate")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta2 < 1:
            raise UserError(f"beta2 must be at least 0 and less than 1, got {self.beta2}")


Settings = TypeVar("Settings")


def check_seed(seed: int) -> None:
    """Refuse a seed that some random generator would not take."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"a seed must be between 0 and {MAX_SEED}, got {seed}")


def parse_overrides(items: list[str]) -> dict[str, str]:
    """``["a=1", "b=x"]`` as a dict."""
    pairs = [item.partition("=") for item in items]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise UserError(f"expected key=value, got {key + equals!r}")
    return {key: value for key, _, value in pairs}


def apply_overrides(settings: Settings, overrides: Mapping[str, str]) -> Settings:
    """A copy of the dataclass ``settings`` with ``overrides``, each parsed as its field's type."""
    hints = typing.get_type_hints(type(settings))
    values = {key: _parse(key, text, hints[key]) for key, text in overrides.items()}
    try:
        return dataclasses.replace(settings, **values)  # type: ignore[type-var]
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def split_overrides(overrides: Mapping[str, str], *targets: Any) -> list[dict[str, str]]:
    """Which of the dataclasses ``targets`` each key belongs to; an unknown key is refused with the known ones."""
    fields = [{f.name for f in dataclasses.fields(target)} if target is not None else set() for target in targets]
    for key in overrides:
        if not any(key in names for names in fields):
            known = ", ".join(sorted(set().union(*fields)))
            raise UserError(f"unknown setting {key!r}; expected one of {known}")
    return [{key: value for key, value in overrides.items() if key in names} for names in fields]


def _parse(key: str, text: str, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        if text not in choices:
            raise UserError(f"unknown {key} {text!r}; expected one of {', '.join(choices)}")
        return choices[text]
    if origin in (types.UnionType, typing.Union):
        inner = [argument for argument in typing.get_args(hint) if argument is not type(None)]
        return None if text.lower() == "none" else _parse(key, text, inner[0])
    if origin is tuple:  # commas separate variants in a sweep
        return tuple(_parse(key, part, typing.get_args(hint)[0]) for part in text.replace("x", ",").split(","))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key} is true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return hint(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key} takes a value of type {getattr(hint, '__name__', hint)}, got {text!r}") from error
