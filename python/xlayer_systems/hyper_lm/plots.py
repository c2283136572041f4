"""Plots the usage of the layers over one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xlayer_systems.reporting.plots import draw_layers


def plot_layers(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws the gradient norm of each layer and the similarity of adjacent sublayers' inputs into a PNG at ``path``.

    Args:
        history: records of evaluations, each with ``step``, ``gradient_norms`` and ``usage``.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    gradients, similarity = figure.subplots(1, 2)
    gradients.set(ylabel="norm of the gradient, before clipping", yscale="log")
    similarity.set_ylabel("cosine with the input of the sublayer before")
    curves = {
        gradients: {name: [r["gradient_norms"][name] for r in history] for name in history[0]["gradient_norms"]},
        similarity: {
            name: [r["usage"]["similarity"][name] for r in history] for name in history[0]["usage"]["similarity"]
        },
    }
    steps = [record["step"] for record in history]
    for axis, lines in curves.items():
        draw_layers(axis, steps, {"": lines}, "step", "layer" if axis is gradients else "sublayer")
    figure.savefig(Path(path), dpi=120)
