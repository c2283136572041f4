"""Curves of one run and of a sweep, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Records = Sequence[Mapping[str, Any]]


def plot_curves(
    runs: Mapping[str, Sequence[Records]], path: Path, majority: float | None = None, metric: str = "accuracy"
) -> None:
    """Plots training loss per step and a validation metric per epoch.

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


def plot_losses(
    runs: Mapping[str, Sequence[Sequence[tuple[float, float]]]], path: Path, target: float | None = None
) -> None:
    """Plots validation loss over training tokens: thin lines per seed, a thick one for their mean.

    Args:
        runs: per name the curves (tokens, loss) of its runs, one per seed, evaluated at the same tokens.
        path: the PNG to write.
        target: a loss to be reached, drawn as a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    whole, end = figure.subplots(1, 2)
    losses = []
    for index, (name, seeds) in enumerate(runs.items()):
        mean = [(points[0][0], sum(loss for _, loss in points) / len(points)) for points in zip(*seeds, strict=True)]
        losses += [loss for tokens, loss in mean if tokens >= mean[-1][0] / 3]
        for axis in (whole, end):
            axis.plot(*_columns(mean), color=f"C{index}", linewidth=1.6, marker=".", label=name)
            for curve in seeds if len(seeds) > 1 else ():
                axis.plot(*_columns(curve), color=f"C{index}", linewidth=0.5, alpha=0.6)
    for axis in (whole, end):
        if target is not None:
            axis.axhline(target, color="gray", linestyle=":", label=f"final loss of plain, {target:.3f}")
        axis.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    last = max(curve[-1][0] for seeds in runs.values() for curve in seeds)
    end.set(xlim=(last / 3, last * 1.02), ylim=(min(losses) - 0.02, max(losses) + 0.02))
    figure.savefig(path, dpi=120)


def plot_depth(runs: Mapping[str, Records], path: Path) -> None:
    """Plots gradient norm per layer, and similarity of what adjacent sublayers read, over depth.

    Args:
        runs: per name the last evaluation of each of its runs.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    gradients, similarity = figure.subplots(1, 2)
    for index, (name, seeds) in enumerate(runs.items()):
        for axis, values in (
            (gradients, [record.get("gradient_norms", {}) for record in seeds]),
            (similarity, [record["usage"]["similarity"] for record in seeds]),
        ):
            names = list(values[0])
            means = [sum(value[key] for value in values) / len(values) for key in names]
            axis.plot(names, means, color=f"C{index}", marker=".", label=name)
    gradients.set(xlabel="layer", ylabel="norm of the gradient, before clipping")
    similarity.set(xlabel="sublayer", ylabel="cosine with the input of the sublayer before")
    for axis in (gradients, similarity):
        axis.tick_params(axis="x", labelrotation=60, labelsize=7)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
