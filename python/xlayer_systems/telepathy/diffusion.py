r"""A diffusion bridge: soft tokens drawn by a rectified flow that is conditioned on another model's hidden states.

Regression to an ambiguous target gives the mean of all answers, which lies where no embedding does; a flow ends on one
of them. With noise :math:`x_0 \sim N(0, 1)`, target :math:`x_1` and :math:`x_t = t x_1 + (1 - t) x_0` the network
learns the velocity :math:`x_1 - x_0`; sampling integrates it from noise.

Papers: rectified flow: Liu et al., 2022, arXiv 2209.03003; DiT and AdaLN-Zero: Peebles and Xie, 2022, arXiv 2212.09748.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlayer_systems.telepathy.checks import check_floats, check_integer, check_number, check_sizes, check_states
from xlayer_systems.telepathy.initialization import ZeroLinear, draw_normal, reset
from xlayer_systems.telepathy.resampler import Attention, feed_forward

CONDITIONINGS = ("pooled", "cross", "hybrid")
INIT_DEVIATION = 0.02  # of positions and of the query that pools
MAX_STEPS = 1000  # of sampling: the embedding of times resolves no more


class DiffusionBridge(nn.Module):
    """Draws soft tokens ``[B, K, target_dim]`` from hidden states ``[B, T, source_dim]``.

    Args:
        source_dim: width of the states.
        target_dim: width of the soft tokens.
        soft_tokens: number of soft tokens, K.
        hidden_size: width inside.
        num_layers: number of DiT blocks.
        num_heads: of every attention; must divide ``hidden_size``.
        conditioning: ``"pooled"``: the mean state joins the timestep in every block's AdaLN; ``"cross"``: blocks attend
            to all states, AdaLN gets the timestep alone; ``"hybrid"``: both, the states pooled by a learned query.
        target_scale: what targets are divided by, about their root mean square, so that noise of 1 fits them.
    """

    target_scale: Tensor

    def __init__(
        self,
        source_dim: int,
        target_dim: int,
        soft_tokens: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        conditioning: str = "hybrid",
        target_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning must be one of {', '.join(CONDITIONINGS)}; got {conditioning!r}")
        check_sizes(source_dim=source_dim, target_dim=target_dim, soft_tokens=soft_tokens)
        check_sizes(hidden_size=hidden_size, num_heads=num_heads)
        check_number("target_scale", target_scale, above=0)
        if hidden_size % num_heads or hidden_size % 2:
            raise ValueError(f"hidden_size must be even and a multiple of num_heads = {num_heads}, got {hidden_size}")
        self.source_dim, self.soft_tokens, self.target_dim = source_dim, soft_tokens, target_dim
        self.hidden_size, self.conditioning = hidden_size, conditioning
        self.init_target_scale = float(target_scale)
        self.register_buffer("target_scale", torch.empty(()))
        nn.init.constant_(self.target_scale, self.init_target_scale)
        self.source = nn.Sequential(nn.Linear(source_dim, hidden_size), nn.LayerNorm(hidden_size))
        self.enter = nn.Linear(target_dim, hidden_size)
        self.positions = nn.Parameter(torch.empty(soft_tokens, hidden_size))
        draw_normal(self.positions, INIT_DEVIATION)
        self.time = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        if conditioning == "hybrid":
            self.gist = nn.Parameter(torch.empty(1, hidden_size))
            draw_normal(self.gist, INIT_DEVIATION)
            self.pool = Attention(hidden_size, num_heads)
        crosses = conditioning != "pooled"
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, crosses) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        # AdaLN-Zero: the velocity starts as 0.
        self.modulation = ZeroLinear(hidden_size, 2 * hidden_size)
        self.leave = ZeroLinear(hidden_size, target_dim)

    def reset_parameters(self) -> None:
        """Draws all parts anew, in the constructor's order, and sets the target's scale to that which it was given."""
        nn.init.constant_(self.target_scale, self.init_target_scale)
        reset(self.source, self.enter)
        draw_normal(self.positions, INIT_DEVIATION)
        reset(self.time)
        if self.conditioning == "hybrid":
            draw_normal(self.gist, INIT_DEVIATION)
            reset(self.pool)
        reset(self.blocks, self.norm, self.modulation, self.leave)

    def forward(self, x: Tensor, mask: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        """Computes the velocity ``[B, K, target_dim]`` at ``x_t [B, K, target_dim]`` and times ``t [B]`` in [0, 1]."""
        check_floats(x_t=x_t, t=t)
        source, pooled = self._condition(x, mask)
        if x_t.shape != (len(x), self.soft_tokens, self.target_dim):
            wanted = f"x_t must have shape {[len(x), self.soft_tokens, self.target_dim]}"
            raise ValueError(f"{wanted}, got {list(x_t.shape)}")
        if t.shape != (len(x),):
            raise ValueError(f"t must have shape {[len(x)]}, got {list(t.shape)}")
        return self._velocity(source, mask, pooled, x_t, t)

    def loss(self, x: Tensor, mask: Tensor | None, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns the mean squared error of the velocity at a random time and noise for each element of the batch.

        Args:
            x: states ``[B, T, source_dim]``.
            mask: bool ``[B, T]``, True = may be read.
            target: ``[B, K, target_dim]``.
            generator: of times and noise.
        """
        check_floats(target=target)
        if target.dim() != 3 or target.shape[1:] != (self.soft_tokens, self.target_dim):
            wanted = f"target must have shape [B, {self.soft_tokens}, {self.target_dim}]"
            raise ValueError(f"{wanted}, got {list(target.shape)}")
        goal = target / self.target_scale
        noise = _noise(goal.shape, goal, generator)
        t = torch.rand(len(goal), generator=generator, device=_device(goal, generator)).to(goal)
        x_t = t[:, None, None] * goal + (1 - t[:, None, None]) * noise
        return F.mse_loss(self(x, mask, x_t, t).float(), (goal - noise).float())

    def sample(
        self, x: Tensor, mask: Tensor | None = None, steps: int = 10, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws soft tokens ``[B, K, target_dim]`` by Euler's method from noise; differentiable.

        The same generator state gives the same bits.

        Raises:
            ValueError: ``steps`` is not between 1 and 1000.
        """
        check_integer("steps", steps, 1, MAX_STEPS)
        source, pooled = self._condition(x, mask)
        x_t = _noise((len(x), self.soft_tokens, self.target_dim), x, generator)
        for step in range(steps):
            t = torch.full((len(x),), step / steps, dtype=x_t.dtype, device=x_t.device)
            x_t = x_t + self._velocity(source, mask, pooled, x_t, t) / steps
        return x_t * self.target_scale

    def _condition(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the states as blocks read them, and what joins the timestep."""
        check_states(x, mask, self.source_dim)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, torch.zeros_like(x))  # a masked state may hold NaN
        source = self.source(x)
        if self.conditioning == "cross":
            return source, None
        if self.conditioning == "hybrid":
            return source, self.pool(self.gist.expand(len(x), 1, -1), source, mask).squeeze(1)
        if mask is None:
            return source, source.mean(1)
        kept = source * mask.unsqueeze(-1)
        return source, kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def _velocity(self, source: Tensor, mask: Tensor | None, pooled: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        condition = self.time(timestep_embedding(t, self.hidden_size).to(source.dtype))
        if pooled is not None:
            condition = condition + pooled
        hidden = self.enter(x_t) + self.positions
        for block in self.blocks:
            hidden = block(hidden, condition, source, mask)
        shift, scale = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, -1)
        out: Tensor = self.leave(self.norm(hidden) * (1 + scale) + shift)
        return out


class DiTBlock(nn.Module):
    """Applies self-attention, attention to the source and feed-forward, modulated and gated by the condition."""

    def __init__(self, hidden_size: int, num_heads: int, crosses: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size, elementwise_affine=False) for _ in range(2))
        self.attention = Attention(hidden_size, num_heads)
        self.mlp = feed_forward(hidden_size, 4.0)
        self.modulation = ZeroLinear(hidden_size, 6 * hidden_size)
        if crosses:
            self.cross_norm, self.cross_attention = nn.LayerNorm(hidden_size), Attention(hidden_size, num_heads)

    def forward(self, hidden: Tensor, condition: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """Computes the velocity ``[B, K, target_dim]`` at ``x_t [B, K, target_dim]`` and times ``t [B]`` in [0, 1]."""
        parts = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, -1)
        normed = self.norms[0](hidden) * (1 + parts[1]) + parts[0]
        hidden = hidden + parts[2] * self.attention(normed, normed)
        if hasattr(self, "cross_attention"):
            hidden = hidden + self.cross_attention(self.cross_norm(hidden), source, mask)
        out: Tensor = hidden + parts[5] * self.mlp(self.norms[1](hidden) * (1 + parts[4]) + parts[3])
        return out


def timestep_embedding(t: Tensor, hidden_size: int, longest: float = 10_000.0) -> Tensor:
    """Computes sines and cosines of ``t [B]`` in [0, 1], ``[B, hidden_size]``, at half as many frequencies, from 1000
    down to 1000 / longest."""
    half = hidden_size // 2
    frequencies = torch.exp(-math.log(longest) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = 1000 * t.float().unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _device(like: Tensor, generator: torch.Generator | None) -> torch.device:
    return like.device if generator is None else generator.device


def _noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, device=_device(like, generator)).to(like)
