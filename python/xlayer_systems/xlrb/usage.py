"""Records and plots the bridges' gates, message norms and routing per target layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlayer_systems.reporting.plots import draw_layers, name_ticks

from .target import MessageBlend, Routing

KINDS = ("attn", "hdim")


class LayerUsage:
    """Accumulates sums for one target layer on the device: adding to them never waits for it.

    Args:
        num_sources: number of sources the layer can choose from.
    """

    def __init__(self, num_sources: int) -> None:
        self.num_sources = num_sources
        self.gates: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the gates last seen."""
        self.examples = 0
        self.sources: Tensor | None = None
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, routing: Routing, messages: Mapping[str, Tensor], mask: Tensor, blend: MessageBlend) -> None:
        """Adds one batch: its routing, its messages `[B, S, H]` by kind and the mask `[B, S]` of real tokens.

        The gates are read here, where they are whole: between forward passes FSDP2 may hold only a part of them.
        """
        self.examples += routing.indices.shape[0]
        counts = torch.nn.functional.one_hot(routing.indices.flatten(), self.num_sources).sum(0)
        self.sources = counts if self.sources is None else self.sources + counts
        self._sum("tokens", mask.float())
        log_probability = torch.log_softmax(routing.logits.float(), dim=-1)
        self._sum("entropy", -(log_probability.exp() * log_probability))
        for kind, message in messages.items():
            self.gates[kind] = blend.gates[kind]().clone()
            message = message.float()
            self._sum(f"{kind}_norm", message.norm(dim=-1) * mask)
            self._sum(f"{kind}_variance", message.var(dim=-1, unbiased=False) * mask)

    def _sum(self, name: str, values: Tensor) -> None:
        total = values.sum(dtype=torch.float64 if values.device.type == "cpu" else torch.float32)
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def report(self, eps: float) -> dict[str, Any]:
        """Returns the metrics as plain numbers (see ``XLRBBridge.usage``); `eps` is of the norm behind the gates."""
        metrics: dict[str, Any] = {
            "sources": [0] * self.num_sources if self.sources is None else self.sources.tolist(),
            "router_entropy": self._mean("entropy", self.examples),
        }
        tokens = float(self.sums["tokens"]) if self.sums else 0.0
        for kind, value in self.gates.items():
            gate, variance = float(value), self._mean(f"{kind}_variance", tokens)
            metrics[f"gate_{kind}"] = gate
            metrics[f"norm_{kind}"] = self._mean(f"{kind}_norm", tokens)
            metrics[f"gate_variance_over_eps_{kind}"] = None if variance is None else gate**2 * variance / eps
        return metrics

    def _mean(self, name: str, count: float) -> float | None:
        return float(self.sums[name]) / count if count else None


def plot_usage(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws the usage of one run, one entry of ``history`` per epoch, into a PNG at ``path``.

    Four curves per target layer (gates, α²·var/eps, message norms, router entropy) and a map of the chosen sources,
    one row per target layer and epoch.

    Raises:
        ValueError: if `history` is empty or has no routed layer.
    """
    if not history or not history[0].get("layers"):
        raise ValueError("plot_usage needs at least one usage() dict with a routed layer")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flatten()
    titles = {
        "gate": "gate",
        "gate_variance_over_eps": "gate² · message variance / eps  (≫ 1: the norm removes the gate)",
        "norm": "mean message norm",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        _draw_curves(axis, history, {kind: f"{name}_{kind}" for kind in ("hdim", "attn")})
        axis.set_title(title, fontsize=10)
    axes[1].set_yscale("log")
    _draw_curves(axes[3], history, {"": "router_entropy"})
    axes[3].set_title("router entropy (nats)", fontsize=10)
    axes[5].remove()
    _draw_sources(figure, axes[4], history)
    figure.savefig(Path(path), dpi=110)


def _draw_curves(axis: Any, history: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> None:
    """Draws the metrics ``keys``, by kind of message, of the layers that have them in every epoch."""
    kinds: dict[str, dict[str, list[float]]] = {}
    for kind, key in keys.items():
        for layer in history[0]["layers"]:
            values = [usage["layers"][layer].get(key) for usage in history]
            if all(value is not None for value in values):
                kinds.setdefault(kind, {})[layer] = values
    draw_layers(axis, range(1, len(history) + 1), kinds, "epoch")


def _draw_sources(figure: Any, axis: Any, history: Sequence[Mapping[str, Any]]) -> None:
    layers = list(history[0]["layers"])
    width = max(len(history[0]["layers"][layer]["sources"]) for layer in layers)
    rows, labels = [], []
    for layer in layers:
        for epoch, usage in enumerate(history, start=1):
            counts = usage["layers"][layer]["sources"]
            rows.append([count / max(1, sum(counts)) for count in counts] + [float("nan")] * (width - len(counts)))
            labels.append(f"layer {layer}" if len(history) == 1 else f"layer {layer}, epoch {epoch}")
    image = axis.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    name_ticks(axis.yaxis, labels)
    name_ticks(axis.xaxis, [str(source) for source in range(width)])
    axis.set_xlabel("source layer")
    axis.set_title("share of choices per source", fontsize=10)
    figure.colorbar(image, ax=axis)
