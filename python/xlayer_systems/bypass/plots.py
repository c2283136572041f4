"""Plots of what the latents keep of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xlayer_systems.reporting.plots import draw_layers, draw_line, name_ticks, whole_ticks


def plot_reconstruction(
    r2: Sequence[float], pca: Sequence[float], evaluations: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """Plots R² per layer beside that of principal components, and their means over the steps.

    Args:
        r2, pca: per layer, on validation.
        evaluations: of stage 1, with ``step`` and ``r2_mean``.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    layers, steps = figure.subplots(1, 2)
    places = range(len(r2))
    layers.bar([place - 0.2 for place in places], r2, width=0.4, label="latent")
    layers.bar([place + 0.2 for place in places], pca, width=0.4, label="principal components")
    layers.set(xlabel="layer", ylabel="R² on validation", ylim=(min(0.0, *r2, *pca), 1))
    name_ticks(layers.xaxis, [str(place) for place in places])
    draw_line(steps, [(r["step"], r["r2_mean"]) for r in evaluations], label="latent")
    whole_ticks(steps)
    steps.axhline(sum(pca) / len(pca), color="gray", linestyle=":", label="principal components")
    steps.set(xlabel="step", ylabel="R² on validation, mean over layers")
    for axis in (layers, steps):
        axis.grid(alpha=0.3)
        # Above the bars, which may fill the axes.
        axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def plot_projectors(evaluations: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Plots the root mean square of each layer's projector over stage 2; returns False without an evaluation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [(r["step"], r["usage"]["projectors"]) for r in evaluations if "projectors" in r.get("usage", {})]
    if not found:
        return False
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    layers = {layer: [rms[layer] for _, rms in found] for layer in found[0][1]}
    draw_layers(axis, [step for step, _ in found], {"": layers}, "step")
    axis.set_ylabel("root mean square of the projector")
    figure.savefig(path, dpi=120)
    return True
