"""What the generated parts of the README are made of: their registry, numbers in words, tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CPU = "xeon-amx-avx512-2core"  # the file of the rows that the tables of kernels are made of
BLOCKS: dict[str, Callable[[], str]] = {}


def block(function: Callable[[], str]) -> Callable[[], str]:
    """Registers a function as the text of the generated part of its name."""
    BLOCKS[function.__name__] = function
    return function


def milliseconds(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def power(value: float) -> str:
    """A learning rate: 4e-3."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def named(**sizes: int) -> str:
    """B = 4, S = 512."""
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def study(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Markdown; ``head`` is the first line without its outer bars."""
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |") + "\n"


def without_empty(head: str, rows: Iterable[Sequence[str]]) -> str:
    """``table`` of the columns in which any row has something: of what was measured."""
    lines = [list(row) for row in rows]
    names = [name.strip() for name in head.split("|")]
    kept = [at for at in range(len(names)) if at == 0 or any(line[at] for line in lines)]
    return table(" | ".join(names[at] for at in kept), ([line[at] for at in kept] for line in lines))


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def interval(found: dict[str, Any], digits: int = 1) -> str:
    return f"{100 * found['low']:.{digits}f} – {100 * found['high']:.{digits}f} %"
