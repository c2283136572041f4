"""Plots of a benchmark run, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xlayer_ext.bench import Row

Pair = tuple[float, float]
MARKERS = {"fwd": "o", "bwd": "s", "fwd+bwd": "D"}
DOTS, WIDTH = 160, 7.0  # dots per inch, inches: letters that a phone's screen still shows


def intensity(row: Row) -> float:
    """Operations of matrix products per byte, of the least work."""
    return row.flops / row.bytes


def achieved(row: Row) -> Pair:
    """(bytes/s, flop/s) of the least work in the time taken."""
    seconds = row.ms_median / 1e3
    return row.bytes / seconds, row.flops / seconds


def roof(at: float, copy_rate: float, gemm_rate: float) -> float:
    """The most flop/s at an intensity: the memory's roof, or that of the matrix products."""
    return min(at * copy_rate, gemm_rate)


def kernels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of native kernels, by operator; the last one counts of rows that tell of the same thing."""
    last = {(row.op, row.case, row.pass_, row.dtype): row for row in rows if row.impl == "native"}
    found: dict[str, list[Row]] = {}
    for row in last.values():
        found.setdefault(row.op, []).append(row)
    return found


def draw(folder: Path, rows: Sequence[Row], found: Mapping[str, Any]) -> dict[str, str]:
    """Writes what there is data for; returns what each file shows, by name."""
    pictures: dict[str, str] = {}

    def add(name: str, shows: str, plot: Callable[[Any], None], size: Pair) -> None:
        save(folder / name, plot, size)
        pictures[name] = shows

    native = kernels(rows)
    if native and "limits" in found:
        shows = (
            "Every native kernel under the two roofs of this machine; without matrix products the memory alone bounds"
        )
        add("roofline.png", shows, partial(roofline, native=native, limits=found["limits"]), (WIDTH, 4.8))
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
    bandwidth, roofs = figure.subplots(1, 2, width_ratios=(1, 2))
    dtypes = {row.dtype for rows in native.values() for row in rows}
    intensities = [intensity(row) for rows in native.values() for row in rows if row.flops] or [1.0]
    at = np.geomspace(min(intensities) / 2, max(intensities) * 2)
    for line, dtype in zip(("-", "--", ":", "-."), sorted(dtypes), strict=False):
        rates = (limits["copy_rate"], limits["gemm_rates"][dtype])
        roofs.plot(at, [roof(x, *rates) / 1e9 for x in at], color="black", linestyle=line, label=f"limit, {dtype}")
    bandwidth.axhline(limits["copy_rate"] / 1e9, color="black", label="copy")
    for index, (op, rows) in enumerate(native.items()):
        named = False
        for row in rows:
            style: dict[str, Any] = {
                "color": f"C{index % 10}",
                "marker": MARKERS[row.pass_],
                "label": None if named else op,
            }
            style |= {"linestyle": "none", "markersize": 6, "markeredgecolor": "black" if index >= 10 else "none"}
            moved, done = achieved(row)
            if row.flops:
                roofs.plot([intensity(row)], [done / 1e9], **style)
            else:
                bandwidth.plot([row.pass_], [moved / 1e9], **style)
            named = True
    roofs.set(xscale="log", yscale="log", xlabel="flop per byte, of the least work", ylabel="GFLOP/s")
    bandwidth.set(yscale="log", ylabel="GB/s", xlabel="without matrix products", xmargin=0.2)
    roofs.set_title("○ forward  □ backward  ◇ both", fontsize=9)
    _finish(bandwidth, roofs)
    for axis, columns in ((bandwidth, 2), (roofs, 4)):  # below, where no point is hidden
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns)


# ---- bars ----------------------------------------------------------------------------------------------------------

Bars = dict[str, dict[str, float]]  # per case: how many times the native kernel is faster, by implementation


def speedups(rows: Sequence[Row]) -> Bars:
    """Time of every other implementation ÷ the native one's, case by case."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(f"{row.op} {row.case} {row.pass_} {row.dtype}", {})[row.impl] = row.ms_median
    bars = {
        case: {impl: taken / by_impl["native"] for impl, taken in by_impl.items() if impl != "native"}
        for case, by_impl in times.items()
        if "native" in by_impl
    }
    return {case: others for case, others in bars.items() if others}


def bars_height(bars: Bars) -> float:
    return 1.6 + 0.17 * sum(len(others) + 1 for others in bars.values())


def bar_chart(figure: Any, bars: Bars) -> None:
    from matplotlib.ticker import LogLocator

    axis = figure.subplots()
    impls = list(dict.fromkeys(impl for others in bars.values() for impl in others))
    at, ticks, named = 0.0, [], set[str]()
    for others in bars.values():
        ticks.append(at + (len(others) - 1) / 2)
        for impl, ratio in others.items():
            color = f"C{impls.index(impl) % 10}"
            axis.barh(at, ratio - 1, left=1, height=0.9, color=color, label=None if impl in named else impl)
            axis.annotate(f"{ratio:.3g}×", (max(ratio, 1), at), fontsize=6, va="center", xytext=(2, 0), **_POINTS)
            named.add(impl)
            at += 1
        at += 1
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="time ÷ that of the native kernel")
    axis.set_yticks(ticks, list(bars), fontsize=7)
    axis.set_ylim(at - 0.5, -1.5)
    axis.margins(x=0.1)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    _finish(axis)


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
        _finish(axis)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)


def fitted(points: Sequence[float], values: Sequence[float], slope: float) -> Any:
    """The line of that exponent through the middle of the points, as both axes are logarithmic."""
    logs = np.log(points)
    return np.exp(np.mean(np.log(values)) + slope * (logs - logs.mean()))


def _finish(*axes: Any) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
