"""Computes one routed target layer: messages, their gates, and the blend added before the FFN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlayer_ext.nn import HDIMMessage, QKVMessage

from .config import XLRBConfig


@dataclass(frozen=True)
class Routing:
    """Holds the router's choice for one target layer and a batch of B examples, k sources each.

    Attributes:
        indices: chosen source layers `[B, k]`.
        weights: their weights `[B, k]`, differentiable.
        logits: the router's logits over all n sources `[B, n]`.
        groups: for every chosen source layer its number and the examples `[rows]` that chose it.
        position: where slot s of example b (entry `s * B + b`) lies in the concatenation of all groups, `[k * B]`.
    """

    indices: Tensor
    weights: Tensor
    logits: Tensor
    groups: tuple[tuple[int, Tensor], ...]
    position: Tensor

    @classmethod
    def from_choice(cls, indices: Tensor, weights: Tensor, logits: Tensor) -> Routing:
        """Groups the examples by chosen source. Reads the counts on the host: one synchronization."""
        batch = indices.shape[0]
        flat = indices.t().reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=logits.shape[1]).tolist()
        rows = torch.split(order % batch, counts)
        groups = tuple((source, chosen) for source, chosen in enumerate(rows) if counts[source])
        return cls(indices, weights, logits, groups, torch.argsort(order))

    def slots(self, grouped: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Puts tensors computed per group, `[rows, ...]` each, back in order: k tensors `[B, ...]`, one per slot."""
        return torch.cat(list(grouped))[self.position].chunk(self.indices.shape[1])

    def blend(self, messages: Sequence[Tensor]) -> Tensor:
        """Returns the weighted sum of the k slots' messages `[B, S, H]`."""
        first, *rest = messages
        total = self._weighted(first, 0)
        for slot, message in enumerate(rest, start=1):
            total = total + self._weighted(message, slot)
        return total

    def _weighted(self, message: Tensor, slot: int) -> Tensor:
        return message * self.weights[:, slot, None, None].to(message.dtype)


class Gate(nn.Module):
    """Is a learned scalar, shape `[1]` (FSDP2 shards no zero-dimensional parameter), or its softplus."""

    def __init__(self, value: float, activation: str) -> None:
        super().__init__()
        self.softplus = activation == "softplus"
        self.raw = nn.Parameter(torch.tensor([math.log(math.expm1(value)) if self.softplus else value]))

    def forward(self) -> Tensor:
        return F.softplus(self.raw) if self.softplus else self.raw


class MessageBlend(nn.Module):
    """Computes `dropout(Linear(LayerNorm(α_attn·qkv + α_hdim·hdim)))`, or with the norm before the gates.

    With ``message_norm_match`` every message is first rescaled to a multiple of the attention output's norm.

    Args:
        config: the options.
        hidden_size: width H of the encoder.
    """

    def __init__(self, config: XLRBConfig, hidden_size: int) -> None:
        super().__init__()
        self.norm_match = config.message_norm_match
        kinds = {"attn": (config.use_qkv, config.gate_attn), "hdim": (config.use_hdim, config.gate_hdim)}
        used = {kind: value for kind, (present, value) in kinds.items() if present}
        self.gates = nn.ModuleDict({kind: Gate(value, config.gate_activation) for kind, value in used.items()})
        after = config.gate_position == "after_norm"
        self.message_norms = nn.ModuleDict({kind: nn.LayerNorm(hidden_size) for kind in used} if after else {})
        self.norm = nn.Identity() if after else nn.LayerNorm(hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        nn.init.normal_(self.output.weight, std=1e-3)
        nn.init.zeros_(self.output.bias)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def eps(self) -> float:
        """Returns the eps of the LayerNorm that follows the messages."""
        norms = [module for module in self.modules() if isinstance(module, nn.LayerNorm)]
        return norms[0].eps

    def forward(self, messages: dict[str, Tensor], attended: Tensor) -> Tensor:
        """Blends the messages (``attn`` and/or ``hdim``), each `[B, S, H]`, as `attended`; returns what to add."""
        gated = [self.gates[kind]() * self._scaled(kind, message, attended) for kind, message in messages.items()]
        blended = gated[0] if len(gated) == 1 else gated[0] + gated[1]
        return self.dropout(self.output(self.norm(blended)))

    def _scaled(self, kind: str, message: Tensor, attended: Tensor) -> Tensor:
        if kind in self.message_norms:
            message = self.message_norms[kind](message)
        if self.norm_match is None:
            return message
        length = message.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        return message * (self.norm_match * attended.norm(dim=-1, keepdim=True) / length)


def make_hdim(config: XLRBConfig, hidden_size: int) -> HDIMMessage:
    """Returns the HDIM message module that `config` asks for."""
    return HDIMMessage(
        hidden_size,
        proj_dim=config.proj_dim,
        mlp_dim=config.mlp_dim,
        scorer=config.scorer,
        activation=config.activation,
        fusion=config.fusion,
        value_activation=config.value_activation,
        share_projections=config.share_projections,
        norm_projections=config.norm_projections,
        temperature=config.token_temp,
        value_residual=config.value_residual,
        residual_beta=config.value_beta,
        dropout=config.dropout,
        alpha_init=config.gate_hdim,
    )


class TargetLayer(nn.Module):
    """Holds the bridge's own parameters for one target layer (a shared HDIM module is passed in at each call).

    Args:
        config: the options.
        hidden_size: width H of the encoder.
        num_heads: heads of the encoder's self-attention.
    """

    def __init__(self, config: XLRBConfig, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.from_source = config.qkv_weights == "source"
        self.wants_entropy = config.entropy_weight > 0
        self.qkv = (
            QKVMessage(
                num_heads,
                hidden_size // num_heads,
                dropout=config.dropout,
                extra_value_projection=config.qkv_extra_value,
            )
            if config.use_qkv
            else None
        )
        self.blend = MessageBlend(config, hidden_size)

    def qkv_message(
        self,
        layers: Any,
        layer: int,
        hidden: Tensor,
        chosen: Sequence[Tensor],
        routing: Routing,
        mask: Tensor,
    ) -> Tensor:
        """Computes the QKV message to `layer` `[B, S, H]`.

        `chosen` holds the groups of `routing`: source states `[rows, S, H]` of the examples that chose that source,
        so each source layer projects these rows only. `mask` `[B, S]` is True at real tokens.
        """
        assert self.qkv is not None
        attentions = [layers[source if self.from_source else layer].attention.self for source, _ in routing.groups]
        keys = routing.slots([attention.key(states) for attention, states in zip(attentions, chosen, strict=True)])
        values = routing.slots([attention.value(states) for attention, states in zip(attentions, chosen, strict=True)])
        query = layers[layer].attention.self.query(hidden)
        return routing.blend([self.qkv(query, k, v, key_mask=mask) for k, v in zip(keys, values, strict=True)])

    def hdim_message(
        self,
        hdim: HDIMMessage,
        hidden: Tensor,
        sources: Sequence[Tensor],
        routing: Routing,
        mask: Tensor,
        attn_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the HDIM message `[B, S, H]` and, where the loss needs it, the mean attention entropy (nats).

        `sources` are the k slots' states `[B, S, H]`; `attn_mask` `[B, S, S]` is True where a pair may act.
        """
        masks = {"key_mask": mask, "attn_mask": attn_mask}
        if not self.wants_entropy:
            return routing.blend([hdim(hidden, source, **masks) for source in sources]), None
        results = [hdim(hidden, source, **masks, return_entropy=True) for source in sources]
        entropy = torch.stack([entropy for _, entropy in results]).mean()
        return routing.blend([message for message, _ in results]), entropy
