"""Accuracy over soft tokens, and collapse over the steps of training, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xlayer_systems.reporting.plots import color_of, draw_legend, draw_line, whole_ticks

Evaluations = Sequence[Mapping[str, Any]]
PANELS = (
    ("accuracy", "validation accuracy"),
    ("similarity", "cosine between messages"),
    ("perplexity", "code perplexity"),
)


def plot_soft_tokens(rows: Sequence[Mapping[str, Any]], majority: float, path: Path) -> None:
    """Plots accuracy with its interval over the number of soft tokens, a line per kind of bridge.

    Args:
        rows: of a sweep, with mean, low, high, soft_tokens, bridge and per_seed.
        majority: accuracy of the commonest answer, drawn as a line.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for index, bridge in enumerate(dict.fromkeys(row["bridge"] for row in rows)):
        mine = sorted((row for row in rows if row["bridge"] == bridge), key=lambda row: row["soft_tokens"])
        counts, means = [row["soft_tokens"] for row in mine], [row["mean"] for row in mine]
        errors = [[row["mean"] - row["low"] for row in mine], [row["high"] - row["mean"] for row in mine]]
        axis.errorbar(counts, means, yerr=errors, color=f"C{index}", marker=".", capsize=3, label=bridge)
        for row in mine:
            axis.plot([row["soft_tokens"]] * len(row["per_seed"]), row["per_seed"], "x", color=f"C{index}", alpha=0.5)
    axis.axhline(majority, color="gray", linestyle=":", label="majority")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="soft tokens", ylabel="validation accuracy", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_bridges(runs: Mapping[str, Sequence[Evaluations]], path: Path) -> bool:
    """Plots accuracy, similarity of the messages and code perplexity over the steps; seeds share a colour.

    Args:
        runs: per name the evaluations of its runs, one per seed.
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
    for axis, (key, label) in zip(figure.subplots(1, 3), PANELS, strict=True):
        for index, (name, seeds) in enumerate(runs.items()):
            for number, evaluations in enumerate(seeds):
                found = [(r["step"], {**r.get("usage", {}), **r}.get(key)) for r in evaluations]
                points = [(step, value) for step, value in found if value is not None]
                named = name if number == 0 and len(runs) > 1 else None
                if points:
                    draw_line(axis, points, color=color_of(index, len(runs)), label=named)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        whole_ticks(axis)
        if not axis.lines:  # such as the code perplexity of a bridge without codes
            axis.set(xticks=[], yticks=[])
            axis.text(0.5, 0.5, f"no {key}", ha="center", va="center", color="gray", transform=axis.transAxes)
    draw_legend(figure)
    figure.savefig(path, dpi=120)
    return True
