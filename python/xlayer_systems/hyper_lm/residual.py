"""Connections of the sublayers, one per sublayer: pre, post, and the boundary that is the post of the sublayer before
and the pre of this one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from xlayer_ext.nn import HyperConnection, ManifoldHyperConnection
from xlayer_systems.hyper_lm.config import HyperLMConfig


class Connection(Protocol):
    """Is the interface of the residual connection of a sublayer. Streams are ``[B, S, n, d]``, plain ``[B, S, d]``."""

    def pre(self, streams: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns what the sublayer reads ``[B, S, d]``, and the coefficients for its `post`."""

    def boundary(
        self, streams: Tensor, branch_output: Tensor, coefficients: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the post of the sublayer before, then `pre`: streams, branch input, coefficients."""


class PlainConnection(nn.Module):
    """Is the residual connection x + T(x), in the form of a hyper-connection with one stream and no coefficients."""

    def pre(self, streams: Tensor) -> tuple[Tensor, None]:
        return streams, None

    def boundary(
        self, streams: Tensor, branch_output: Tensor, coefficients: Tensor | None
    ) -> tuple[Tensor, Tensor, None]:
        streams = streams + branch_output
        return streams, streams, None


def make_connection(config: HyperLMConfig, layer_index: int) -> nn.Module:
    """Returns the connection of sublayer ``layer_index``, attention and MLP counted alike."""
    if config.residual == "plain":
        return PlainConnection()
    if config.residual == "mhc":
        return ManifoldHyperConnection(
            config.hidden_size,
            expansion_rate=config.expansion_rate,
            layer_index=layer_index,
            coefficients=config.coefficients,
        )
    return HyperConnection(
        config.hidden_size,
        expansion_rate=config.expansion_rate,
        layer_index=layer_index,
        static_weights=config.residual == "shc",
        use_tanh=config.use_tanh,
        norm=config.norm,
    )
