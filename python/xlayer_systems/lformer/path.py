"""Defines the side path over the layers of a base model, and the heads that read its last state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlayer_ext.nn import DepthAttentionAggregator, EMAAggregator, GRUAggregator, TapProjector
from xlayer_systems.data.blocks import IGNORED
from xlayer_systems.lformer.config import ModelConfig

Aggregator = EMAAggregator | GRUAggregator | DepthAttentionAggregator


class SidePath(nn.Module):
    """Maps hidden states of a base to states of the side path: taps, projections, aggregation over depth.

    Args:
        config: kind and sizes.
        num_layers, hidden_size: of the base.
    """

    def __init__(self, config: ModelConfig, num_layers: int, hidden_size: int) -> None:
        super().__init__()
        self.taps = config.taps(num_layers)
        pooling = config.pooling if config.is_sequence_wise else None
        self.projector = TapProjector(
            len(self.taps), hidden_size, config.side_size, pooling=pooling, dropout=config.dropout
        )
        self.aggregator = make_aggregator(config, len(self.taps))

    def forward(self, hidden: Sequence[Tensor], mask: Tensor | None, last_only: bool = True) -> Tensor:
        """Maps ``num_layers + 1`` hidden states ``[B, S, hidden_size]`` to states ``[L, B, side_size]``.

        Per token they are ``[L, B, S, side_size]``. With ``last_only`` L is 1.
        """
        z = self.projector([hidden[tap] for tap in self.taps], mask)
        states: Tensor = self.aggregator(z, last_only=last_only)
        return states.unsqueeze(0) if last_only else states


class HeadOnlyPath(nn.Module):
    """Is the baseline without a side path: an MLP on the last hidden state, with as many parameters as a side path."""

    def __init__(self, config: ModelConfig, num_layers: int, hidden_size: int) -> None:
        super().__init__()
        like = dataclasses.replace(config, aggregator=config.equal_to)
        wanted = count(SidePath(like, num_layers, hidden_size))
        pooling = config.pooling if config.is_sequence_wise else None
        fixed = config.side_size + hidden_size * (pooling == "attention")
        width = max(1, round((wanted - fixed) / (hidden_size + 1 + config.side_size)))
        self.projector = TapProjector(1, hidden_size, width, pooling=pooling, dropout=config.dropout)
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(width, config.side_size))

    def forward(self, hidden: Sequence[Tensor], mask: Tensor | None, last_only: bool = True) -> Tensor:
        """Maps the last hidden state to one state, as `SidePath` does."""
        states: Tensor = self.mlp(self.projector([hidden[-1]], mask))
        return states


def make_aggregator(config: ModelConfig, num_layers: int) -> Aggregator:
    """Returns the aggregator that ``config`` names."""
    if config.aggregator == "gru":
        return GRUAggregator(num_layers, config.side_size)
    if config.aggregator == "attn":
        return DepthAttentionAggregator(
            num_layers, config.side_size, num_heads=config.aggregator_heads, window=config.window
        )
    return EMAAggregator(num_layers, config.side_size, tree_checkpoint=config.tree_checkpoint)


def make_path(config: ModelConfig, num_layers: int, hidden_size: int) -> SidePath | HeadOnlyPath:
    """Returns the side path, or its replacement in ``head_only``."""
    kind = HeadOnlyPath if config.aggregator == "head_only" else SidePath
    return kind(config, num_layers, hidden_size)


def count(module: nn.Module) -> int:
    """Counts the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


class Heads(nn.Module):
    """Predicts tool, value and plan from a state ``[B, side_size]``. Values are standardized inside (`calibrate`)."""

    value_mean: Tensor
    value_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.side_size)
        self.tool = nn.Linear(config.side_size, config.num_tools) if config.use_tool_head else None
        self.value = nn.Linear(config.side_size, 1) if config.use_value_head else None
        self.plan = PlanDecoder(config.side_size, config.num_steps, config.plan_length) if config.plan_decoder else None
        self.register_buffer("value_mean", torch.zeros(1))
        self.register_buffer("value_std", torch.ones(1))

    def calibrate(self, values: Tensor) -> None:
        """Takes mean and standard deviation from the values of the training examples."""
        self.value_mean.fill_(float(values.double().mean()))
        self.value_std.fill_(max(float(values.double().std()), 1e-6))

    def value_loss(self, predicted: Tensor, values: Tensor) -> Tensor:
        """Computes the mean squared error in standard deviations: 1 for always the mean. NaN: there is no value."""
        there = ~values.isnan()
        error = ((predicted - values.where(there, predicted)) / self.value_std).float()
        return error.square().sum() / there.sum().clamp(min=1)


class PlanDecoder(nn.Module):
    """Predicts a plan step by step: a recurrent unit that starts from the state and reads its own last step.

    Args:
        side_size: width of the state and of the unit.
        num_steps: steps are 0 … num_steps − 1; num_steps itself stands for start and end.
        length: steps of a plan at most.
    """

    def __init__(self, side_size: int, num_steps: int, length: int) -> None:
        super().__init__()
        self.end, self.length = num_steps, length
        self.embedding = nn.Embedding(num_steps + 1, side_size)
        self.unit = nn.GRU(side_size, side_size, batch_first=True)
        self.out = nn.Linear(side_size, num_steps + 1)

    def forward(self, state: Tensor, plan: Tensor) -> Tensor:
        """Computes the logits ``[B, P + 1, num_steps + 1]`` of every step of ``plan [B, P]``, and of the end behind
        it."""
        before = F.pad(plan.masked_fill(plan == IGNORED, self.end), (1, 0), value=self.end)
        said, _ = self.unit(self.embedding(before), state.unsqueeze(0).contiguous())
        logits: Tensor = self.out(said)
        return logits

    def loss(self, state: Tensor, plan: Tensor) -> Tensor:
        """Computes the cross-entropy in nats: the mean over the steps of a plan and its end, then over plans."""
        steps = plan != IGNORED
        lengths = steps.sum(1, keepdim=True)
        target = F.pad(plan, (0, 1), value=IGNORED).scatter(1, lengths, self.end)
        logits = self(state, plan).float()
        each = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=IGNORED, reduction="none")
        return (each.sum(1) / (lengths.squeeze(1) + 1)).mean()

    @torch.no_grad()
    def decode(self, state: Tensor) -> Tensor:
        """Returns the plan ``[B, length]`` by greedy decoding, −100 behind its end."""
        hidden = state.unsqueeze(0).contiguous()
        step = torch.full((len(state), 1), self.end, device=state.device)
        ended, steps = torch.zeros_like(step, dtype=torch.bool), []
        for _ in range(self.length):
            said, hidden = self.unit(self.embedding(step), hidden)
            step = self.out(said).argmax(-1)
            ended = ended | (step == self.end)
            steps.append(step.masked_fill(ended, IGNORED))
        return torch.cat(steps, 1)
