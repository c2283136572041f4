"""Summarizes a profile in one table: phases of the loop, kernels or operators, modules, and how busy the device was.

From a Chrome trace of `torch.profiler` (`from_trace`) or from the tables of Nsight (`xlayer_systems.profiling.nsight`).
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xlayer_systems.profiling.nsight_tables import kernel_name
from xlayer_systems.reporting.tables import table
from xlayer_systems.training.regions import DOMAIN, MODULE, PHASES, WINDOW

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
CPU_WORK = "cpu_op"
ROWS = 12
ELEMENT_BYTES = {
    "double": 8, "float": 4, "c10::Half": 2, "c10::BFloat16": 2, "long": 8, "long int": 8, "int": 4, "short": 2,
    "signed char": 1, "unsigned char": 1, "bool": 1,
}  # fmt: skip

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """Holds a region, a kernel or an operator. ``seconds``: of an operator without those that it called.

    ``bandwidth`` in bytes per second and ``occupancy`` (resident warps over the most possible) where they are known.
    """

    name: str
    calls: int
    seconds: float
    bandwidth: float | None = None
    occupancy: float | None = None


@dataclass(frozen=True)
class Summary:
    """Holds ``seconds`` of the window and ``busy``, the share in which the device worked. Rows: longest first."""

    tool: str
    device: str
    seconds: float
    busy: float
    phases: list[Row]
    kernels: list[Row]
    modules: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able dict."""
        return dataclasses.asdict(self)


def from_trace(trace: Mapping[str, Any]) -> Summary:
    """Summarizes a trace that `xlayer_systems.profiling.capture` took; times in it are microseconds."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    regions = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(f"{DOMAIN}/")]
    window = next(e for e in regions if e["name"] == f"{DOMAIN}/{WINDOW}")
    start, end = window["ts"], window["ts"] + window["dur"]
    inside = [e for e in events if start <= e["ts"] < end]
    on_gpu = [e for e in inside if e.get("cat") in GPU_WORK]
    operators = [e for e in inside if e.get("cat") == CPU_WORK]
    work = on_gpu or operators
    busy = covered((max(start, e["ts"]), min(end, e["ts"] + e["dur"])) for e in work) / (end - start)
    named = defaultdict(list)
    for event in regions:
        named[event["name"].removeprefix(f"{DOMAIN}/")].append(event["dur"] * 1e-6)
    phases, modules = split_regions({name: (len(times), sum(times)) for name, times in named.items()})
    kernels = _kernels(on_gpu) if on_gpu else _operators(operators)
    device = "cuda" if on_gpu else "cpu"
    return Summary("torch.profiler", device, (end - start) * 1e-6, busy, phases, kernels, modules)


def split_regions(named: Mapping[str, tuple[int, float]]) -> tuple[list[Row], list[Row]]:
    """Splits calls and seconds by region into phases, in the order of the loop, and modules, longest first."""
    phases = [Row(name, *named[name]) for name in PHASES if name in named]
    modules = [Row(name.removeprefix(MODULE), *times) for name, times in named.items() if name.startswith(MODULE)]
    return phases, longest_first(modules)


def over_layers(modules: Iterable[Row]) -> list[Row]:
    """Merges modules that differ only in the numbers of their layers into one row, ``layers.*.attention``."""
    groups = defaultdict(list)
    for row in modules:
        groups[re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name)].append(row)
    return longest_first(Row(name, sum(r.calls for r in g), sum(r.seconds for r in g)) for name, g in groups.items())


def longest_first(rows: Iterable[Row]) -> list[Row]:
    """Sorts rows by their time, equal ones by name."""
    return sorted(rows, key=lambda row: (-row.seconds, row.name))


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def format_summary(summary: Summary) -> list[str]:
    """Returns lines of plain text."""
    on_cpu = summary.device == "cpu"
    worker = "operators on the CPU" if on_cpu else "kernels and copies on the GPU"
    lines = [f"{1e3 * summary.seconds:.1f} ms, {100 * summary.busy:.1f} % of them with {worker} ({summary.tool})"]
    if summary.phases:
        lines += ["", *_region_table("phase", summary.phases, summary.seconds)]
    if summary.kernels:
        lines += ["", *_kernel_table(summary)]
    if summary.modules:
        layers = over_layers(summary.modules)[:ROWS]
        lines += ["", *_region_table("module, forward", layers, summary.seconds)]
    return lines


def _region_table(title: str, rows: Sequence[Row], seconds: float) -> list[str]:
    lines = [(title, "calls", "ms per call", "share")]
    for row in rows:
        per_call = 1e3 * row.seconds / row.calls
        lines.append((row.name, f"{row.calls}", f"{per_call:.3f}", _percent(row.seconds / seconds)))
    return table(lines)


def _kernel_table(summary: Summary) -> list[str]:
    title, bandwidth = ("operator", "reads GB/s") if summary.device == "cpu" else ("kernel", "GB/s")
    has_occupancy = any(row.occupancy is not None for row in summary.kernels)
    lines = [(title, "calls", "ms", "share", bandwidth, *["occupancy"] * has_occupancy)]
    for row in summary.kernels[:ROWS]:
        rate = "-" if row.bandwidth is None else f"{row.bandwidth * 1e-9:.2f}"
        cells = (row.name, f"{row.calls}", f"{1e3 * row.seconds:.3f}", _percent(row.seconds / summary.seconds), rate)
        lines.append((*cells, *[_percent(row.occupancy)] * has_occupancy))
    return table(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _kernels(events: Sequence[Event]) -> list[Row]:
    """Lists kernels, copies and fills of the GPU; occupancy is weighted by time, the bandwidth of a copy is its own."""
    groups = defaultdict(list)
    for event in events:
        groups[kernel_name(event["name"]) if event["cat"] == "kernel" else event["name"]].append(event)
    rows = []
    for name, group in groups.items():
        time = sum(event["dur"] for event in group)
        moved = [event["args"]["bytes"] for event in group if "bytes" in event.get("args", {})]
        occupied = [(e["dur"], e["args"].get("est. achieved occupancy %")) for e in group if "args" in e]
        known = [(dur, percent) for dur, percent in occupied if percent is not None]
        occupancy = sum(d * p for d, p in known) / sum(d for d, _ in known) / 100 if known else None
        rows.append(Row(name, len(group), time * 1e-6, sum(moved) / time * 1e6 if moved else None, occupancy))
    return longest_first(rows)


def _operators(events: Sequence[Event]) -> list[Row]:
    """Lists operators by their own time; bandwidth: bytes of their inputs over their whole time, so at most what they
    move.

    Not where most of the time is in other operators, which read the same inputs.
    """
    calls: dict[str, int] = defaultdict(int)
    own: dict[str, float] = defaultdict(float)
    whole: dict[str, float] = defaultdict(float)
    size: dict[str, int] = defaultdict(int)
    threads = defaultdict(list)
    for event in events:
        threads[event["tid"]].append(event)
    for thread in threads.values():
        for event, inner in with_own_time(thread):
            name = event["name"]
            calls[name] += 1
            own[name] += inner
            whole[name] += event["dur"]
            size[name] += input_bytes(event)
    rows = []
    for name in calls:
        reads = size[name] and own[name] > 0.5 * whole[name]
        bandwidth = size[name] / whole[name] * 1e6 if reads else None
        rows.append(Row(name, calls[name], own[name] * 1e-6, bandwidth))
    return longest_first(rows)


def with_own_time(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """Returns the events of a thread, each with its duration without the events inside it."""
    ordered = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    own = [event["dur"] for event in ordered]
    outer: list[int] = []
    for index, event in enumerate(ordered):
        while outer and ordered[outer[-1]]["ts"] + ordered[outer[-1]]["dur"] <= event["ts"]:
            outer.pop()
        if outer:
            own[outer[-1]] -= event["dur"]
        outer.append(index)
    return list(zip(ordered, own, strict=True))


def input_bytes(event: Event) -> int:
    """Counts the bytes of an operator's input tensors, where the trace has their shapes."""
    arguments = event.get("args", {})
    total = 0
    for shape, kind in zip(arguments.get("Input Dims", []), arguments.get("Input type", []), strict=False):
        if kind in ELEMENT_BYTES and shape and all(isinstance(length, int) for length in shape):
            elements = 1
            for length in shape:
                elements *= length
            total += elements * ELEMENT_BYTES[kind]
    return total
