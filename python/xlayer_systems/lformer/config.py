"""What defines an L-Former: the base transformer, the side path over its layers, and the heads on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from xlayer_ext.nn.aggregate import POOLINGS
from xlayer_systems.errors import UserError
from xlayer_systems.training.options import LoopOptions

Pooling = Literal["mean", "first", "last", "attention"]
Kind = Literal["ema", "gru", "attn", "head_only"]
AGGREGATORS: tuple[str, ...] = get_args(Kind)
PRESETS = AGGREGATORS  # one per aggregator, under its name


@dataclass(frozen=True)
class ModelConfig:
    """An L-Former. A wrong value raises ``ValueError`` naming the field.

    Attributes:
        vocab_size, d_model, n_layers, n_heads, d_ff, dropout: of the base, where `LFormer` makes one. A base that is
            attached keeps its own; ``dropout`` is the side path's as well.
        max_length: tokens that a base made here can read.
        d_side: width of the side path and its state.
        tap_every: read every so many layers, counted back from the last, which always is.
        sequence_wise: one state per sequence, of pooled taps, instead of one per token; None: per token where the state
            is blended into the language model, per sequence elsewhere. Per token, the heads read the last token's.
        pooling: of the taps, with ``sequence_wise``, and of the last hidden state in ``head_only``.
        aggregator: ``ema``, ``gru`` or ``attn``; ``{"type": "attn", "heads": 4, "memory": 4}`` says the same.
            ``head_only`` is the baseline: no side path, but an MLP with as many parameters on the last hidden state.
        heads, memory: of ``attn``.
        equal_to: whose number of parameters ``head_only`` has.
        detach_taps: no gradient goes from the side path to the base. Phase A always detaches, phase B never.
        lambda_lm, lambda_plan: weights of the losses of the next token and of the plan.
        n_tools, use_tool_head, use_value_head: a tool to be chosen, a number to be told.
        plan_decoder: say a sequence of steps, in tokens of its own.
        n_steps, plan_length: how many different steps a plan may have, and how many of them at most.
        tree_checkpoint: with ``ema``: keep the state after so many taps and aggregate the kept ones again; 0: never.
        blend_into_lm: add the state, through a gate that starts at 0, to what the language model's head reads.
        gate_l1, gate_l2: weights of the penalty on the gates of ``ema``.
        last_k_unfreeze: layers of the base that phase B trains, the last ones.
    """

    vocab_size: int = 5000
    d_model: int = 512
    n_layers: int = 8
    n_heads: int = 8
    d_ff: int = 2048
    dropout: float = 0.1
    max_length: int = 1024
    d_side: int = 128
    tap_every: int = 1
    sequence_wise: bool | None = None
    pooling: Pooling = "mean"
    aggregator: str | dict[str, Any] = "ema"
    heads: int = 4
    memory: int = 4
    equal_to: Literal["ema", "gru", "attn"] = "ema"
    detach_taps: bool = True
    lambda_lm: float = 1.0
    lambda_plan: float = 0.2
    n_tools: int = 5
    use_tool_head: bool = True
    use_value_head: bool = True
    plan_decoder: bool = False
    n_steps: int = 16
    plan_length: int = 8
    tree_checkpoint: int = 0
    blend_into_lm: bool = False
    gate_l1: float = 0.0
    gate_l2: float = 0.0
    last_k_unfreeze: int = 0

    def __post_init__(self) -> None:
        self._take_aggregator()
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_length", "d_side", "tap_every",
                     "heads", "memory", "n_tools", "n_steps", "plan_length"):  # fmt: skip
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("lambda_lm", "lambda_plan", "gate_l1", "gate_l2", "tree_checkpoint", "last_k_unfreeze"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        self._require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self._require(self.pooling in POOLINGS, "pooling", f"one of {', '.join(POOLINGS)}")
        self._require(self.equal_to in AGGREGATORS[:3], "equal_to", f"one of {', '.join(AGGREGATORS[:3])}")
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
        """``sequence_wise`` with its default."""
        return not self.blend_into_lm if self.sequence_wise is None else self.sequence_wise

    @classmethod
    def tiny(cls, **changes: Any) -> ModelConfig:
        """A model that a test can train."""
        sizes = {"vocab_size": 1000, "d_model": 64, "n_layers": 4, "n_heads": 4, "d_ff": 128, "d_side": 32}
        return cls(**{**sizes, "dropout": 0.0, "max_length": 128, **changes})

    def taps(self, layers: int) -> list[int]:
        """Which of the ``layers + 1`` hidden states of a base are tapped; 0 are the embeddings, and are not."""
        return list(range(layers, 0, -self.tap_every))[::-1]

    def _take_aggregator(self) -> None:
        """``{"type": ..., "heads": ..., "memory": ...}`` as three fields."""
        if isinstance(self.aggregator, Mapping):
            given = dict(self.aggregator)
            unknown = set(given) - {"type", "heads", "memory"}
            if unknown or "type" not in given:
                raise ValueError(f"aggregator must have a type and may have heads and memory, got {self.aggregator!r}")
            object.__setattr__(self, "aggregator", given.pop("type"))
            for name, value in given.items():
                object.__setattr__(self, name, value)
        self._require(self.aggregator in AGGREGATORS, "aggregator", f"one of {', '.join(AGGREGATORS)}")

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class LFormerOptions(LoopOptions):
    """How to train a side path over a language model, first alone and then with the model's last layers.

    Attributes:
        max_steps: of both phases together.
        max_length: tokens of a request.
        phase_a_steps: steps with the base frozen; the others are phase B.
        learning_rate: of side path and heads.
        base_lr: of the base's layers in phase B.
        lm_dataset: the text of the language-modelling loss.
        lm_length: tokens of a block of it.
        baseline: after training, train heads on the last hidden state with as many parameters.
    """

    epochs: int = 100
    max_steps: int | None = 3000
    batch_size: int = 32
    phase_a_steps: int = 2000
    learning_rate: float = 1e-3
    base_lr: float = 2e-5
    lm_dataset: str = "stdlib-lm"
    lm_length: int = 256
    eval_every: int | None = 250
    baseline: bool = True

    unused_parameters: ClassVar[bool] = True
    counts: ClassVar[tuple[str, ...]] = (*LoopOptions.counts, "lm_length")
    rates: ClassVar[tuple[str, ...]] = (*LoopOptions.rates, "learning_rate", "base_lr")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.phase_a_steps < 0:
            raise UserError(f"phase_a_steps must not be negative, got {self.phase_a_steps}")
