"""Plots of a benchmark run, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.measure import Row

Pair = tuple[float, float]
MARKERS = {"fwd": "o", "bwd": "s", "fwd+bwd": "D"}
DOTS, WIDTH = 200, 5.6  # dots per inch, inches: narrow, so that a phone's screen still shows the letters
SMALL = 8  # points, of most letters


def intensity(row: Row) -> float:
    """Returns the operations of matrix products per byte of the least work."""
    return row.flops / row.bytes


def achieved(row: Row) -> Pair:
    """Returns (bytes/s, flop/s) of the least work in the time taken."""
    seconds = row.ms_median / 1e3
    return row.bytes / seconds, row.flops / seconds


def roof(at: float, byte_rate: float, flop_rate: float) -> float:
    """Returns the most flop/s at an intensity: the lower one of the roofs of moving bytes and of multiply-adds."""
    return min(at * byte_rate, flop_rate)


def byte_roofs(limits: Mapping[str, Any]) -> dict[str, float]:
    """Returns bytes/s by level, the nearest cache first; for a GPU torch's copy alone."""
    levels = limits.get("levels") or [{"level": "memory", "byte_rate": limits["torch_copy_rate"]}]
    return {level["level"]: level["byte_rate"] for level in levels}


def flop_roof(limits: Mapping[str, Any], dtype: str) -> float:
    """Returns the fastest multiply-adds of a dtype; for a GPU, or in 16 bits where that is faster, torch's GEMM."""
    computed = "float64" if dtype == "float64" else "float32"
    rates = [one["rate"] for one in limits.get("multiply_adds", []) if one["dtype"] == computed]
    if not rates or dtype in ("bfloat16", "float16"):
        rates.append(limits["gemm_rates"][dtype])
    return max(rates)


def kernels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups the rows of native kernels by operator; of rows of the same case the last one counts."""
    last = {(row.op, row.case, row.pass_, row.dtype): row for row in rows if row.impl == "native"}
    found: dict[str, list[Row]] = {}
    for row in last.values():
        found.setdefault(row.op, []).append(row)
    return found


def draw(folder: Path, rows: Sequence[Row], found: Mapping[str, Any]) -> dict[str, str]:
    """Writes the plots that there is data for; returns their titles by file name."""
    pictures: dict[str, str] = {}

    def add(name: str, shows: str, plot: Callable[[Any], None], size: Pair) -> None:
        save(folder / name, plot, size)
        pictures[name] = shows

    native = kernels(rows)
    if native and "limits" in found:
        shows = "Native kernels that multiply, under the roofs of this machine: ○ forward, □ backward, ◇ both"
        multiplying = {op: [row for row in rows if row.flops] for op, rows in native.items()}
        multiplying = {op: rows for op, rows in multiplying.items() if rows}
        if multiplying:
            plot = partial(roofline, native=multiplying, limits=found["limits"])
            add("roofline.png", shows, plot, (WIDTH, 5.2))
        moving = [row for rows in native.values() for row in rows if row.extra.get("bound", "bytes") == "bytes"]
        if moving:
            shows = "Native kernels that bytes bound: ● bytes of the least work per second, | the limit beside them"
            add("bytes.png", shows, partial(byte_chart, rows=moving), (WIDTH, 1.2 + 0.2 * len(moving)))
    for family in dict.fromkeys(row.family for row in rows):
        bars = speedups([row for row in rows if row.family == family])
        if bars:
            shows = f"{family}: how many times the native kernel is faster"
            add(f"speedup-{family}.png", shows, partial(bar_chart, bars=bars), (WIDTH, bars_height(bars)))
    curves = [curve for curve in found.get("curves", []) if curve["values"]]
    for name, unit, shows in (
        ("time.png", "ms", "Time over size, with the exponent of the line that fits"),
        ("memory.png", "bytes", "Peak memory over the length of the sentences"),
    ):
        if chosen := [curve for curve in curves if curve["unit"] == unit]:
            height = 3.2 * ((len(chosen) + 1) // 2)
            add(name, shows, partial(curve_chart, curves=chosen), (WIDTH, height))
    return pictures


def save(path: Path, plot: Callable[[Any], None], size: Pair) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    plot(figure)
    figure.savefig(path, dpi=DOTS)


# ---- roofline ------------------------------------------------------------------------------------------------------


def roofline(figure: Any, native: Mapping[str, Sequence[Row]], limits: Mapping[str, Any]) -> None:
    axis = figure.subplots()
    dtypes = sorted({row.dtype for rows in native.values() for row in rows})
    points = [row for rows in native.values() for row in rows]
    intensities = [intensity(row) for row in points]
    done = [achieved(row)[1] / 1e9 for row in points]
    flops = {dtype: flop_roof(limits, dtype) / 1e9 for dtype in dtypes}
    levels = {level: rate / 1e9 for level, rate in byte_roofs(limits).items()}
    ridges = [max(flops.values()) / rate for rate in levels.values()]
    left, right = min(intensities) / 2, 3 * max(*intensities, *ridges)
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(done) / 2, 2.2 * max(flops.values())))
    at = np.geomspace(left, right, 200)
    labels = Labels(axis)
    for line, (dtype, most) in zip(("-", "--", ":", "-."), flops.items(), strict=False):
        for level, rate in levels.items():
            slope = np.minimum(at * rate, most)
            axis.plot(at, slope, color="black" if level == MEMORY else "0.6", linestyle=line, linewidth=1)
        said = "multiply-adds" if len(flops) == 1 else f"multiply-adds, {dtype}"
        note = f"{said}: {most:.0f} GFLOP/s"
        axis.annotate(note, (right, most), (-2, 3), ha="right", va="bottom", fontsize=SMALL, **_POINTS)
    found: list[tuple[str, str, list[Pair]]] = []
    for index, (op, rows) in enumerate(native.items()):
        for case in dict.fromkeys((row.case, row.dtype) for row in rows):
            group = sorted((row for row in rows if (row.case, row.dtype) == case), key=lambda row: row.pass_)
            spots = [(intensity(row), achieved(row)[1] / 1e9) for row in group]
            color = COLORS[index % len(COLORS)]
            axis.plot(*zip(*spots, strict=True), color=color, linewidth=0.7)
            for row, spot in zip(group, spots, strict=True):
                axis.plot(*spot, color=color, marker=MARKERS[row.pass_], markersize=5, linestyle="none")
            name = op if len({row.case for row in rows}) == 1 else f"{op} {case[0]}"
            found.append((name if len(dtypes) == 1 else f"{name} {case[1]}", color, spots))
    axis.set(xlabel="operations per byte, of the least work", ylabel="GFLOP/s")
    axis.set_title("○ forward   □ backward   ◇ both", fontsize=SMALL)
    _plain(axis.xaxis, axis.yaxis)
    _finish(axis)
    figure.draw_without_rendering()  # labels are laid out where the points are
    for _, _, spots in found:
        labels.keep_free(spots)
    for level, rate in levels.items():
        lowest = level == MEMORY  # a cache's line may lie close above memory's
        text, color = f"{level}: {rate:.0f} GB/s", "black" if lowest else "0.4"
        labels.along(text, color, rate, max(flops.values()) / 1.2, "top" if lowest else "bottom")
    for name, color, spots in found:
        labels.add(name, color, spots)


MEMORY = "memory"
COLORS = [f"C{index}" for index in range(10)] + ["#2f4f4f", "#8b0000", "#b8860b", "#6a5acd", "#006400", "#c71585"]


class Labels:
    """Words beside points, each in the nearest place that is free of points and of other words."""

    ANGLES = np.radians((0, 180, 90, 270, 30, 150, 330, 210, 60, 120, 300, 240))
    RADII = (5, 10, 18, 28, 40, 55, 75, 100)

    def __init__(self, axis: Any) -> None:
        self._axis, self._taken = axis, list[Any]()

    def keep_free(self, spots: Sequence[Pair]) -> None:
        from matplotlib.transforms import Bbox

        half = 4 * DOTS / 72
        for x, y in self._axis.transData.transform(spots):
            self._taken.append(Bbox.from_extents(x - half, y - half, x + half, y + half))

    def along(self, text: str, color: str, slope: float, top: float, edge: str) -> None:
        """Writes a text along the line y = slope · x up to the height `top`, its edge `top` or `bottom` at the line."""
        (x0, y0), (x1, y1) = self._axis.transData.transform([(top / slope / 10, top / 10), (top / slope, top)])
        turned = {"rotation": np.degrees(np.arctan2(y1 - y0, x1 - x0)), "rotation_mode": "anchor"}
        self._axis.annotate(
            text,
            (top / slope, top),
            (-2, 1) if edge == "bottom" else (3, -2),
            color=color,
            fontsize=SMALL,
            ha="right",
            va=edge,
            **turned,
            **_POINTS,
        )
        for at in np.geomspace(1 / 6, 1, 8):  # where the letters are
            self.keep_free([(at * top / slope, at * top)])

    def add(self, text: str, color: str, spots: Sequence[Pair]) -> None:
        """Writes a text beside one of the spots, with a line to it where it is far; leaves it out where all is full."""
        from matplotlib.text import Text  # an Annotation counts its arrow too

        renderer, inside = self._axis.figure._get_renderer(), self._axis.get_window_extent()
        for radius in self.RADII:
            for spot in spots:
                for angle in self.ANGLES:
                    across, up = np.cos(angle), np.sin(angle)
                    ha = "left" if across > 0.3 else "right" if across < -0.3 else "center"
                    va = "bottom" if up > 0.3 else "top" if up < -0.3 else "center"
                    arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.5} if radius > 10 else None
                    note = self._axis.annotate(
                        text,
                        spot,
                        (radius * across, radius * up),
                        color=color,
                        fontsize=SMALL,
                        ha=ha,
                        va=va,
                        arrowprops=arrow,
                        **_POINTS,
                    )
                    note.update_positions(renderer)
                    box = Text.get_window_extent(note, renderer)
                    if inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) and self._free(box):
                        self._taken.append(box)
                        return
                    note.remove()

    def _free(self, box: Any) -> bool:
        return not any(box.overlaps(other) for other in self._taken)


def byte_chart(figure: Any, rows: Sequence[Row]) -> None:
    """Draws bytes per second of each row, and the most that was reached in the same rounds."""
    axis = figure.subplots()
    names = [f"{row.op} {row.case}, {row.pass_}" for row in rows]
    if len({row.dtype for row in rows}) > 1:
        names = [f"{name}, {row.dtype}" for name, row in zip(names, rows, strict=True)]
    for at, row in enumerate(rows):
        limit = row.extra.get("byte_rate", row.extra.get("copy_rate"))
        moved = achieved(row)[0] / 1e9
        axis.plot(moved, at, "o", color="C0", markersize=5)
        if limit:
            axis.plot(limit / 1e9, at, "|", color="black", markersize=10)
            axis.plot([moved, limit / 1e9], [at, at], color="0.8", linewidth=1, zorder=0)
        text = f"{row.fraction_of_limit:.2f}"
        axis.annotate(text, (max(moved, (limit or 0) / 1e9), at), (6, 0), va="center", fontsize=SMALL, **_POINTS)
    axis.set_yticks(range(len(rows)), names, fontsize=SMALL)
    axis.set(xlabel="GB/s; the number is the fraction of the limit", ylim=(len(rows) - 0.5, -0.5))
    axis.set_xlim(0, axis.get_xlim()[1] * 1.15)
    _finish(axis)


# ---- bars ----------------------------------------------------------------------------------------------------------

Bars = dict[str, dict[str, float]]  # per case: how many times the native kernel is faster, by implementation


def speedups(rows: Sequence[Row]) -> Bars:
    """Returns the time of every other implementation ÷ the native one's, case by case."""
    times: dict[str, dict[str, float]] = {}
    several = len({row.dtype for row in rows}) > 1
    for row in rows:
        case = f"{row.op} {row.case}, {row.pass_}" + (f", {row.dtype}" if several else "")
        times.setdefault(case, {})[row.impl] = row.ms_median
    bars = {
        case: {impl: taken / by_impl["native"] for impl, taken in by_impl.items() if impl != "native"}
        for case, by_impl in times.items()
        if "native" in by_impl
    }
    return {case: others for case, others in bars.items() if others}


def bars_height(bars: Bars) -> float:
    return 1.6 + 0.17 * sum(len(others) + 1 for others in bars.values())


def bar_chart(figure: Any, bars: Bars) -> None:
    axis = figure.subplots()
    impls = list(dict.fromkeys(impl for others in bars.values() for impl in others))
    at, ticks, named = 0.0, [], set[str]()
    for others in bars.values():
        ticks.append(at + (len(others) - 1) / 2)
        for impl, ratio in others.items():
            color = f"C{impls.index(impl) % 10}"
            axis.barh(at, ratio - 1, left=1, height=0.9, color=color, label=None if impl in named else impl)
            axis.annotate(f"{ratio:.3g}×", (max(ratio, 1), at), fontsize=7, va="center", xytext=(2, 0), **_POINTS)
            named.add(impl)
            at += 1
        at += 1
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="time ÷ that of the native kernel")
    axis.set_yticks(ticks, list(bars), fontsize=7)
    axis.set_ylim(at - 0.5, -1.5)
    low, high = axis.get_xlim()
    axis.set(xlim=(low, high * (high / low) ** 0.15), axisbelow=True)  # room for the numbers
    _plain(axis.xaxis)
    _finish(axis)
    axis.legend(fontsize=SMALL, loc="lower left", bbox_to_anchor=(0, 1), ncols=min(3, len(impls)))


_POINTS = {"textcoords": "offset points"}


# ---- curves --------------------------------------------------------------------------------------------------------


def curve_chart(figure: Any, curves: Sequence[Mapping[str, Any]]) -> None:
    axes = figure.subplots((len(curves) + 1) // 2, min(2, len(curves)), squeeze=False).flatten()
    for axis, curve in zip(axes, curves, strict=False):
        scale, unit = (1e6, "MB") if curve["unit"] == "bytes" else (1, "ms")
        for index, (impl, values) in enumerate(curve["values"].items()):
            points, slope = curve["points"], curve["exponents"].get(impl)
            label = impl if slope is None else f"{impl}, exponent {slope:.2f}"
            axis.plot(points, np.divide(values, scale), "o", color=f"C{index}", label=label)
            if slope is not None:
                axis.plot(points, fitted(points, values, slope) / scale, color=f"C{index}", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=curve["variable"], ylabel=unit)
        axis.set_title(f"{curve['family']}: {curve['what']}", fontsize=9)
        axis.set_xticks(curve["points"], [str(point) for point in curve["points"]])
        axis.minorticks_off()
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** 0.3)  # the legend's room
        _plain(axis.yaxis)
        _finish(axis)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)


def fitted(points: Sequence[float], values: Sequence[float], slope: float) -> Any:
    """Returns the line with that exponent through the middle of the points on logarithmic axes."""
    logs = np.log(points)
    return np.exp(np.mean(np.log(values)) + slope * (logs - logs.mean()))


def _plain(*axes: Any) -> None:
    """Labels logarithmic axes with plain numbers, 0.5, 1, 2, …, fewer of them over many decades."""
    from matplotlib.ticker import LogLocator, NullLocator

    for axis in axes:
        low, high = axis.get_view_interval()
        steps = (1, 2, 5) if high / low < 500 else (1,)
        axis.set_major_locator(LogLocator(subs=steps, numticks=20))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())


def _finish(*axes: Any) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=SMALL)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
