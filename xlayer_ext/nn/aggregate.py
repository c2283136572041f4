"""Modules for aggregation over depth: taps of the layers of a model, and three ways to aggregate them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlayer_ext import functional as XF
from xlayer_ext.functional._checks import (
    check_choice,
    check_common,
    check_floats,
    check_integer,
    check_mask,
    check_not_negative,
    check_sizes,
)
from xlayer_ext.nn._reset import reset
from xlayer_ext.types import TapPooling

POOLINGS = get_args(TapPooling)
INIT_LOGIT = -2.0  # of every gate: σ(−2) = 0.119


class TapProjector(nn.Module):
    r"""Projects every layer's output h for a side path:

    .. math:: z^l = \mathrm{Dropout}(W^l\, \mathrm{pool}(\mathrm{LayerNorm}(h^l)) + b^l)

    The LayerNorm has no affine part, which W and b would only repeat. The projections of all layers are one batched
    matrix product; pooling comes before it, because it is linear in the tokens.

    Args:
        num_layers: L, the number of tapped layers.
        hidden_size: their width.
        side_size: width of the side path.
        pooling: one vector per sequence: ``"mean"`` of its tokens, the ``"first"`` or ``"last"`` of them, or
            ``"attention"``, whose learned query per layer starts as the mean. None: one vector per token. BERT's first
            token has seen the sequence; in a decoder the last one has, and the first sees nothing but itself.
        dropout: of the projections.
        eps: of the LayerNorm.
        device, dtype: of the parameters.

    Shape:
        - taps: L tensors ``[B, S, hidden_size]``, or one ``[L, B, S, hidden_size]``
        - mask: bool ``[B, S]``, True where a token counts; the others may hold NaN. A sequence without a token that
          counts gives b.
        - the result is ``[L, B, side_size]``, or ``[L, B, S, side_size]`` without a pooling

    Raises:
        ValueError: sizes, shapes or options that do not fit.

    Example::

        >>> taps = [torch.randn(2, 7, 32) for _ in range(4)]
        >>> TapProjector(4, 32, 16)(taps).shape, TapProjector(4, 32, 16, pooling="last")(taps).shape
        (torch.Size([4, 2, 7, 16]), torch.Size([4, 2, 16]))
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        side_size: int,
        *,
        pooling: TapPooling | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_layers=num_layers, hidden_size=hidden_size, side_size=side_size)
        check_not_negative(eps=eps)
        if pooling is not None:
            check_choice("pooling", pooling, POOLINGS)
        self.num_layers, self.hidden_size, self.side_size, self.pooling, self.eps = (
            num_layers,
            hidden_size,
            side_size,
            pooling,
            eps,
        )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_layers, side_size, hidden_size, **factory))
        self.bias = nn.Parameter(torch.empty(num_layers, side_size, **factory))
        if pooling == "attention":
            self.query = nn.Parameter(torch.empty(num_layers, hidden_size, **factory))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts every layer's projection as a fresh ``nn.Linear``, and the query of ``"attention"`` at 0."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        if self.pooling == "attention":
            nn.init.zeros_(self.query)

    def forward(self, taps: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Projects the taps of all layers.

        Args:
            taps: L tensors ``[B, S, hidden_size]``, or one ``[L, B, S, hidden_size]``.
            mask: bool ``[B, S]``, True where a token counts.

        Returns:
            ``[L, B, side_size]``, or ``[L, B, S, side_size]`` without a pooling.

        Raises:
            TypeError: the taps are not floating-point tensors, or the mask is not bool.
            ValueError: the number of taps, their shapes or the mask's do not fit.
        """
        x = taps if isinstance(taps, Tensor) else _stacked(taps, self.num_layers, f"[B, S, {self.hidden_size}]")
        check_floats(taps=x)
        check_mask("mask", mask, x)
        if x.dim() != 4 or x.shape[0] != self.num_layers or x.shape[3] != self.hidden_size:
            raise ValueError(f"taps must have shape [{self.num_layers}, B, S, {self.hidden_size}], got {list(x.shape)}")
        if mask is not None:
            if mask.shape != x.shape[1:3]:
                raise ValueError(f"mask must have shape {list(x.shape[1:3])}, got {list(mask.shape)}")
            x = x.masked_fill(~mask[..., None], 0)
        rows = self._pool(x, mask).flatten(1, -2)
        z = torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight.transpose(1, 2))
        pooled = x.shape[1:3] if self.pooling is None else x.shape[1:2]
        return self.dropout(z.reshape(self.num_layers, *pooled, self.side_size))

    def _pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalizes and pools the taps to ``[L, B, hidden_size]``, or ``[L, B, S, hidden_size]`` without a pooling."""
        if self.pooling in ("first", "last"):
            x = self._edge(x, mask)
        x = F.layer_norm(x, (self.hidden_size,), eps=self.eps)
        if self.pooling == "mean":
            every = None if mask is None else mask.repeat(self.num_layers, 1)
            return XF.masked_mean(x.flatten(0, 1), every).unflatten(0, (self.num_layers, -1))
        if self.pooling == "attention":
            score = torch.einsum("lbsd,ld->lbs", x, self.query.to(x.dtype)) / math.sqrt(self.hidden_size)
            if mask is not None:
                # A row without an unmasked token attends to all of its zeros: no NaN in the backward.
                score = score.masked_fill(~(mask | ~mask.any(1, keepdim=True)), float("-inf"))
            return (score.softmax(-1).unsqueeze(-1).to(x.dtype) * x).sum(2)
        return x

    def _edge(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Selects the first or the last token that the mask allows, of every layer and sequence."""
        if mask is None:
            return x[:, :, 0 if self.pooling == "first" else -1]
        counts = mask.int() if self.pooling == "first" else mask.int().flip(1)
        position = counts.argmax(1)
        if self.pooling == "last":
            position = mask.shape[1] - 1 - position
        return x[:, torch.arange(len(mask), device=mask.device), position]

    def extra_repr(self) -> str:
        return (
            f"{self.num_layers}, hidden_size={self.hidden_size}, side_size={self.side_size}, pooling={self.pooling!r}"
        )


def _stacked(taps: Sequence[Tensor], num_layers: int, shape: str) -> Tensor:
    """Stacks the taps of all layers to one tensor."""
    if not isinstance(taps, Sequence) or not all(isinstance(tap, Tensor) for tap in taps):
        raise TypeError(f"taps must be a tensor or a sequence of tensors, got {type(taps).__name__}")
    if len(taps) != num_layers or any(tap.shape != taps[0].shape for tap in taps):
        shapes = ", ".join(str(list(tap.shape)) for tap in taps) or "none"
        raise ValueError(f"taps must be {num_layers} tensors {shape} of one shape, got {shapes}")
    check_common(**{f"taps[{index}]": tap for index, tap in enumerate(taps)})
    return torch.stack(list(taps))


class _Aggregator(nn.Module):
    """Base of the kinds: maps taps ``[L, ..., d]`` to states ``[L, ..., d]``, or to the last one."""

    num_layers: int
    hidden_size: int

    @property
    def gates(self) -> Tensor | None:
        """Returns the gates of the layers' taps, ``[L]`` in (0, 1); None where every token has its own."""
        return None

    def gate_penalty(self, l1: float = 0.0, l2: float = 0.0) -> Tensor:
        r"""Computes a sparsity penalty of the gates: :math:`l_1 \sum_l \alpha^l + l_2 \sum_l (\alpha^l)^2`.

        Raises:
            ValueError: this kind has no gates of its own to be penalized.
        """
        gates = self._all_gates()
        if gates is None:
            raise ValueError(f"{type(self).__name__} has no gates per layer: l1 and l2 are for EMAAggregator")
        return l1 * gates.sum() + l2 * gates.square().sum()

    def forward(self, taps: Tensor | Sequence[Tensor], last_only: bool = False) -> Tensor:
        """Aggregates the taps over depth.

        Args:
            taps: ``[L, ..., d]``, or L tensors ``[..., d]``, which are stacked.
            last_only: return the last layer's state alone.

        Returns:
            The state after every layer, ``[L, ..., d]``, or the last one, ``[..., d]``.

        Raises:
            TypeError: the taps are not floating-point tensors.
            ValueError: the number of taps or their shapes do not fit.
        """
        if not isinstance(taps, Tensor):
            taps = _stacked(taps, self.num_layers, f"[..., {self.hidden_size}]")
        check_floats(taps=taps)
        if taps.dim() < 2 or taps.shape[0] != self.num_layers or taps.shape[-1] != self.hidden_size:
            raise ValueError(
                f"taps must have shape [{self.num_layers}, ..., {self.hidden_size}], got {list(taps.shape)}"
            )
        return self._aggregate(taps, last_only)

    def extra_repr(self) -> str:
        return f"{self.num_layers}, hidden_size={self.hidden_size}"

    def _aggregate(self, taps: Tensor, last_only: bool) -> Tensor:
        raise NotImplementedError

    def _all_gates(self) -> Tensor | None:
        return None


class EMAAggregator(_Aggregator):
    r"""Averages the taps over depth with gates, after an MLP φ that all layers share.

    .. math::
        S^l = (1 - \alpha^l)\, S^{l-1} + \alpha^l\, \phi(z^l), \qquad \alpha^l = \sigma(a^l), \qquad S^0 = 0

    φ is Linear(d, 4d), GELU, LayerNorm, Linear(4d, d), LayerNorm. It runs on the taps of all layers at once; its last
    LayerNorm is computed inside the scan. The gates start at σ(−2) = 0.119.

    With ``tree_checkpoint`` k the state after every k-th layer is kept, and a second average of the same kind runs over
    the kept states: :math:`T^m = (1-\beta^m)\, T^{m-1} + \beta^m\, S^{mk}`. Layer l's state is then
    :math:`S^l + T^{\lfloor l/k \rfloor}`: what is recent, and what was kept.

    Args:
        num_layers: number of taps, L.
        hidden_size: width of taps and states, d.
        expansion: of φ.
        tree_checkpoint: k, 0 for none.
        eps: of the LayerNorms.
        device, dtype: of the parameters.

    Shape:
        - taps: ``[L, ..., d]``, as :class:`TapProjector` gives them, or a list of L tensors ``[..., d]``
        - the result is ``[L, ..., d]``, or ``[..., d]`` with ``last_only``

    Paper: Yu et al., Deep Layer Aggregation, CVPR 2018, arXiv 1707.06484.

    Example::

        >>> aggregator = EMAAggregator(4, 16)
        >>> aggregator(torch.randn(4, 2, 16)).shape, aggregator.gates
        (torch.Size([4, 2, 16]), tensor([0.1192, 0.1192, 0.1192, 0.1192]))
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        expansion: int = 4,
        tree_checkpoint: int = 0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_layers=num_layers, hidden_size=hidden_size, expansion=expansion)
        check_not_negative(eps=eps)
        check_integer("tree_checkpoint", tree_checkpoint)
        if not 0 <= tree_checkpoint <= num_layers:
            raise ValueError(f"tree_checkpoint must be between 0 and num_layers = {num_layers}, got {tree_checkpoint}")
        self.num_layers, self.hidden_size, self.tree_checkpoint, self.eps = (
            num_layers,
            hidden_size,
            tree_checkpoint,
            eps,
        )
        self.expansion, inner = expansion, expansion * hidden_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.phi = nn.Sequential(
            nn.Linear(hidden_size, inner, **factory),
            nn.GELU(),
            nn.LayerNorm(inner, eps, **factory),
            nn.Linear(inner, hidden_size, **factory),
        )
        self.norm_weight = nn.Parameter(torch.empty(hidden_size, **factory))
        self.norm_bias = nn.Parameter(torch.empty(hidden_size, **factory))
        self.gate_logits = nn.Parameter(torch.empty(num_layers, **factory))
        if tree_checkpoint:
            self.tree_gate_logits = nn.Parameter(torch.empty(num_layers // tree_checkpoint, **factory))
        self._reset_own()

    def reset_parameters(self) -> None:
        """Draws the layers of φ anew; its norms start as the identity, the gates at σ(−2)."""
        reset(self.phi)
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        nn.init.constant_(self.gate_logits, INIT_LOGIT)
        if self.tree_checkpoint:
            nn.init.constant_(self.tree_gate_logits, INIT_LOGIT)

    @property
    def gates(self) -> Tensor:
        return self.gate_logits.detach().sigmoid()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tree_checkpoint={self.tree_checkpoint}, expansion={self.expansion}"

    def _aggregate(self, taps: Tensor, last_only: bool) -> Tensor:
        k = self.tree_checkpoint
        states = XF.ema_scan(
            self.phi(taps), self.gate_logits, norm_weight=self.norm_weight, norm_bias=self.norm_bias, eps=self.eps,
            last_only=last_only and not k,
        )  # fmt: skip
        if not k:
            return states
        kept = XF.ema_scan(states[k - 1 :: k], self.tree_gate_logits, last_only=last_only)
        if last_only:
            return states[-1] + kept
        kept = torch.cat([torch.zeros_like(kept[:1]), kept])
        layer = torch.arange(1, self.num_layers + 1, device=states.device)
        return states + kept[layer // k]

    def _all_gates(self) -> Tensor:
        if not self.tree_checkpoint:
            return self.gate_logits.sigmoid()
        return torch.cat([self.gate_logits, self.tree_gate_logits]).sigmoid()


class GRUAggregator(_Aggregator):
    r"""A gated recurrent unit that treats depth as time: :math:`S^l = \mathrm{GRU}(z^l, S^{l-1})`, :math:`S^0 = 0`.

    Parameters have the names, shapes and start of :class:`torch.nn.GRUCell`'s; the input's products of all layers are
    one matrix product. Its gates depend on the token, so ``gates`` is None.

    Args:
        num_layers: number of taps, L.
        hidden_size: d, of taps and states.
        device, dtype: of the parameters.

    Shape:
        - as in :class:`EMAAggregator`

    Paper: Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014, arXiv 1406.1078.

    Example::

        >>> GRUAggregator(4, 16)(torch.randn(4, 2, 16), last_only=True).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_layers=num_layers, hidden_size=hidden_size)
        self.num_layers, self.hidden_size = num_layers, hidden_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, hidden_size, **factory))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size, **factory))
        self.bias_ih = nn.Parameter(torch.empty(3 * hidden_size, **factory))
        self.bias_hh = nn.Parameter(torch.empty(3 * hidden_size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters as a fresh ``nn.GRUCell``."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_cell(cls, cell: nn.GRUCell, num_layers: int) -> GRUAggregator:
        """Makes the same unit with a copy of the cell's parameters.

        Raises:
            ValueError: the cell has no biases, or reads another width than that of its state.
        """
        if not cell.bias or cell.input_size != cell.hidden_size:
            got = f"GRUCell({cell.input_size}, {cell.hidden_size}, bias={cell.bias})"
            raise ValueError(f"cell must have biases and read the width of its state, got {got}")
        made = cls(num_layers, cell.hidden_size, device=cell.weight_ih.device, dtype=cell.weight_ih.dtype)
        made.load_state_dict(cell.state_dict())
        return made

    def _aggregate(self, taps: Tensor, last_only: bool) -> Tensor:
        states = XF.depth_gru(taps, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return states[-1] if last_only else states


class DepthAttentionAggregator(_Aggregator):
    r"""A state that attends, layer by layer, to its last taps:
    :math:`S^l = S^{l-1} + W_o\,\mathrm{Attention}(W_q S^{l-1};\ z^{l-m+1} \dots z^l)`, :math:`S^0 = 0`.

    Args:
        num_layers: number of taps, L.
        hidden_size: d, of taps and states; a multiple of ``num_heads``.
        num_heads: attention heads.
        window: m, the number of taps that a layer's state attends to, its own included.
        device, dtype: of the parameters.

    Shape:
        - as in :class:`EMAAggregator`

    Paper: Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762.

    Example::

        >>> DepthAttentionAggregator(4, 16, num_heads=2, window=3)(torch.randn(4, 2, 16)).shape
        torch.Size([4, 2, 16])
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        num_heads: int = 4,
        window: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_layers=num_layers, hidden_size=hidden_size, num_heads=num_heads, window=window)
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads = {num_heads}, got {hidden_size}")
        self.num_layers, self.hidden_size, self.num_heads, self.window = num_layers, hidden_size, num_heads, window
        self.weight_query, self.weight_key, self.weight_value, self.weight_out = (
            nn.Parameter(torch.empty(hidden_size, hidden_size, device=device, dtype=dtype)) for _ in range(4)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all four weights by Xavier's uniform rule."""
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_heads={self.num_heads}, window={self.window}"

    def _aggregate(self, taps: Tensor, last_only: bool) -> Tensor:
        weights = (self.weight_query, self.weight_key, self.weight_value, self.weight_out)
        states = XF.depth_attention(taps, *weights, num_heads=self.num_heads, window=self.window)
        return states[-1] if last_only else states
