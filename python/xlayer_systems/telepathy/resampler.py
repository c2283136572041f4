r"""Parts of a bridge from the hidden states of one language model to the input embeddings of another.

:class:`StatisticalNormalizer` gives the source's numbers the target's scale, :class:`PerceiverResampler` makes a fixed
number of soft tokens of any number of states, :class:`RMSScale` or :class:`TanhScale` bounds them to what the target's
embeddings look like.

Papers: Perceiver: Jaegle et al., 2021, arXiv 2103.03206; its resampler: Alayrac et al., Flamingo, 2022, arXiv
2204.14198.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlayer_systems.telepathy.checks import check_floats, check_number, check_sizes, check_states
from xlayer_systems.telepathy.initialization import draw_normal, reset


class StatisticalNormalizer(nn.Module):
    r"""Whitens each feature of the source and gives it the target's mean and deviation.

    :math:`y = \frac{x - \mu_s}{\sigma_s + \epsilon} \sigma_t + \mu_t`. Where the widths differ the target's statistics
    are two numbers, over its whole embedding table. Starts as the identity; :meth:`calibrate` measures.

    Args:
        source_dim: width of the source's states.
        target_dim: width of the target's embeddings.
        learnable: whether the four are parameters; else they are buffers.
        eps: added to the deviation.
    """

    source_mean: Tensor
    source_std: Tensor
    target_mean: Tensor
    target_std: Tensor

    def __init__(self, source_dim: int, target_dim: int, learnable: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        check_sizes(source_dim=source_dim, target_dim=target_dim)
        check_number("eps", eps, minimum=0)
        self.eps = eps
        target = source_dim if source_dim == target_dim else 1
        for name, size in (("source", source_dim), ("target", target)):
            for suffix in ("mean", "std"):
                value = torch.empty(size)
                if learnable:
                    self.register_parameter(f"{name}_{suffix}", nn.Parameter(value))
                else:
                    self.register_buffer(f"{name}_{suffix}", value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forgets what was measured: means 0 and deviations 1, the identity."""
        for mean in (self.source_mean, self.target_mean):
            nn.init.zeros_(mean)
        for deviation in (self.source_std, self.target_std):
            nn.init.ones_(deviation)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes ``[..., source_dim]``; the same shape and dtype, float32 inside."""
        check_floats(x=x)
        width = len(self.source_mean)
        if x.dim() < 1 or x.shape[-1] != width:
            raise ValueError(f"x must have shape [..., {width}], got {list(x.shape)}")
        whitened = (x.float() - self.source_mean) / (self.source_std + self.eps)
        return (whitened * self.target_std + self.target_mean).to(x.dtype)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[tuple[Tensor, Tensor | None]], target_embeddings: Tensor) -> None:
        """Measures both sides.

        Args:
            batches: (states ``[B, T, source_dim]``, bool mask ``[B, T]`` or None); what is masked may hold anything.
            target_embeddings: ``[V, target_dim]``.

        Raises:
            ValueError: no state was counted.
        """
        count, mean, spread = 0, torch.zeros(()), torch.zeros(())
        for states, mask in batches:
            rows = (states.flatten(0, -2) if mask is None else states[mask]).double()
            if not len(rows):
                continue
            # Chan's rule for joining two samples: no sum of squares that could cancel.
            own, total = rows.mean(0), count + len(rows)
            shift = own - mean.to(own.device)
            spread = spread.to(own.device) + (rows - own).square().sum(0) + shift.square() * count * len(rows) / total
            mean, count = mean.to(own.device) + shift * len(rows) / total, total
        if not count:
            raise ValueError("calibration needs at least one state that its mask counts, got none")
        table = target_embeddings.double()
        if len(self.target_mean) == 1:
            table = table.reshape(-1, 1)
        self.source_mean.copy_(mean)
        self.source_std.copy_((spread / count).sqrt())
        self.target_mean.copy_(table.mean(0))
        self.target_std.copy_(table.std(0, unbiased=False))


class PerceiverResampler(nn.Module):
    """Resamples any number of states to K soft tokens: learned queries attend to them, block after block.

    Args:
        source_dim: width of the states.
        target_dim: width of the soft tokens.
        soft_tokens: number of soft tokens, K.
        num_layers: number of blocks.
        num_heads: of every attention; must divide ``hidden_size``.
        mlp_ratio: width of the feed-forward layers, in times of ``hidden_size``.
        hidden_size: width inside; by default that of the target.
    """

    def __init__(
        self,
        source_dim: int,
        target_dim: int,
        soft_tokens: int,
        num_layers: int = 4,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        hidden_size: int | None = None,
    ) -> None:
        super().__init__()
        hidden_size = target_dim if hidden_size is None else hidden_size
        check_sizes(source_dim=source_dim, target_dim=target_dim, soft_tokens=soft_tokens)
        check_sizes(num_heads=num_heads, hidden_size=hidden_size)
        check_number("mlp_ratio", mlp_ratio, above=0)
        if hidden_size % num_heads:
            raise ValueError(f"num_heads must divide the width {hidden_size}, got {num_heads}")
        self.queries = nn.Parameter(torch.empty(soft_tokens, hidden_size))
        self._draw_queries()
        self.project = nn.Linear(source_dim, hidden_size)
        self.source_norm = nn.LayerNorm(hidden_size)
        self.blocks = nn.ModuleList(ResamplerBlock(hidden_size, num_heads, mlp_ratio) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.out = nn.Linear(hidden_size, target_dim)

    def reset_parameters(self) -> None:
        """Draws the queries anew, each of length near 1, and then all layers as PyTorch does."""
        self._draw_queries()
        reset(*self.children())

    def _draw_queries(self) -> None:
        draw_normal(self.queries, self.queries.shape[1] ** -0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps states ``[B, T, source_dim]`` and bool ``[B, T]``, True = may be read, to ``[B, K, target_dim]``.

        A row whose mask allows nothing reads nothing: its soft tokens are the same for all inputs.
        """
        check_states(x, mask, self.project.in_features)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, torch.zeros_like(x))  # a masked state may hold NaN
        source = self.source_norm(self.project(x))
        hidden = self.queries.expand(len(x), -1, -1)
        for block in self.blocks:
            hidden = block(hidden, source, mask)
        out: Tensor = self.out(self.norm(hidden))
        return out


class ResamplerBlock(nn.Module):
    """Applies attention to the source, attention among the queries and feed-forward, each with norm and residual."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.cross_norm, self.self_norm, self.mlp_norm = (nn.LayerNorm(hidden_size) for _ in range(3))
        self.cross_attention, self.self_attention = Attention(hidden_size, num_heads), Attention(hidden_size, num_heads)
        self.mlp = feed_forward(hidden_size, mlp_ratio)

    def forward(self, hidden: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """Maps ``[B, K, hidden_size]`` and ``[B, T, hidden_size]`` to ``[B, K, hidden_size]``."""
        hidden = hidden + self.cross_attention(self.cross_norm(hidden), source, mask)
        normed = self.self_norm(hidden)
        hidden = hidden + self.self_attention(normed, normed)
        out: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return out


class Attention(nn.Module):
    """Computes multi-head attention of ``query [B, K, d]`` to ``source [B, T, d]`` (Vaswani et al., 2017)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, query: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends where ``mask``, bool ``[B, T]``, is True; the result is 0 where a row may read nothing."""
        key, value = self.key_value(source).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query(query), key, value))
        allowed = None
        if mask is not None:
            # Rows without an unmasked state attend to all, and their result is dropped: no NaN in the backward.
            reads = mask.any(1)
            allowed = (mask | ~reads.unsqueeze(1))[:, None, None, :]
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        out: Tensor = self.out(context.transpose(1, 2).flatten(2))
        return out if mask is None else out * reads[:, None, None]


class RMSScale(nn.Module):
    """Computes ``x / rms(x) · scale`` over the last dimension: whatever grows, the output's size does not.

    Args:
        target_rms: where the learned scale starts; the root mean square of the target's embeddings.
        eps: added to the mean square.
    """

    def __init__(self, target_rms: float, eps: float = 1e-8) -> None:
        super().__init__()
        check_number("target_rms", target_rms)
        check_number("eps", eps, minimum=0)
        self.target_rms, self.eps = target_rms, eps
        self.scale = nn.Parameter(torch.empty(1))  # one element: FSDP2 refuses 0-dim parameters
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the scale to ``target_rms``."""
        nn.init.constant_(self.scale, self.target_rms)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., d]`` to the same shape and dtype."""
        check_floats(x=x)
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.scale).to(x.dtype)


class TanhScale(nn.Module):
    """Computes ``tanh(x) · scale``: every number stays within ± scale. Large inputs saturate, and learn nothing.

    Args:
        target_rms: where the learned scale starts.
    """

    def __init__(self, target_rms: float) -> None:
        super().__init__()
        check_number("target_rms", target_rms)
        self.target_rms = target_rms
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the scale to ``target_rms``."""
        nn.init.constant_(self.scale, self.target_rms)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., d]`` to the same shape and dtype."""
        check_floats(x=x)
        return (x.float().tanh() * self.scale).to(x.dtype)


def feed_forward(hidden_size: int, ratio: float) -> nn.Sequential:
    """Makes Linear, GELU, Linear."""
    inner = int(hidden_size * ratio)
    return nn.Sequential(nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, hidden_size))
