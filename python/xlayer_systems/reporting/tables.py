"""Tables in plain text, their cells, and the evaluations that they are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Records = Sequence[Mapping[str, Any]]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines of plain text, the first column left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    name, *numbers = (f"{{:{'<' if column == 0 else '>'}{width}}}" for column, width in enumerate(widths))
    line = "  ".join([name, *numbers])
    return [line.format(*row).rstrip() for row in rows]


def evaluations_of(records: Records) -> list[Mapping[str, Any]]:
    """Returns the evaluations among a run's records."""
    return [record for record in records if record["event"] == "eval"]


def percent(row: Mapping[str, Any]) -> str:
    """Formats the mean of a proportion."""
    return f"{100 * row['mean']:.1f} %"


def percent_range(row: Mapping[str, Any]) -> str:
    """Formats the interval of a proportion."""
    return f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def number(value: float | None, digits: int = 1) -> str:
    """Formats a number, or nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"
