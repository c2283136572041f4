"""Configuration of an L-Former: the base transformer, the side path over its layers, and the heads on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from xlayer_systems.training.options import LoopOptions, check_fields, option, redefault

Pooling = Literal["mean", "first", "last", "attention"]
Kind = Literal["ema", "gru", "attn", "head_only"]
AGGREGATORS: tuple[str, ...] = get_args(Kind)
PRESETS = AGGREGATORS  # one per aggregator, under its name
_AGGREGATOR_FIELDS = {"type": "aggregator", "num_heads": "aggregator_heads", "window": "window"}


@dataclass(frozen=True)
class ModelConfig:
    """Defines an L-Former. The sizes of a base matter where `LFormer` makes one; one that is attached keeps its own.

    Raises:
        ValueError: a value is out of range, or fields do not fit each other.
    """

    vocab_size: int = option(5000, "vocabulary of a base made here", minimum=1)
    hidden_size: int = option(512, "width of a base made here", minimum=1, earlier="d_model")
    num_layers: int = option(8, "layers of a base made here", minimum=1, earlier="n_layers")
    num_heads: int = option(8, "attention heads of a base made here", minimum=1, earlier="n_heads")
    intermediate_size: int = option(2048, "inner width of a base made here", minimum=1, earlier="d_ff")
    dropout: float = option(0.1, "dropout of a base made here and of the side path", minimum=0, below=1)
    max_length: int = option(1024, "tokens that a base made here can read", minimum=1)
    side_size: int = option(128, "width of the side path and its state", minimum=1, earlier="d_side")
    tap_every: int = option(1, "read every so many layers, counted back from the last, which always is", minimum=1)
    sequence_wise: bool | None = option(
        None,
        "one state per sequence, of pooled taps, instead of one per token; none: per token where the state is blended "
        "into the language model, per sequence elsewhere",
    )
    pooling: Pooling = option(
        "mean", "of the taps with one state per sequence, and of the last hidden state in head_only"
    )
    aggregator: str | dict[str, Any] = option(
        "ema",
        "how the state is carried over depth; head_only is the baseline without a side path, an MLP with as many "
        "parameters on the last hidden state",
        choices=AGGREGATORS,
    )
    aggregator_heads: int = option(4, "attention heads of attn", minimum=1, earlier="heads")
    window: int = option(4, "earlier taps that attn reads", minimum=1, earlier="memory")
    equal_to: Literal["ema", "gru", "attn"] = option("ema", "whose number of parameters head_only has")
    detach_taps: bool = option(
        True, "no gradient goes from the side path to the base; phase A always detaches, phase B never"
    )
    lambda_lm: float = option(1.0, "weight of the loss of the next token", minimum=0)
    lambda_plan: float = option(0.2, "weight of the loss of the plan", minimum=0)
    num_tools: int = option(5, "tools to choose from", minimum=1, earlier="n_tools")
    use_tool_head: bool = option(True, "choose a tool")
    use_value_head: bool = option(True, "predict a number")
    plan_decoder: bool = option(False, "generate a sequence of steps, in tokens of its own")
    num_steps: int = option(16, "different steps that a plan may have", minimum=1, earlier="n_steps")
    plan_length: int = option(8, "steps of a plan at most", minimum=1)
    tree_checkpoint: int = option(
        0, "with ema: keep the state after so many taps and aggregate the kept ones again; 0: never", minimum=0
    )
    blend_into_lm: bool = option(
        False, "add the state, through a gate that starts at 0, to what the language model's head reads"
    )
    gate_l1: float = option(0.0, "weight of the L1 penalty on the gates of ema", minimum=0)
    gate_l2: float = option(0.0, "weight of the L2 penalty on the gates of ema", minimum=0)
    last_k_unfreeze: int = option(0, "layers of the base that phase B trains, the last ones", minimum=0)

    def __post_init__(self) -> None:
        self._take_aggregator()
        check_fields(self)
        if self.blend_into_lm and self.is_sequence_wise:
            raise ValueError(
                "blend_into_lm needs sequence_wise=False: a state of the whole sequence knows what follows"
            )
        if self.blend_into_lm and self.aggregator == "head_only":
            raise ValueError("blend_into_lm needs a side path, and head_only has none")
        if self.aggregator != "ema" and (self.tree_checkpoint or self.gate_l1 or self.gate_l2):
            raise ValueError(f"tree_checkpoint, gate_l1 and gate_l2 are for ema, got aggregator {self.aggregator!r}")

    @property
    def is_sequence_wise(self) -> bool:
        """Returns ``sequence_wise`` with its default."""
        return not self.blend_into_lm if self.sequence_wise is None else self.sequence_wise

    @classmethod
    def tiny(cls, **changes: Any) -> ModelConfig:
        """Returns the configuration of a model that a test can train."""
        base = {"vocab_size": 1000, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "intermediate_size": 128}
        return cls(**{**base, "side_size": 32, "dropout": 0.0, "max_length": 128, **changes})

    def taps(self, layers: int) -> list[int]:
        """Returns which of the ``layers + 1`` hidden states of a base are tapped; 0, the embeddings, is not."""
        return list(range(layers, 0, -self.tap_every))[::-1]

    def _take_aggregator(self) -> None:
        """Splits ``{"type": ..., "num_heads": ..., "window": ...}`` into three fields."""
        if isinstance(self.aggregator, Mapping):
            given = self.aggregator
            if "type" not in given or set(given) - _AGGREGATOR_FIELDS.keys():
                raise ValueError(f"aggregator must have a type and may have num_heads and window, got {given!r}")
            for name, value in given.items():
                object.__setattr__(self, _AGGREGATOR_FIELDS[name], value)


@dataclass(frozen=True)
class LFormerOptions(LoopOptions):
    """Holds how to train a side path over a language model, first alone and then with the model's last layers."""

    epochs: int = redefault(LoopOptions, "epochs", 100)
    max_steps: int | None = redefault(LoopOptions, "max_steps", 3000, "optimizer steps of both phases together")
    batch_size: int = redefault(LoopOptions, "batch_size", 32)
    max_length: int = redefault(LoopOptions, "max_length", 128, "tokens of a request")
    phase_a_steps: int = option(2000, "steps with the base frozen; the others are phase B", minimum=0)
    learning_rate: float = option(1e-3, "learning rate of side path and heads", minimum=0)
    base_lr: float = option(2e-5, "learning rate of the base's layers in phase B", minimum=0)
    lm_dataset: str = option("stdlib-lm", "text of the language-modelling loss")
    lm_length: int = option(256, "tokens of a block of it", minimum=1)
    eval_every: int | None = redefault(LoopOptions, "eval_every", 250)
    eval_examples: int | None = option(
        None, "validation requests that all evaluations use, evenly spaced; none: all", minimum=1
    )
    baseline: bool = option(
        True, "after training, train heads on the last hidden state with as many parameters; as a flag all or none"
    )

    unused_parameters: ClassVar[bool] = True
