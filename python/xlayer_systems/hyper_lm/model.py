"""A decoder-only transformer whose sublayers are joined by hyper-connections, or by plain residual connections.

Between sublayers travel the streams, the last branch output and the coefficients it will be written with. What a
sublayer leaves in the streams is thus computed together with what the next one reads: one pass over the streams, in the
forward of the block that owns the reading connection. Checkpointing or sharding block by block sees whole blocks.

Papers: Zhu et al., Hyper-Connections, ICLR 2025, arXiv 2409.19606; the manifold-constrained kind: arXiv 2512.24880.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xlayer_ext.functional import Connection, hyper_post_pre
from xlayer_ext.nn import expand_streams, no_weight_decay
from xlayer_systems.hf.pretrained import check_state, read_config, read_own, save_own
from xlayer_systems.hyper_lm.config import HyperLMConfig
from xlayer_systems.hyper_lm.generation import generate
from xlayer_systems.hyper_lm.layers import MLP, Attention, KeyValues, rotations
from xlayer_systems.hyper_lm.residual import make_connection
from xlayer_systems.training.optim import decay_groups

_CONFIG_FILE = "hyper_lm_config.json"
_WEIGHTS_FILE = "hyper_lm.safetensors"


class Block(nn.Module):
    """Is one layer: attention and MLP, each with a norm before it and a connection of its own."""

    def __init__(self, config: HyperLMConfig, index: int) -> None:
        super().__init__()
        self.attention_connection = make_connection(config, 2 * index)
        self.attention_norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.attention = Attention(config)
        self.mlp_connection = make_connection(config, 2 * index + 1)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        streams: Tensor,
        branch_output: Tensor | None,
        coefficients: Tensor | None,
        rotation: Tensor,
        past: KeyValues | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Maps the previous block's streams, branch output and coefficients (None: no previous block) to its own."""
        first, second = cast(Any, self.attention_connection), cast(Any, self.mlp_connection)
        if branch_output is None:
            x, coefficients = first.pre(streams)
        else:
            streams, x, coefficients = first.boundary(streams, branch_output, coefficients)
        branch_output = self.dropout(self.attention(self.attention_norm(x), rotation, past))
        streams, x, coefficients = second.boundary(streams, branch_output, coefficients)
        return streams, self.dropout(self.mlp(self.mlp_norm(x))), coefficients


class Readout(nn.Module):
    """Computes the last post and reduces the streams, as a boundary to a sublayer that reads their sum or mean."""

    coefficients: Tensor

    def __init__(self, config: HyperLMConfig) -> None:
        super().__init__()
        n = config.expansion_rate
        coefficients = torch.zeros(n, n + 2)
        coefficients[:, 0] = 1 if config.reduce == "sum" else 1 / n
        self.register_buffer("coefficients", coefficients, persistent=False)

    def forward(self, streams: Tensor, branch_output: Tensor, coefficients: Tensor | None) -> Tensor:
        """Returns one row per token, ``[B, S, d]``."""
        if coefficients is None:
            return streams + branch_output
        return hyper_post_pre(streams, branch_output, coefficients, Connection(self.coefficients))[1]


class HyperTransformer(nn.Module):
    """Is a language model: ``model(input_ids [B, S]) -> logits [B, S, V]``.

    Pre-norm, rotary positions, GELU, no biases, the embedding's weight also makes the logits. With the same seed every
    residual kind begins with the same weights, and computes the same function (up to rounding, and to the final norm's
    eps): connections draw no random numbers and begin as residual connections.

    Args:
        vocab_size, hidden_size, num_layers, num_heads, expansion_rate, use_tanh: as in :class:`HyperLMConfig`.
        static_weights: static hyper-connections instead of dynamic ones, where ``residual`` is not given.
        residual: ``plain``, ``shc``, ``dhc`` or ``mhc``.
        options: other fields of :class:`HyperLMConfig`.

    Raises:
        ValueError: a number out of range, or an unknown kind.

    Example::

        >>> model = HyperTransformer(vocab_size=100, hidden_size=64, num_layers=2, num_heads=4)
        >>> model(torch.randint(0, 100, (2, 8))).shape
        torch.Size([2, 8, 100])
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        expansion_rate: int = 4,
        use_tanh: bool = True,
        static_weights: bool = False,
        *,
        residual: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config = config = HyperLMConfig(
            residual=cast(Any, residual or ("shc" if static_weights else "dhc")),
            expansion_rate=expansion_rate,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            use_tanh=use_tanh,
            **options,
        )
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config, index) for index in range(config.num_layers)])
        self.readout = Readout(config)
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.gradient_checkpointing = False
        self._initialize()

    @classmethod
    def from_config(cls, config: HyperLMConfig) -> HyperTransformer:
        """Returns a model with fresh parameters."""
        return cls(**asdict(config))

    def forward(self, input_ids: Tensor, past: list[KeyValues] | None = None) -> Tensor:
        """Computes the logits ``[B, S, V]`` of the token after each of ``input_ids [B, S]``.

        ``past``, from `empty_past`, holds what every layer has seen of the tokens before; it grows by these.
        """
        x = self.embedding(input_ids)
        start = len(past[0]) if past else 0
        rotation = rotations(start, input_ids.shape[1], self.config.head_size, self.config.rope_base, x)
        streams = x if self.config.residual == "plain" else expand_streams(x, self.config.expansion_rate)
        branch_output, coefficients = None, None
        for index, block in enumerate(self.blocks):
            state = (streams, branch_output, coefficients, rotation, past[index] if past else None)
            if self.gradient_checkpointing and self.training:
                streams, branch_output, coefficients = checkpoint(block, *state, use_reentrant=False)
            else:
                streams, branch_output, coefficients = block(*state)
        return F.linear(self.norm(self.readout(streams, branch_output, coefficients)), self.embedding.weight)

    def empty_past(self) -> list[KeyValues]:
        """Returns the ``past`` of `forward` before the first token."""
        return [KeyValues() for _ in self.blocks]

    generate = generate

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes each block in backward instead of keeping its activations."""
        self.gradient_checkpointing = True

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for AdamW: weight decay on matrices and dynamic weights, none on norms, static weights and scales."""
        static = no_weight_decay(self)
        return decay_groups(
            self.named_parameters(),
            learning_rate,
            weight_decay,
            lambda name, _: name not in static and not name.endswith("norm.weight"),
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the parameters (safetensors) and the configuration (JSON) into ``directory``, made if missing."""
        save_own(Path(directory), self.state_dict(), _WEIGHTS_FILE, asdict(self.config), _CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> HyperTransformer:
        """Loads what `save_pretrained` wrote.

        Raises:
            ValueError: there is nothing to load, or weights and configuration do not fit each other.
        """
        directory = Path(directory)
        settings, state = read_own(directory, "hyper_lm model", _WEIGHTS_FILE, _CONFIG_FILE)
        model = cls.from_config(read_config(HyperLMConfig, settings, directory))
        check_state(state, model.state_dict(), directory)
        model.load_state_dict(state)
        return model

    def _initialize(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                scale = self.config.output_scale if name.endswith(".output") else self.config.weight_scale
                nn.init.normal_(module.weight, std=scale)
