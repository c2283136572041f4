"""Selects the source layers whose messages a layer receives."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from xlayer_ext import functional as XF
from xlayer_ext.functional._checks import check_choice, check_floats, check_positive, check_shapes, check_sizes
from xlayer_ext.nn._reset import reset
from xlayer_ext.types import RouterPooling, RouterWeighting

WEIGHTINGS, POOLINGS = get_args(RouterWeighting), get_args(RouterPooling)


class LayerRouter(nn.Module):
    r"""Scores source layers per example and keeps the k best.

    .. math:: r_i = (W_q\, s(H_t) + b_q) \cdot (W_k\, s(H_i) + b_k) / \tau

    ``topk_softmax`` weights the k chosen sources by the softmax over their k scores. At k = 1 that is 1 with gradient
    exactly 0: such a router never learns. ``full_softmax`` weights each by its probability among all sources, which
    learns at any k.

    Args:
        hidden_size: H, width of the layers.
        route_dim: width of the router's query and key.
        top_k: k, sources kept per example.
        temperature: τ.
        weighting: ``"topk_softmax"`` or ``"full_softmax"``.
        pooling: how :meth:`summarize` turns tokens into a summary: ``"mean"`` over those that the mask allows, or
            ``"cls"``, the first token.
        query_mlp: :math:`W_q` is Linear(4H, 2H) → ReLU → Linear(2H, route_dim) on a sentence pair's summary
            (:meth:`pair_summary`).
        device, dtype: of the parameters.

    Shape:
        - target_summary ``[B, H]`` (``[B, 4H]`` with ``query_mlp``), source_summaries ``[n, B, H]``
        - indices int64 ``[B, min(k, n)]`` in descending order of score, weights alike, float32 at least

    Example::

        >>> router = LayerRouter(256, top_k=2, weighting="full_softmax")
        >>> layers = torch.randn(3, 8, 10, 256)
        >>> summaries = torch.stack([router.summarize(layer) for layer in layers])
        >>> indices, weights = router(router.summarize(torch.randn(8, 10, 256)), summaries)
        >>> indices.shape, weights.shape
        (torch.Size([8, 2]), torch.Size([8, 2]))
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        route_dim: int = 128,
        top_k: int = 1,
        temperature: float = 0.7,
        weighting: RouterWeighting = "topk_softmax",
        pooling: RouterPooling = "mean",
        query_mlp: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("weighting", weighting, WEIGHTINGS)
        check_choice("pooling", pooling, POOLINGS)
        check_positive(temperature=temperature)
        check_sizes(hidden_size=hidden_size, route_dim=route_dim, top_k=top_k)
        self.hidden_size, self.route_dim, self.top_k = hidden_size, route_dim, top_k
        self.temperature, self.weighting, self.pooling, self.query_mlp = temperature, weighting, pooling, query_mlp
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query: nn.Module = nn.Linear(hidden_size, route_dim, **factory)
        if query_mlp:
            wide = nn.Linear(4 * hidden_size, 2 * hidden_size, **factory)
            self.query = nn.Sequential(wide, nn.ReLU(), nn.Linear(2 * hidden_size, route_dim, **factory))
        self.key = nn.Linear(hidden_size, route_dim, **factory)

    def reset_parameters(self) -> None:
        """Draws the projections anew."""
        if self.query_mlp:  # the constructor makes the layer that the MLP replaces, and its draws come first
            nn.Linear(self.hidden_size, self.route_dim, device=self.key.weight.device, dtype=self.key.weight.dtype)
        reset(self.query, self.key)

    def forward(self, target_summary: Tensor, source_summaries: Tensor) -> tuple[Tensor, Tensor]:
        """Selects the k best of n sources for every example.

        Args:
            target_summary: ``[B, H]``, or ``[B, 4H]`` with ``query_mlp``.
            source_summaries: ``[n, B, H]``.

        Returns:
            Indices int64 ``[B, k]`` in descending order of score, and weights ``[B, k]``, float32 at least.

        Raises:
            TypeError: a summary is not floating point.
            ValueError: shapes disagree, or there are fewer than k sources.
        """
        logits = self.logits(target_summary, source_summaries)
        if self.top_k > logits.shape[1]:
            raise ValueError(f"top_k is {self.top_k}, but there are only {logits.shape[1]} source layers")
        return self.select(logits)

    def logits(self, target_summary: Tensor, source_summaries: Tensor) -> Tensor:
        """Computes scores ``[B, n]`` of all n sources, divided by the temperature, float32 at least."""
        check_floats(target_summary=target_summary, source_summaries=source_summaries)
        width = "4H" if self.query_mlp else "H"
        layouts = {"source_summaries": "n B H", "target_summary": f"B {width}"}
        check_shapes(layouts, source_summaries=source_summaries, target_summary=target_summary)
        query, keys = self.query(target_summary), self.key(source_summaries)
        # Scores decide between layers, so they are not left to a half-precision product.
        statistics = torch.promote_types(query.dtype, torch.float32)
        return (keys.to(statistics) * query.to(statistics)).sum(-1).t() / self.temperature

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Selects the best sources by their scores ``[B, n]``; returns indices and weights ``[B, min(k, n)]``.

        Takes all n where there are fewer than k, as a model's first layers need; calling the module refuses that.
        """
        best, indices = logits.topk(min(self.top_k, logits.shape[1]), dim=-1)
        if self.weighting == "topk_softmax":
            return indices, best.softmax(-1)
        return indices, logits.softmax(-1).gather(-1, indices)

    def summarize(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Summarizes ``[B, S, H] → [B, H]``: mean over the tokens that ``mask [B, S]`` allows, or the first token."""
        if self.pooling == "mean":
            return XF.masked_mean(hidden, mask)
        check_floats(hidden=hidden)
        check_shapes({"hidden": "B S H"}, hidden=hidden)
        return hidden[:, 0]

    def pair_summary(self, hidden: Tensor, mask_a: Tensor, mask_b: Tensor) -> Tensor:
        """Computes ``[a; b; |a − b|; a∘b]``, ``[B, 4H]``, of the means a and b of two sentences, for ``query_mlp``."""
        a, b = XF.masked_mean(hidden, mask_a), XF.masked_mean(hidden, mask_b)
        return torch.cat([a, b, (a - b).abs(), a * b], dim=-1)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, route_dim={self.route_dim}, top_k={self.top_k}, temperature={self.temperature}, "
            f"weighting={self.weighting!r}, pooling={self.pooling!r}, query_mlp={self.query_mlp}"
        )
