"""Tables in plain text."""

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
