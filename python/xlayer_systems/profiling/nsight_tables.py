"""Reads the tables that Nvidia's profilers print: `ncu --page raw --csv` and `nsys stats --format csv`."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel as Nsight Compute measured it: its short name, and every metric that is a number."""

    kernel: str
    metrics: dict[str, float]

    def largest(self, pattern: str) -> float | None:
        """Returns the largest metric that ``pattern`` matches: names differ between GPUs and versions."""
        return max((value for name, value in self.metrics.items() if re.match(pattern, name)), default=None)


def number(text: str) -> float | None:
    """Parses a cell as a number; returns None if it is none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def kernel_name(full: str) -> str:
    """Shortens a kernel's name: `score` of `void xlayer::cuda::(anonymous namespace)::score<bfloat16>(Args)`."""
    plain = full.replace("(anonymous namespace)::", "").replace("<unnamed>::", "").split("(")[0]
    return plain.split("<")[0].split("::")[-1].split(" ")[-1]


def read_ncu(lines: Iterable[str]) -> list[Launch]:
    """Reads the launches from the output of `ncu --page raw --csv --print-units base`; [] where there is no table."""
    rows = _rows(lines, '"ID"')
    launches = []
    for row in rows[1:]:  # the first has the units
        values = {name: value for name, cell in row.items() if name and (value := number(cell or "")) is not None}
        launches.append(Launch(kernel_name(row["Kernel Name"]), values))
    return launches


def read_nsys(lines: Iterable[str]) -> list[dict[str, str]]:
    """Reads the rows of a table by `nsys stats --format csv`, by their columns; [] where there is no table."""
    return _rows(lines, "Time (%)")


def _rows(lines: Iterable[str], header: str) -> list[dict[str, str]]:
    """Reads the table that begins with ``header``, after any lines that the tool prints before it."""
    text = list(lines)
    start = next((at for at, line in enumerate(text) if line.startswith(header)), len(text))
    end = next((at for at, line in enumerate(text[start:], start) if not line.strip()), len(text))
    return list(csv.DictReader(text[start:end]))
