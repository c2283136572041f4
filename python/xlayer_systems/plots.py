"""Curves of one run and of a sweep, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Records = Sequence[Mapping[str, Any]]


def plot_curves(
    runs: Mapping[str, Sequence[Records]], path: Path, majority: float | None = None, metric: str = "accuracy"
) -> None:
    """Training loss per step and a validation metric per epoch.

    Args:
        runs: per name the records of its runs (metrics.jsonl), one per seed; seeds share a colour.
        path: the PNG to write.
        majority: accuracy of the majority class, drawn as a line.
        metric: the metric's key in the records.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis, metric_axis = figure.subplots(1, 2)
    for index, (name, seeds) in enumerate(runs.items()):
        for number, records in enumerate(seeds):
            style: dict[str, Any] = {"color": f"C{index}", "label": name if number == 0 else None}
            train = [(r["step"], r["loss_ema"]) for r in records if r["event"] == "train"]
            evaluated = [(r["epoch"], r[metric]) for r in records if r["event"] == "eval"]
            loss_axis.plot(*_columns(train), linewidth=1, **style)
            metric_axis.plot(*_columns(evaluated), marker=".", linewidth=1, **style)
    if majority is not None:
        metric_axis.axhline(majority, color="gray", linestyle=":", label="majority")
    loss_axis.set(xlabel="step", ylabel="training loss (moving average)")
    metric_axis.set(xlabel="epoch", ylabel=f"validation {metric.replace('_', ' ')}")
    for axis in (loss_axis, metric_axis):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
