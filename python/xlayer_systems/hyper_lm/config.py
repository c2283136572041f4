"""The options and sizes of a hyper-connected language model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Residual = Literal["plain", "shc", "dhc", "mhc"]
RESIDUALS: tuple[str, ...] = get_args(Residual)


@dataclass(frozen=True)
class HyperLMConfig:
    """Everything that defines the model. A wrong value raises ``ValueError`` naming the field.

    Attributes:
        residual: how a sublayer is connected: ``plain``, x + T(x); ``shc`` and ``dhc``, static and dynamic
            hyper-connections; ``mhc``, manifold-constrained ones.
        expansion_rate: n, the number of streams (of no meaning to ``plain``).
        feed_forward: width of the MLP; None: 4·hidden_size.
        use_tanh: whether dynamic hyper-connections have their tanh.
        norm: of the streams in dynamic hyper-connections, ``layer`` or ``rms``.
        coefficients: of ``mhc``, see ``ManifoldHyperConnection``.
        reduce: how the streams become one at the end: ``sum`` (the paper) or ``mean``.
        rescale_outputs: the paper's initialization with hyper-connections: the standard deviation of the attention's
            and the MLP's output projections times √n. Without it every kind begins with the same weights.
        dropout: of every sublayer's output.
        rope_base: of the rotary position embedding.
    """

    residual: Residual = "dhc"
    expansion_rate: int = 4
    vocab_size: int = 50257
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    feed_forward: int | None = None
    use_tanh: bool = True
    norm: Literal["layer", "rms"] = "layer"
    coefficients: Literal["paper", "per_stream"] = "paper"
    reduce: Literal["sum", "mean"] = "sum"
    rescale_outputs: bool = False
    dropout: float = 0.0
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        choices = {"residual": RESIDUALS, "norm": ("layer", "rms"), "reduce": ("sum", "mean")}
        choices["coefficients"] = ("paper", "per_stream")
        for name, allowed in choices.items():
            self._require(getattr(self, name) in allowed, name, f"one of {', '.join(allowed)}")
        for name in ("expansion_rate", "vocab_size", "hidden_size", "num_layers", "num_heads"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.feed_forward is None or self.feed_forward >= 1, "feed_forward", "at least 1, or None")
        self._require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self._require(self.rope_base > 1, "rope_base", "above 1")
        even = self.hidden_size % (2 * self.num_heads) == 0
        self._require(even, "hidden_size", f"a multiple of 2·num_heads = {2 * self.num_heads} (rotary positions)")

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def inner_size(self) -> int:
        """Width of the MLP."""
        return self.feed_forward or 4 * self.hidden_size

    @property
    def weight_scale(self) -> float:
        """Standard deviation of fresh weights: 0.023 at width 768, as usual, and more for narrower models."""
        return math.sqrt(0.4 / self.hidden_size)

    @property
    def output_scale(self) -> float:
        """The same for the output projections of sublayers, 2 to a layer: their sum does not grow with depth."""
        streams = self.expansion_rate if self.rescale_outputs and self.residual != "plain" else 1
        return self.weight_scale * math.sqrt(streams / (2 * self.num_layers))


SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_layers": 6, "num_heads": 4, "vocab_size": 2048},  # for a CPU
    "small": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "vocab_size": 32000},
    "base": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "vocab_size": 32000},
    "large": {"hidden_size": 1536, "num_layers": 32, "num_heads": 16, "vocab_size": 32000},
}


def sized(size: str, **changes: Any) -> HyperLMConfig:
    """The configuration of a named size, one of ``SIZES``; ``changes`` are fields."""
    return dataclasses.replace(HyperLMConfig(**SIZES[size]), **changes)  # type: ignore[arg-type]
