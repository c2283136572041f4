"""Accuracy and gates over training, and where over depth the state moves, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xlayer_ext.nn.aggregate import INIT_LOGIT

Evaluations = Sequence[Mapping[str, Any]]


def plot_paths(runs: Mapping[str, Sequence[Evaluations]], path: Path) -> bool:
    """Plots tool accuracy and gates over the steps; each layer's share in the state's way at the last evaluation.

    Args:
        runs: per name the evaluations of its runs, one per seed. Gates are drawn of the first seed, a line per layer.
        path: the PNG to write.

    Returns:
        False, and nothing is written, without an evaluation.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any(seed for seeds in runs.values() for seed in seeds):
        return False
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, gates, movement = figure.subplots(1, 3)
    for index, (name, seeds) in enumerate(runs.items()):
        color = f"C{index}"
        for number, seed in enumerate(seeds):
            points = [(r["step"], r["accuracy"]) for r in seed]
            accuracy.plot(*zip(*points, strict=True), color=color, marker=".", label=name if number == 0 else None)
        _draw_gates(gates, seeds[0], color if len(runs) > 1 else None)
        last = seeds[0][-1].get("usage", {}).get("movement", {})
        if last:
            movement.plot(list(last), list(last.values()), color=color, marker=".", label=name)
    gates.axhline(1 / (1 + math.exp(-INIT_LOGIT)), color="gray", linestyle=":", label="start")
    accuracy.set(xlabel="step", ylabel="validation accuracy of the tool")
    gates.set(xlabel="step", ylabel="gate of each layer")
    movement.set(xlabel="layer", ylabel="share in the state's movement", ylim=(0, None))
    for axis in (accuracy, gates, movement):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return True


def _draw_gates(axis: Any, evaluations: Evaluations, color: str | None) -> None:
    found = [(record["step"], record["usage"]["gates"]) for record in evaluations if "gates" in record.get("usage", {})]
    for number, layer in enumerate(found[0][1] if found else ()):
        values = [gates[layer] for _, gates in found]
        label = f"layer {layer}" if color is None else None
        axis.plot([s for s, _ in found], values, color=color or f"C{number}", marker=".", linewidth=1, label=label)
