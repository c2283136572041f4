"""Formats numbers, tables and the parts of pages in Markdown; reads committed results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
CPU = "xeon-amx-avx512-2core"  # the file of rows that the tables of kernels are made of
NBSP, JOINER, SHORT = "\u00a0", "\u2060", 30
GENERATED = (
    "<!-- Written by `make results` from benchmarks/results. Change the generator, benchmarks/pages, instead. -->"
)


def milliseconds(value: float) -> str:
    """Formats a time in ms: three digits or so, in seconds where it is long."""
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def megabytes(size: int) -> str:
    """Formats a size in MB."""
    return f"{size / 1e6:.0f} MB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def power(value: float) -> str:
    """Formats a learning rate: 4e-3."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def named(**sizes: int) -> str:
    """Formats sizes by name: B = 4, S = 512."""
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def percent(value: float, digits: int = 1) -> str:
    """Formats a share: 24.9 %."""
    return f"{100 * value:.{digits}f} %"


def interval(found: dict[str, Any], digits: int = 1) -> str:
    """Formats the interval of a share: 22.2 – 27.9 %."""
    return f"{100 * found['low']:.{digits}f} – {100 * found['high']:.{digits}f} %".replace("-", "−")


def signed(found: dict[str, Any], digits: int) -> str:
    """Formats a difference with its interval, with true minus signs."""
    text = f"{found['mean']:+.{digits}f} ({found['low']:+.{digits}f} – {found['high']:+.{digits}f})"
    return text.replace("-", "−")


def minutes(seconds: float) -> str:
    """Formats a time in s as minutes."""
    return f"{seconds / 60:.1f} minutes"


def span(values: Iterable[float], form: str) -> str:
    """Formats the smallest and the largest value, or the one number that both are."""
    found = sorted(values)
    ends = list(dict.fromkeys(format(value, form) for value in (found[0], found[-1])))
    return " to ".join(ends)


def study(name: str) -> dict[str, Any]:
    """Reads the committed result of a run or a sweep."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Builds a table; ``head`` is its first line without the outer bars."""
    names = [_unbroken(name.strip()) if len(name) <= 12 else name.strip() for name in head.split("|")]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(map(_unbroken, row))} |" for row in rows]
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |") + "\n"


def _unbroken(cell: str) -> str:
    """Keeps a short cell, such as a number with its unit, on one line."""
    return cell.replace(" ", NBSP).replace("–", f"–{JOINER}") if len(cell) <= SHORT else cell


def without_empty(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Builds a table of the columns in which any row has an entry."""
    lines = [list(row) for row in rows]
    names = [name.strip() for name in head.split("|")]
    kept = [at for at in range(len(names)) if at == 0 or any(line[at] for line in lines)]
    return table(" | ".join(names[at] for at in kept), ([line[at] for at in kept] for line in lines))


def figure(name: str, alt: str) -> str:
    """Shows a generated figure."""
    return f"```{{image}} /_static/figures/{name}.svg\n:alt: {alt}\n:class: figure\n```\n"


def part(name: str, *blocks: str) -> str:
    """Joins blocks between two marks, by which another page includes them."""
    body = "\n\n".join(block.strip() for block in blocks)
    return f"<!-- begin {name} -->\n\n{body}\n\n<!-- end {name} -->"


def page(*blocks: str) -> str:
    """Joins the blocks of a whole page."""
    return "\n\n".join(block.strip() for block in (GENERATED, *blocks)) + "\n"
