"""What defines a bridge between two frozen language models."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from xlayer_systems.errors import UserError
from xlayer_systems.training.options import LoopOptions

LOSSES = ("lm", "flow", "anchor", "info_nce", "reconstruction", "bag_of_words", "batch_diversity", "variance_diversity")


@dataclasses.dataclass(frozen=True)
class TelepathyConfig:
    """A bridge and its objective. The defaults are the report's final set-up for classification.

    Attributes:
        sender: name of the causal language model that reads the text.
        receiver: name of the one that answers; both stay frozen.
        source_layer: whose output the bridge reads, counted from the embeddings (0); -1 is the last.
        source_depth: the same as a share of the sender's layers, so that a preset fits any depth; wins over
            ``source_layer``.
        soft_tokens: K, the vectors that the receiver gets in place of the text.
        primer: text before the soft tokens.
        bridge: ``continuous`` and ``vq``, ``fsq`` are a Perceiver resampler, alone and with a quantizer behind it;
            ``dit`` is a diffusion transformer trained by rectified flow.
        conditioning: how the diffusion transformer sees the source.
        depth: blocks of the resampler or the diffusion transformer.
        heads: attention heads of a block; must divide the width.
        width: inner width; None takes the receiver's.
        scaling: what brings the output to the scale of the receiver's embeddings.
        target_rms: that scale; None measures it.
        normalizer: standardize the source with statistics that were ``calibrated`` on training examples, let them
            learn on, or leave the source alone.
        calibration_examples: how many examples the statistics come from.
        lm, flow, anchor, info_nce, reconstruction, bag_of_words, batch_diversity, variance_diversity: weights of the
            losses. With ``lm`` 0 nothing goes through the receiver; ``flow`` is used by ``dit`` alone.
        anchor_target: whose embeddings the anchor loss and the flow aim at.
        target: what the receiver must say, the answer, or the text and then the answer.
        first_k: so many tokens of the target, the first, weigh ``first_weight`` in the language-modelling loss.
        codebook_size, metric, ema, decay, commitment, entropy, revive_below: of the vector quantizer; codes whose
            moving average of uses falls below ``revive_below`` are revived, 0 leaves them dead.
        levels: of finite scalar quantization, one per dimension.
        dit_steps: Euler steps from noise to soft tokens.
    """

    sender: str = "decoder-sender"
    receiver: str = "decoder-receiver"
    source_layer: int = -1
    source_depth: float | None = None
    soft_tokens: int = 8
    primer: str = "Answer: "
    bridge: Literal["continuous", "vq", "fsq", "dit"] = "continuous"
    conditioning: Literal["pooled", "cross", "hybrid"] = "hybrid"
    depth: int = 2
    heads: int = 8
    width: int | None = None
    scaling: Literal["rms", "tanh", "none"] = "rms"
    target_rms: float | None = None
    normalizer: Literal["none", "calibrated", "learnable"] = "calibrated"
    calibration_examples: int = 500
    lm: float = 1.0
    flow: float = 1.0
    anchor: float = 0.0
    info_nce: float = 0.0
    reconstruction: float = 0.0
    bag_of_words: float = 0.0
    batch_diversity: float = 0.1
    variance_diversity: float = 0.0
    anchor_target: Literal["answer", "question"] = "answer"
    target: Literal["answer", "question_answer"] = "answer"
    first_k: int | None = None
    first_weight: float = 1.0
    codebook_size: int = 512
    metric: Literal["euclidean", "cosine"] = "cosine"
    ema: bool = True
    decay: float = 0.99
    commitment: float = 0.25
    entropy: float = 0.0
    revive_below: float = 0.0
    levels: tuple[int, ...] = (8, 8, 8, 8, 8, 8, 8, 8)
    dit_steps: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        for name in ("soft_tokens", "depth", "heads", "codebook_size", "dit_steps", "calibration_examples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in LOSSES:
            if getattr(self, name) < 0:
                raise UserError(f"the weight {name} must not be negative, got {getattr(self, name)}")
        if not any(getattr(self, name) > 0 for name in LOSSES):
            raise UserError(f"a bridge without a loss learns nothing; expected one of {', '.join(LOSSES)} above 0")
        if self.source_depth is not None and not 0 <= self.source_depth <= 1:
            raise UserError(f"source_depth is a share of the layers between 0 and 1, got {self.source_depth}")
        if min(self.levels, default=0) < 2:
            raise UserError(f"levels must name at least one dimension of 2 or more levels, got {self.levels}")

    def layer(self, layers: int) -> int:
        """Index into the ``layers + 1`` hidden states of a sender with ``layers`` layers."""
        if self.source_depth is not None:
            return round(self.source_depth * layers)
        if not -layers - 1 <= self.source_layer <= layers:
            raise UserError(f"source_layer must be between {-layers - 1} and {layers}, got {self.source_layer}")
        return self.source_layer % (layers + 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``TelepathyConfig(**d)`` is the inverse."""
        return {**dataclasses.asdict(self), "levels": list(self.levels)}


@dataclasses.dataclass(frozen=True)
class TelepathyOptions(LoopOptions):
    """How to train a bridge between two frozen language models. The defaults are the report's for classification.

    Attributes:
        max_length: tokens of the text that the sender reads.
        eval_examples: validation examples that evaluations during training use, evenly spaced; None: all.
        max_new_tokens: longest answer; None takes the longest of training.
        keep_states: ask the sender once for its states of all texts and keep them in memory, instead of every time.
        baselines: after training, run every baseline on the same task and measure latencies.
    """

    epochs: int = 100
    max_steps: int | None = 2000
    batch_size: int = 16
    max_length: int = 256
    learning_rate: float = 2e-4
    eval_every: int | None = 500
    eval_examples: int | None = None
    max_new_tokens: int | None = None
    keep_states: bool = False
    baselines: bool = True

    counts: ClassVar[tuple[str, ...]] = (*LoopOptions.counts, "eval_examples", "max_new_tokens")
    rates: ClassVar[tuple[str, ...]] = (*LoopOptions.rates, "learning_rate")
