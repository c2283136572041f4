"""Draws bars, intervals and lines as SVG: labels beside what they name, no legends, one colour per mechanism.

SVG is written here rather than by a plotting library, so that the same rows give the same bytes everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH = 520
FONT = "font-family='system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif'"
INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
LINE = 22  # height of a row

GREY = "#9aa5b1"  # rivals, baselines, chance
COLOURS = {
    "hdim": "#0072b2",
    "hyper": "#d55e00",
    "quantize": "#009e73",
    "aggregate": "#aa4499",
    # residual connections
    "plain": GREY,
    "shc": "#e69f00",
    "dhc": "#d55e00",
    "mhc": "#882255",
    # bridges
    "qkv": "#56b4e9",
    "continuous": "#0072b2",
    "vq": "#009e73",
    "fsq": "#66aa55",
    "dit": "#cc79a7",
    # aggregators over depth
    "ema": "#aa4499",
    "gru": "#5533aa",
    "attn": "#dd77aa",
    "bypass": "#117a8b",
    "lora": GREY,
}


class Bar(NamedTuple):
    """A value with its label."""

    label: str
    value: float
    text: str
    colour: str
    group: str = ""  # a heading above the first bar of a group


class Dot(NamedTuple):
    """A mean with its interval."""

    label: str
    mean: float
    low: float
    high: float
    text: str
    colour: str


class Line(NamedTuple):
    """A line over x, labelled at its right end; ``low`` and ``high`` are bars of error."""

    label: str
    values: Sequence[float]
    colour: str
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    label_shift: float = 0.0  # in units of y, where two labels would meet


def bars(title: str, values: Sequence[Bar], limit: float | None = None, limit_label: str = "") -> str:
    """Draws horizontal bars from 0, up to ``limit`` if there is one, which is marked."""
    left = 14 + 7.8 * max(len(bar.label) for bar in values)
    right = WIDTH - (16 if limit else 62)
    top = limit or max(bar.value for bar in values)
    y, out = 52.0 if limit else 40.0, []
    begin = y
    scale = (right - left) / top
    for bar in values:
        if bar.group:
            y += 8
            out.append(_text(8, y + 14, bar.group, weight=600))
            y += LINE
        width = bar.value * scale
        out.append(_text(left - 8, y + 15, bar.label, anchor="end"))
        out.append(f"<rect x='{left:.1f}' y='{y + 3:.1f}' width='{width:.1f}' height='15' rx='2' fill='{bar.colour}'/>")
        out.append(f"<line x1='{left:.1f}' x2='{left:.1f}' y1='{y:.1f}' y2='{y + LINE:.1f}' stroke='{MUTED}'/>")
        inside = left + width + 8 + 7.5 * len(bar.text) > (right if limit else WIDTH)  # no text across the limit's line
        at, anchor, ink = (left + width - 6, "end", "#ffffff") if inside else (left + width + 6, "start", INK)
        out.append(_text(at, y + 15, bar.text, anchor=anchor, fill=ink))
        y += LINE
    if limit:
        x = left + limit * scale
        out.insert(0, f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{begin - 4:.1f}' y2='{y:.1f}' stroke='{INK}'/>")
        out.insert(1, _text(x, begin - 9, limit_label, anchor="end", fill=MUTED, size=12))
    return _svg(title, y + 10, out)


def dots(title: str, values: Sequence[Dot], reference: tuple[float, str] | None = None) -> str:
    """Draws means with their intervals on one axis; ``reference`` is a labelled vertical line, such as chance."""
    left = 14 + 7.8 * max(len(dot.label) for dot in values)
    right = WIDTH - 16 - 7.8 * max(len(dot.text) for dot in values)
    ends = [end for dot in values for end in (dot.low, dot.high)] + ([reference[0]] if reference else [])
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low)
    low, high = low - margin, high + margin
    scale = (right - left) / (high - low)
    begin = y = 56.0 if reference else 40.0
    out = []
    for dot in values:
        x0, x1, x = (left + (value - low) * scale for value in (dot.low, dot.high, dot.mean))
        middle = y + 10
        out.append(f"<line x1='{left:.1f}' x2='{right:.1f}' y1='{middle:.1f}' y2='{middle:.1f}' stroke='{GRID}'/>")
        out.append(_text(left - 8, y + 15, dot.label, anchor="end"))
        out.append(
            f"<line x1='{x0:.1f}' x2='{x1:.1f}' y1='{middle:.1f}' y2='{middle:.1f}' "
            f"stroke='{dot.colour}' stroke-width='4' stroke-linecap='round' opacity='0.45'/>"
        )
        out.append(f"<circle cx='{x:.1f}' cy='{middle:.1f}' r='5' fill='{dot.colour}'/>")
        out.append(_text(right + 10, y + 15, dot.text))
        y += LINE + 4
    if reference:
        x = left + (reference[0] - low) * scale
        out.insert(0, f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{begin - 4:.1f}' y2='{y:.1f}' stroke='{MUTED}' "
                      "stroke-dasharray='4 3'/>")  # fmt: skip
        anchor = "end" if x > (left + right) / 2 else "start" if x < left + 60 else "middle"
        out.insert(1, _text(x, begin - 9, reference[1], anchor=anchor, fill=MUTED, size=12))
    return _svg(title, y + 10, out)


def lines(title: str, names: Sequence[str], values: Sequence[Line], x_label: str, form: str) -> str:
    """Draws lines over evenly spaced ``names``, each labelled at its end; ``form`` formats the ticks of y."""
    left, top, bottom = 56.0, 44.0, 260.0
    right = WIDTH - 20 - 7.8 * max(len(line.label) for line in values)
    ends = [value for line in values for value in (*line.values, *line.low, *line.high)]
    low, high = min(ends), max(ends)
    margin = 0.08 * (high - low)
    low, high = low - margin, high + margin

    def place(at: int, value: float) -> tuple[float, float]:
        x = left + 14 + at * (right - left - 28) / max(1, len(names) - 1)
        return x, bottom - (value - low) / (high - low) * (bottom - top)

    out = []
    for value in _ticks(low, high):
        _, y = place(0, value)
        out.append(f"<line x1='{left}' x2='{right:.1f}' y1='{y:.1f}' y2='{y:.1f}' stroke='{GRID}'/>")
        out.append(_text(left - 8, y + 4, format(value, form), anchor="end", fill=MUTED, size=12))
    for at, name in enumerate(names):
        out.append(_text(place(at, low)[0], bottom + 18, name, anchor="middle", fill=MUTED, size=12))
    out.append(_text((left + right) / 2, bottom + 38, x_label, anchor="middle", fill=MUTED, size=12))
    for line in values:
        points = [place(at, value) for at, value in enumerate(line.values)]
        for at, (least, most) in enumerate(zip(line.low, line.high, strict=True)):
            (x, y0), (_, y1) = place(at, least), place(at, most)
            out.append(
                f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{y0:.1f}' y2='{y1:.1f}' stroke='{line.colour}' "
                "stroke-width='3' stroke-linecap='round' opacity='0.35'/>"
            )
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f"<polyline points='{path}' fill='none' stroke='{line.colour}' stroke-width='2'/>")
        out += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{line.colour}'/>" for x, y in points]
        x, y = place(len(names) - 1, line.values[-1] + line.label_shift)
        out.append(_text(x + 12, y + 4, line.label, fill=line.colour, weight=600))
    return _svg(title, bottom + 50, out)


def _ticks(low: float, high: float) -> list[float]:
    """Chooses three to six round numbers between two ends."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(unit * by for by in (1, 2, 5, 10) if (high - low) / (unit * by) <= 6)
    return [step * at for at in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(
    x: float, y: float, content: str, *, anchor: str = "start", fill: str = INK, size: int = 13, weight: int = 400
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{fill}' font-size='{size}' "
        f"font-weight='{weight}'>{escape(content)}</text>"
    )


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height:.0f}' width='{WIDTH}' "
        f"height='{height:.0f}' {FONT} role='img' aria-label='{escape(title, quote=True)}'>"
    )
    ground = f"<rect width='{WIDTH}' height='{height:.0f}' fill='#ffffff'/>"
    return "\n".join([head, ground, _text(8, 22, title, size=15, weight=600), *parts, "</svg>"]) + "\n"
