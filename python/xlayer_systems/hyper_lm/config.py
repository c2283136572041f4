"""Configuration and sizes of a hyper-connected language model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from xlayer_systems.training.options import check_fields, option

Residual = Literal["plain", "shc", "dhc", "mhc"]
RESIDUALS: tuple[str, ...] = get_args(Residual)


@dataclass(frozen=True)
class HyperLMConfig:
    """Defines a hyper-connected language model.

    Raises:
        ValueError: a value is out of range.
    """

    residual: Residual = option(
        "dhc",
        "connection of a sublayer: plain, x + T(x); shc and dhc, static and dynamic hyper-connections; mhc, "
        "manifold-constrained ones",
    )
    expansion_rate: int = option(4, "number of residual streams (unused by plain)", minimum=1)
    vocab_size: int = option(50257, "tokens of the vocabulary", minimum=1)
    hidden_size: int = option(768, "width of the model", minimum=1)
    num_layers: int = option(12, "transformer blocks", minimum=1)
    num_heads: int = option(12, "attention heads of a block", minimum=1)
    intermediate_size: int | None = option(
        None, "width of the MLP; none: 4 · hidden_size", minimum=1, earlier="feed_forward"
    )
    use_tanh: bool = option(True, "bound the dynamic coefficients of dhc by tanh")
    norm: Literal["layer", "rms"] = option("layer", "norm of the streams in dhc")
    coefficients: Literal["paper", "per_stream"] = option("paper", "coefficients of mhc, see ManifoldHyperConnection")
    reduce: Literal["sum", "mean"] = option("sum", "how the streams become one at the end: sum (the paper) or mean")
    rescale_outputs: bool = option(
        False,
        "initialize the output projections of attention and MLP with √n times their deviation, as in the paper; else "
        "every kind begins with the same weights",
    )
    dropout: float = option(0.0, "dropout of every sublayer's output", minimum=0, below=1)
    rope_base: float = option(10000.0, "base of the rotary position embedding", above=1)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hidden_size % (2 * self.num_heads):
            expected = f"a multiple of 2·num_heads = {2 * self.num_heads} (rotary positions)"
            raise ValueError(f"hidden_size must be {expected}, got {self.hidden_size}")

    @property
    def head_size(self) -> int:
        """Returns the features of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def inner_size(self) -> int:
        """Returns the width of the MLP."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def weight_scale(self) -> float:
        """Returns the standard deviation of fresh weights: 0.023 at width 768, and more for narrower ones."""
        return math.sqrt(0.4 / self.hidden_size)

    @property
    def output_scale(self) -> float:
        """Returns the deviation of output projections of sublayers, whose sum does not grow with depth."""
        streams = self.expansion_rate if self.rescale_outputs and self.residual != "plain" else 1
        return self.weight_scale * math.sqrt(streams / (2 * self.num_layers))


SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_layers": 6, "num_heads": 4, "vocab_size": 2048},  # for a CPU
    "small": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "vocab_size": 32000},
    "base": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "vocab_size": 32000},
    "large": {"hidden_size": 1536, "num_layers": 32, "num_heads": 16, "vocab_size": 32000},
}


def sized(size: str, **changes: Any) -> HyperLMConfig:
    """Returns the configuration of a named size, one of ``SIZES``; ``changes`` are fields."""
    return dataclasses.replace(HyperLMConfig(**SIZES[size]), **changes)  # type: ignore[arg-type]
