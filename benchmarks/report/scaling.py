"""Curves: what a kernel costs as one size grows, with the exponent that fits, and what memory it needs.

A curve's points are timed in turns, as implementations are. The exponent is the slope of the straight line through the
points with both axes logarithmic: 2 says that twice the size takes four times as long.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.cases import aggregate as aggregate_cases
from benchmarks.cases import hdim as hdim_cases
from benchmarks.cases import hyper as hyper_cases
from benchmarks.cases import quantize as quantize_cases
from benchmarks.harness.measure import Builder, Unavailable, Work, compare, cuda_peak, peak_memory

Note = Callable[[str], None]
IMPLS = ("native", "eager")


@dataclass(frozen=True)
class Curve:
    """One kernel over one size; `arguments(size)` are those of `build`, without `impl`, `dtype` and `device`."""

    family: str
    what: str
    variable: str
    points: tuple[int, ...]
    build: Builder
    arguments: Callable[[int], dict[str, Any]]
    quick: bool = False


def curves(cuda: bool) -> list[Curve]:
    """Lists the curves: cost against every size that a kernel's work grows with."""
    many = 16 if cuda else 1  # of what runs side by side: a GPU needs more of it to be filled

    def hyper(n: int) -> dict[str, Any]:
        return {"op": "boundary", "pass_": "fwd", "kind": "dhc", "size": [many, 256, 512, n], "packed": False}

    def nearest(k: int) -> dict[str, Any]:
        return {"op": "nearest", "pass_": "fwd", "how": "euclidean", "size": [512 * many, k, 64]}

    def ema(size: Sequence[int]) -> dict[str, Any]:
        return {"op": "ema", "pass_": "fwd", "size": list(size)}

    tokens = 512 * many
    return [
        Curve("hdim", "token-pair messaging", "S", (64, 128, 256, 512), hdim_cases.build, hdim(many), quick=True),
        Curve("hyper", "boundary", "n", (2, 3, 4, 6, 8), hyper_cases.build, hyper),
        Curve("quantize", "nearest code", "K", (512, 2048, 8192, 32768), quantize_cases.build, nearest, quick=True),
        Curve("aggregate", "EMA scan", "L", (4, 8, 16, 32), aggregate_cases.build, lambda n: ema((n, tokens, 256))),
        Curve("aggregate", "EMA scan", "d", (64, 128, 256, 512), aggregate_cases.build, lambda d: ema((12, tokens, d))),
    ]


def hdim(batch: int, pass_: str = "fwd") -> Callable[[int], dict[str, Any]]:
    return lambda s: {"pass_": pass_, "size": [batch, s, 24, 96, 256]}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Returns the slope of the least-squares line through (log size, log value)."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


@dataclass
class Measured:
    """Points of one curve: per implementation its values, milliseconds or bytes, and their exponent."""

    family: str
    what: str
    variable: str
    unit: str
    points: list[int]
    values: dict[str, list[float]] = field(default_factory=dict)
    exponents: dict[str, float] = field(default_factory=dict)

    def add(self, impl: str, values: Sequence[float]) -> None:
        self.values[impl] = list(values)
        if min(values) > 0:
            self.exponents[impl] = exponent(self.points, values)


def measure(curve: Curve, dtype: str, device: str, seconds: float, note: Note) -> Measured:
    """Measures the curve with every implementation that runs here."""
    works: dict[str, dict[int, Work]] = {}
    for impl in IMPLS:
        try:
            works[impl] = {size: _build(curve, impl, size, dtype, device) for size in curve.points}
        except (Unavailable, torch.OutOfMemoryError) as reason:
            note(f"{curve.family} {curve.what} over {curve.variable}, {impl}: {reason}")
    measured = Measured(curve.family, curve.what, curve.variable, "ms", list(curve.points))
    return _timed(measured, works, device, seconds)


def _build(curve: Curve, impl: str, size: int, dtype: str, device: str) -> Work:
    return curve.build(impl=impl, dtype=dtype, device=device, **curve.arguments(size))


def _timed(measured: Measured, works: Mapping[str, Mapping[int, Work]], device: str, seconds: float) -> Measured:
    named = {f"{impl} {size}": work for impl, sizes in works.items() for size, work in sizes.items()}
    times = compare(named, device=device, seconds=seconds, turn_seconds=0.01) if named else {}
    for impl in works:
        measured.add(impl, [1e3 * times[f"{impl} {size}"].median for size in measured.points])
    return measured


def over_threads(dtype: str, seconds: float, note: Note) -> Measured:
    """Measures token-pair messaging with 1, 2, 4, … threads, up to the number of cores: −1 would be perfect."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    points = [2**power for power in range(cores.bit_length())]
    curve = Curve("hdim", "token-pair messaging", "threads", tuple(points), hdim_cases.build, lambda _: hdim(4)(256))
    measured = Measured(curve.family, curve.what, curve.variable, "ms", points)
    if len(points) < 2:
        note("one core alone: no curve over threads")
        return measured
    before = torch.get_num_threads()

    def with_threads(work: Work, threads: int) -> Work:
        def run() -> object:
            torch.set_num_threads(threads)
            return work()

        return run

    try:
        work = _build(curve, "native", points[0], dtype, "cpu")
        return _timed(measured, {"native": {count: with_threads(work, count) for count in points}}, "cpu", seconds)
    except Unavailable as reason:
        note(f"curve over threads: {reason}")
        return measured
    finally:
        torch.set_num_threads(before)


def memory(points: Sequence[int], dtype: str, device: str, note: Note) -> Measured:
    """Measures the peak memory of token-pair messaging, forward and backward, over the length of the sentences."""
    measured = Measured("hdim", "token-pair messaging, fwd+bwd", "S", "bytes", list(points))
    for impl in IMPLS:
        try:
            measured.add(impl, [_peak(impl, size, dtype, device) for size in points])
        except (Unavailable, torch.OutOfMemoryError) as reason:
            note(f"memory of hdim, {impl}: {reason}")
    return measured


def _peak(impl: str, size: int, dtype: str, device: str) -> int:
    arguments = {"impl": impl, "dtype": dtype, "device": device, **hdim(1, "fwd+bwd")(size)}
    if torch.device(device).type == "cuda":
        return cuda_peak(hdim_cases.build(**arguments), device)
    return peak_memory(hdim_cases.build, arguments)
