"""Curves of one run and of a sweep, as PNG files; colours, ticks and legends, which all plots share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Records = Sequence[Mapping[str, Any]]
MAX_COLORS = 10  # lines that differ by matplotlib's colours; more get a sequential map
MAX_TICKS = 14  # names below an axis or beside a colour bar
MAX_DOTS = 40  # points of a line that are marked
MAX_VALUES = 5  # dots of a panel with their value beside them
LEGEND_ROWS = 24


def color_of(index: int, count: int) -> Any:
    """Returns the colour of one of ``count`` lines."""
    from matplotlib import colormaps

    # The light end of the map is left out, as it is hard to see on white.
    return f"C{index}" if count <= MAX_COLORS else colormaps["viridis"](0.92 * index / (count - 1))


def draw_line(axis: Any, points: Sequence[tuple[float, float]], **style: Any) -> None:
    """Draws points as a line; a single one as a dot with its value, which a line of no length would not show."""
    marks: dict[str, Any] = {"marker": "." if len(points) <= MAX_DOTS else "", "linewidth": 1}
    if len(points) == 1:
        marks = {"marker": "o", "markersize": 7, "linestyle": ""}
        if len(axis.texts) < MAX_VALUES:
            axis.annotate(f"{points[0][1]:.4g}", points[0], (7, 4), textcoords="offset points", fontsize=7)
    axis.plot(*_columns(points), **{**marks, **style})


def draw_layers(
    axis: Any,
    places: Sequence[float],
    kinds: Mapping[str, Mapping[str, Sequence[float]]],
    xlabel: str,
    unit: str = "layer",
) -> None:
    """Draws values of every layer over the steps or epochs of a run.

    Up to `MAX_COLORS` layers have a legend, more a sequential colour map with a colour bar. Of a run with one
    evaluation the values are drawn over the layers instead.

    Args:
        places: steps or epochs.
        kinds: per kind of value, ``""`` where there is one, and layer the value at every place; kinds differ by line.
        xlabel: what ``places`` are.
        unit: what the layers are called.
    """
    names = list(dict.fromkeys(name for layers in kinds.values() for name in layers))
    if not names:
        return
    if len(places) == 1:
        for kind, layers in kinds.items():
            found = [(names.index(name), values[0]) for name, values in layers.items()]
            axis.plot(*_columns(found), marker="o", markersize=4, linewidth=0.8, label=kind or None)
        name_ticks(axis.xaxis, names)
        axis.set_xlabel(f"{unit} (one evaluation, {xlabel} {places[0]:g})")
    else:
        for (kind, layers), style in zip(kinds.items(), ("-", "--", ":"), strict=False):
            for name, values in layers.items():
                label = f"{unit} {name} {kind}".strip() if len(names) <= MAX_COLORS else None
                color = color_of(names.index(name), len(names))
                draw_line(axis, list(zip(places, values, strict=True)), color=color, linestyle=style, label=label)
        if len(names) > MAX_COLORS:
            _draw_color_bar(axis, names, unit)
            for kind, style in zip(kinds if len(kinds) > 1 else (), ("-", "--", ":"), strict=False):
                axis.plot([], [], color="black", linestyle=style, label=kind)
        axis.set_xlabel(xlabel)
        whole_ticks(axis)
    axis.grid(alpha=0.3)
    labels = axis.get_legend_handles_labels()[1]
    if labels:
        axis.legend(fontsize=7, ncols=1 + len(labels) // 9)


def name_ticks(axis: Any, names: Sequence[str]) -> None:
    """Puts names at 0, 1, … along an x or y axis or beside a colour bar, so few of them that none overlap."""
    step = math.ceil(len(names) / MAX_TICKS)
    shown = list(range(0, len(names), step))
    rotation = 60 if max(map(len, names)) > 3 and axis.axis_name == "x" else 0
    axis.set_ticks(shown, [names[index] for index in shown], fontsize=7, rotation=rotation)


def whole_ticks(axis: Any) -> None:
    """Puts the ticks of the x axis at whole numbers, as there is no half step or epoch."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def draw_legend(figure: Any) -> None:
    """Draws the legends: in every panel, or one beside all of them where there are many names."""
    found = [axis.get_legend_handles_labels() for axis in figure.axes]
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    if len(handles) <= MAX_COLORS + 2:
        for axis, (_, labels) in zip(figure.axes, found, strict=True):
            if labels:
                axis.legend(fontsize=8)
        return
    columns = math.ceil(len(handles) / LEGEND_ROWS)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + columns * (0.5 + 0.07 * max(map(len, handles))), height)
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=7, ncols=columns)


def _draw_color_bar(axis: Any, names: Sequence[str], unit: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colors = ListedColormap([color_of(index, len(names)) for index in range(len(names))])
    bar = axis.figure.colorbar(ScalarMappable(Normalize(-0.5, len(names) - 0.5), colors), ax=axis)
    bar.set_label(unit, fontsize=8)
    name_ticks(bar.ax.yaxis, names)


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
            color = color_of(index, len(runs))
            style: dict[str, Any] = {"color": color, "label": name if number == 0 else None}
            train = [(r["step"], r["loss_ema"]) for r in records if r["event"] == "train"]
            evaluated = [(r["epoch"], r[metric]) for r in records if r["event"] == "eval"]
            if train:
                draw_line(loss_axis, train, **style)
            if evaluated:
                draw_line(metric_axis, evaluated, **style)
    if majority is not None:
        metric_axis.axhline(majority, color="gray", linestyle=":", label="majority")
    loss_axis.set(xlabel="step", ylabel="training loss (moving average)")
    metric_axis.set(xlabel="epoch", ylabel=f"validation {metric.replace('_', ' ')}")
    for axis in (loss_axis, metric_axis):
        axis.grid(alpha=0.3)
        whole_ticks(axis)
    draw_legend(figure)
    figure.savefig(path, dpi=120)


def plot_losses(
    runs: Mapping[str, Sequence[Sequence[tuple[float, float]]]], path: Path, target: float | None = None
) -> None:
    """Plots validation loss over training tokens: thin lines per seed, a thick one for their mean.

    Where there is more than one evaluation, the last two thirds stand enlarged at the right.

    Args:
        runs: per name the curves (tokens, loss) of its runs, one per seed, evaluated at the same tokens.
        path: the PNG to write.
        target: a loss to be reached, drawn as a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curved = any(len(curve) > 1 for seeds in runs.values() for curve in seeds)
    figure = Figure(figsize=(11 if curved else 6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if curved else 1, squeeze=False)[0]
    losses = []
    for index, (name, seeds) in enumerate(runs.items()):
        mean = [(points[0][0], sum(loss for _, loss in points) / len(points)) for points in zip(*seeds, strict=True)]
        losses += [loss for tokens, loss in mean if tokens >= mean[-1][0] / 3]
        color = color_of(index, len(runs))
        for axis in axes:
            draw_line(axis, mean, color=color, linewidth=1.6, label=name)
            for curve in seeds if len(seeds) > 1 else ():
                axis.plot(*_columns(curve), color=color, linewidth=0.5, alpha=0.6)
    for axis in axes:
        if target is not None:
            axis.axhline(target, color="gray", linestyle=":", label=f"final loss of plain, {target:.3f}")
        axis.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
        axis.grid(alpha=0.3)
    draw_legend(figure)
    if curved:
        last = max(curve[-1][0] for seeds in runs.values() for curve in seeds)
        axes[1].set(xlim=(last / 3, last * 1.02), ylim=(min(losses) - 0.02, max(losses) + 0.02))
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
            draw_line(axis, list(enumerate(means)), color=color_of(index, len(runs)), label=name)
            if names:
                name_ticks(axis.xaxis, names)
    gradients.set(xlabel="layer", ylabel="norm of the gradient, before clipping")
    similarity.set(xlabel="sublayer", ylabel="cosine with the input of the sublayer before")
    for axis in (gradients, similarity):
        axis.grid(alpha=0.3)
    draw_legend(figure)
    figure.savefig(path, dpi=120)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
