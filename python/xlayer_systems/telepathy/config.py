"""Configuration of a bridge between two frozen language models."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

from xlayer_systems.training.options import LoopOptions, check_fields, option, redefault

BASELINES = (
    "majority", "random", "sender_text", "sender_text_5shot", "receiver_text", "receiver_text_5shot", "text_relay",
    "text_relay_5shot", "sender_text_ranked", "receiver_text_ranked", "text_relay_ranked", "prompt_tuning",
    "prompt_tuning_text", "linear_probe", "noise",
)  # fmt: skip
LOSSES = ("lm", "flow", "anchor", "info_nce", "reconstruction", "bag_of_words", "batch_diversity", "variance_diversity")


@dataclasses.dataclass(frozen=True)
class TelepathyConfig:
    """Defines a bridge and its objective. The defaults are the report's final set-up for classification.

    Raises:
        ValueError: a value is out of range.
    """

    sender: str = option("decoder-sender", "causal language model that reads the text; stays frozen")
    receiver: str = option("decoder-receiver", "causal language model that answers; stays frozen")
    source_layer: int = option(-1, "whose output the bridge reads, counted from the embeddings (0); -1 is the last")
    source_depth: float | None = option(
        None, "the same as a share of the sender's layers, so that a preset fits any depth; wins", minimum=0, maximum=1
    )
    soft_tokens: int = option(8, "vectors that the receiver gets in place of the text", minimum=1)
    primer: str = option("Answer: ", "text before the soft tokens")
    bridge: Literal["continuous", "vq", "fsq", "dit"] = option(
        "continuous",
        "continuous, vq, fsq: a Perceiver resampler, alone and with a quantizer behind it; dit: a diffusion "
        "transformer trained by rectified flow",
    )
    conditioning: Literal["pooled", "cross", "hybrid"] = option(
        "hybrid", "how the diffusion transformer sees the source"
    )
    num_layers: int = option(2, "blocks of the resampler or the diffusion transformer", minimum=1, earlier="depth")
    num_heads: int = option(8, "attention heads of a block; must divide the width", minimum=1, earlier="heads")
    hidden_size: int | None = option(None, "inner width; none takes the receiver's", minimum=1, earlier="width")
    scaling: Literal["rms", "tanh", "none"] = option(
        "rms", "brings the output to the scale of the receiver's embeddings"
    )
    target_rms: float | None = option(None, "that scale; none measures it", above=0)
    normalizer: Literal["none", "calibrated", "learnable"] = option(
        "calibrated",
        "standardize the source with statistics that were calibrated on training examples, let them learn on, or leave "
        "the source alone",
    )
    calibration_examples: int = option(500, "examples that the statistics come from", minimum=1)
    lm: float = option(
        1.0, "weight of the language-modelling loss; with 0 nothing goes through the receiver", minimum=0
    )
    flow: float = option(1.0, "weight of the rectified flow, used by dit alone", minimum=0)
    anchor: float = option(0.0, "weight of the anchor loss", minimum=0)
    info_nce: float = option(0.0, "weight of the contrast between messages", minimum=0)
    reconstruction: float = option(0.0, "weight of the reconstruction of the sender's states", minimum=0)
    bag_of_words: float = option(0.0, "weight of naming the text's words", minimum=0)
    batch_diversity: float = option(0.1, "weight of the difference between messages of a batch", minimum=0)
    variance_diversity: float = option(0.0, "weight of the variance of the codes", minimum=0)
    anchor_target: Literal["answer", "question"] = option(
        "answer", "whose embeddings the anchor loss and the flow aim at"
    )
    target: Literal["answer", "question_answer"] = option(
        "answer", "what the receiver must generate: the answer, or the text and then the answer"
    )
    first_k: int | None = option(None, "number of first tokens of the target that weigh first_weight", minimum=1)
    first_weight: float = option(1.0, "their weight in the language-modelling loss", minimum=0)
    codebook_size: int = option(512, "codes of the vector quantizer", minimum=1)
    metric: Literal["euclidean", "cosine"] = option("cosine", "distance of the vector quantizer")
    ema: bool = option(True, "update the codebook by moving averages")
    decay: float = option(0.99, "decay of those averages", minimum=0, maximum=1)
    commitment: float = option(0.25, "weight of the commitment loss", minimum=0)
    entropy: float = option(0.0, "weight of the entropy of the codes in use", minimum=0)
    threshold_ema_dead_code: float = option(
        0.0,
        "codes whose moving average of uses falls below this are revived; 0 leaves them dead",
        minimum=0,
        earlier="revive_below",
    )
    levels: tuple[int, ...] = option(
        (8, 8, 8, 8, 8, 8, 8, 8), "levels of finite scalar quantization, one per dimension", minimum=2
    )
    dit_steps: int = option(10, "Euler steps from noise to soft tokens", minimum=1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        check_fields(self)
        if not any(getattr(self, name) > 0 for name in LOSSES):
            raise ValueError(f"a bridge without a loss learns nothing; expected one of {', '.join(LOSSES)} above 0")
        if not self.levels:
            raise ValueError("levels must name at least one dimension")

    def layer(self, layers: int) -> int:
        """Returns the index into the ``layers + 1`` hidden states of a sender with ``layers`` layers."""
        if self.source_depth is not None:
            return round(self.source_depth * layers)
        if not -layers - 1 <= self.source_layer <= layers:
            raise ValueError(f"source_layer must be between {-layers - 1} and {layers}, got {self.source_layer}")
        return self.source_layer % (layers + 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able dict; ``TelepathyConfig(**d)`` is the inverse."""
        return {**dataclasses.asdict(self), "levels": list(self.levels)}


@dataclasses.dataclass(frozen=True)
class TelepathyOptions(LoopOptions):
    """Holds how to train a bridge between two frozen language models. The defaults are those for classification."""

    epochs: int = redefault(LoopOptions, "epochs", 100)
    max_steps: int | None = redefault(LoopOptions, "max_steps", 2000)
    batch_size: int = redefault(LoopOptions, "batch_size", 16)
    max_length: int = redefault(LoopOptions, "max_length", 256, "tokens of the text that the sender reads")
    learning_rate: float = option(2e-4, "learning rate of the bridge", minimum=0)
    eval_every: int | None = redefault(LoopOptions, "eval_every", 500)
    eval_examples: int | None = option(
        None,
        "validation examples that evaluations during training, baselines and latencies use, evenly spaced; none: all",
        minimum=1,
    )
    probe_examples: int | None = option(
        None,
        "training examples that the linear probe is fitted to, evenly spaced; none: all, or where you set max_steps as "
        "many as these steps read",
        minimum=1,
    )
    max_new_tokens: int | None = option(None, "longest answer; none takes the longest of training", minimum=1)
    keep_states: bool = option(
        False, "compute the sender's states of all texts once and keep them in memory, instead of every time"
    )
    baselines: str = option(
        "all",
        "what to run on the same task after training, and measure latencies: all baselines, none, or names separated "
        f"by commas of {', '.join(BASELINES)}",
    )

    def __post_init__(self) -> None:
        # Until it took names it was true or false, which run files and command lines still hold.
        earlier = {"true": "all", "false": "none"}
        object.__setattr__(self, "baselines", earlier.get(str(self.baselines).lower(), self.baselines))
        super().__post_init__()
        names = self.baseline_names()
        unknown = [name for name in names if name not in BASELINES]
        if unknown or (not names and self.baselines != "none"):
            raise ValueError(f"baselines must be all, none or names of {', '.join(BASELINES)}, got {self.baselines!r}")

    def baseline_names(self) -> tuple[str, ...]:
        """Returns the names of the baselines to run, in the order of the report."""
        if self.baselines == "all":
            return BASELINES
        names = [name.strip() for name in self.baselines.split(",")] if self.baselines != "none" else []
        return tuple(sorted(names, key=lambda name: BASELINES.index(name) if name in BASELINES else -1))

    def bounded(self, asked: Collection[str], given: Collection[str]) -> TelepathyOptions:
        """Caps the examples of the linear probe at those that ``max_steps`` read."""
        if "max_steps" in asked and self.max_steps is not None:
            return self._capped(given, probe_examples=self.max_steps * self.batch_size)
        return self
