"""Accuracy and gates over training, and where over depth the state moves, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xlayer_ext.nn.aggregate import INIT_LOGIT
from xlayer_systems.reporting.plots import color_of, draw_layers, draw_legend, draw_line, name_ticks, whole_ticks

Evaluations = Sequence[Mapping[str, Any]]


def plot_paths(runs: Mapping[str, Sequence[Evaluations]], path: Path) -> bool:
    """Plots tool accuracy and gates over the steps; each layer's share in the state's way at the last evaluation.

    Args:
        runs: per name the evaluations of its runs, one per seed. Gates are drawn of the first seed, a line per layer;
            of several runs those of the last evaluation over the layers.
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
        color = color_of(index, len(runs))
        for number, seed in enumerate(seeds):
            points = [(r["step"], r["accuracy"]) for r in seed]
            label = name if number == 0 and len(runs) > 1 else None
            draw_line(accuracy, points, color=color, label=label)
        if len(runs) == 1:
            _draw_gates(gates, seeds[0])
        for axis, key in ((movement, "movement"), *([(gates, "gates")] if len(runs) > 1 else [])):
            last = seeds[0][-1].get("usage", {}).get(key, {})
            if last:
                draw_line(axis, list(enumerate(last.values())), color=color)
                name_ticks(axis.xaxis, list(last))
    gates.axhline(1 / (1 + math.exp(-INIT_LOGIT)), color="gray", linestyle=":", zorder=0)  # where gates start
    accuracy.set(xlabel="step", ylabel="validation accuracy of the tool")
    whole_ticks(accuracy)
    gates.set_ylabel("gate of each layer (dotted: at the start)")
    movement.set(xlabel="layer", ylabel="share in the state's movement", ylim=(0, None))
    for axis in (accuracy, movement):
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        gates.grid(alpha=0.3)
        gates.set_xlabel("layer")
        draw_legend(figure)
    figure.savefig(path, dpi=120)
    return True


def _draw_gates(axis: Any, evaluations: Evaluations) -> None:
    found = [(record["step"], record["usage"]["gates"]) for record in evaluations if "gates" in record.get("usage", {})]
    layers = {layer: [gates[layer] for _, gates in found] for layer in (found[0][1] if found else ())}
    draw_layers(axis, [step for step, _ in found], {"": layers}, "step")
