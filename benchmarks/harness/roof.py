"""Measures a processor's limits with `_native.Roof`: multiply-adds, the clock beside them, and moving bytes.

Rates are the best of all blocks that ran: a busy host can only lower a rate, and a limit is what nothing exceeds.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

_native: Any
try:
    _native = importlib.import_module("xlayer_ext._native")
except ImportError:  # not built
    _native = None

CPU = Path("/sys/devices/system/cpu/cpu0/cache")
COPIES = ("copy", "streaming copy", "copy in streams", "library copy")
READS, WRITES = ("read", "read in streams"), ("write", "streaming write")
MOVES = (*COPIES, *READS, *WRITES)

# A block of multiply-adds takes tens of microseconds, so that the clock beside it is the one that it ran at, and the
# chain is long against the time that reading a clock takes. The first blocks are left out: wide vectors start slowly.
STEPS, ADDITIONS, BLOCKS, FIRST = 8192, 16384, 64, 16
NEAR = 4  # blocks before and after the best one whose chains tell its clock: one chain alone may have been disturbed


class Roof(Protocol):
    """The part of `_native.Roof` that is used here; tests have one of their own."""

    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def lanes(self, dtype: str) -> int: ...
    def flops_per_step(self, dtype: str) -> int: ...
    def multiply_adds(self, dtype: str, steps: int, additions: int, blocks: int) -> list[tuple[float, float]]: ...
    def move(self, kind: str, footprint: int, blocks: int) -> tuple[int, list[float]]: ...


def isas() -> list[str]:
    """Returns the instruction sets that can be measured here, the widest first; none without `_native`."""
    return [] if _native is None else list(_native.roof_isas())


def widest(threads: int) -> Roof:
    """Returns the roof of the instruction set whose float32 rate is the highest, on one thread.

    Raises `IndexError` where there is none.
    """
    works = [MultiplyAdds(_native.Roof(isa, 1), "float32") for isa in isas()]
    for work in [*works, *works, *works]:
        work()
    best = sorted(works, key=lambda work: work.rate)[-1]
    roof: Roof = _native.Roof(best.roof.isa, threads)
    return roof


# ---- multiply-adds and the clock -----------------------------------------------------------------------------------


class MultiplyAdds:
    """A work for `compare`: independent multiply-adds; keeps the best rate and clock."""

    def __init__(self, roof: Roof, dtype: str) -> None:
        self.roof, self.dtype = roof, dtype
        self.rate = 0.0  # flop/s of all threads
        self.clock = 0.0  # Hz, while they ran at that rate

    def __call__(self) -> None:
        blocks = self.roof.multiply_adds(self.dtype, STEPS, ADDITIONS, FIRST + BLOCKS)
        blocks = blocks[FIRST:] or blocks  # few on a busy machine, which wastes no time on them
        seconds, best = min((seconds, at) for at, (seconds, _) in enumerate(blocks))
        rate = STEPS * self.roof.flops_per_step(self.dtype) / seconds
        if rate > self.rate:
            near = blocks[max(0, best - NEAR) : best + NEAR + 1]
            self.rate, self.clock = rate, ADDITIONS / min(seconds for _, seconds in near)

    @property
    def per_cycle(self) -> float:
        """Returns the vectors of multiply-adds that one thread finishes in a cycle."""
        return self.rate / (2 * self.roof.lanes(self.dtype) * self.roof.threads * self.clock)

    @property
    def pipes(self) -> float:
        """Returns the number of pipes that explains the rate, rounded up; halves without fused multiply-adds, whose
        parts share three."""
        parts = 2 if self.roof.isa == "baseline" else 1
        return max(1, math.ceil(parts * self.per_cycle / 1.02)) / parts

    def facts(self) -> dict[str, Any]:
        measured = {"isa": self.roof.isa, "dtype": self.dtype, "threads": self.roof.threads, "rate": self.rate}
        return measured | {"clock": self.clock, "pipes": self.pipes, "of_pipes": self.per_cycle / self.pipes}


# ---- bytes ---------------------------------------------------------------------------------------------------------


class Moves:
    """A work for `compare`: every way of moving bytes within one footprint; keeps the best rate of each.

    A footprint that a cache holds is moved a few times, so that the cache has it.
    """

    def __init__(self, roof: Roof, footprint: int) -> None:
        self.roof, self.footprint = roof, footprint
        self.rates = dict.fromkeys(MOVES, 0.0)
        self.blocks = max(1 if level_of(footprint, roof.threads) == MEMORY else 5, min(8, (40 << 20) // footprint))

    def __call__(self) -> None:
        for kind in MOVES:
            moved, seconds = self.roof.move(kind, self.footprint, self.blocks)
            self.rates[kind] = max(self.rates[kind], moved / min(seconds))

    def facts(self) -> dict[str, float]:
        """Returns bytes per second, read and written ones counted, by the best way of each."""
        copy, read, write = (max(self.rates[kind] for kind in kinds) for kinds in (COPIES, READS, WRITES))
        return {"copy_rate": copy, "read_rate": read, "write_rate": write}

    @property
    def rate(self) -> float:
        """Returns the fastest rate at which bytes move, whatever part of them is read and written."""
        return max(self.rates.values())


def rates(multiply_adds: MultiplyAdds, moves: Moves) -> dict[str, Any]:
    """Returns keys of a row: the rates of a limit, and where they were measured."""
    roof = multiply_adds.roof
    level = level_of(moves.footprint, roof.threads)
    found = {"fma_rate": multiply_adds.rate, "clock": multiply_adds.clock, **moves.facts(), "byte_rate": moves.rate}
    return found | {"bytes_level": level, "machine": machine(roof.isa, roof.threads).facts()}


MEMORY = "memory"


@functools.cache
def cache_levels() -> dict[str, tuple[int, int]]:
    """Returns the bytes of each data cache and the number of processors that share it; empty where unknown."""
    found: dict[str, tuple[int, int]] = {}
    for index in sorted(CPU.glob("index*")):
        try:
            level, kind, size, shared = (
                (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = (int(size.removesuffix("K")) << 10, _count(shared))
    return found


def _count(cpus: str) -> int:
    """Counts the processors in a list such as 0-3,8."""
    ends = [part.partition("-") for part in cpus.split(",") if part]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends) or 1


def capacities(threads: int) -> dict[str, int]:
    """Returns the bytes that the caches of this many threads hold together, by level."""
    return {level: size * math.ceil(threads / shared) for level, (size, shared) in cache_levels().items()}


def level_of(footprint: int, threads: int) -> str:
    """Returns the smallest cache that could hold the footprint, or "memory"."""
    return next((level for level, size in capacities(threads).items() if footprint <= size), MEMORY)


def memory_footprint(threads: int) -> tuple[int, bool]:
    """Returns the bytes of buffers beyond all caches, four times the largest, and whether so much memory is free.

    A quarter of the free memory at most is taken.
    """
    wanted = max(4 * max(capacities(threads).values(), default=64 << 20), 256 << 20)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return wanted, True
    return min(wanted, free // 4), wanted <= free // 4


# ---- the machine ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Facts that rows must share before they may be compared."""

    cpu: str
    isa: str
    cores: int
    threads: int
    caches: Mapping[str, int]

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def processor_name() -> str:
    """Returns the processor's model, by its name in the system."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = (line.partition(":")[2] for line in info.read_text().splitlines() if line.startswith("model name"))
        model = next(names, model).replace("(R)", "").strip()
    return model


def machine(isa: str, threads: int) -> Machine:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    caches = {level: size for level, (size, _) in cache_levels().items()}
    return Machine(processor_name(), isa, cores, threads, caches)


# ---- all limits of a machine ---------------------------------------------------------------------------------------


def multiply_adds_of_all(threads: Sequence[int], calls: int = 4) -> list[dict[str, Any]]:
    """Measures multiply-adds with every instruction set, element type and number of threads."""
    works = [
        MultiplyAdds(_native.Roof(isa, count), dtype)
        for isa in isas()
        for dtype in ("float32", "float64")
        for count in threads
    ]
    for _ in range(calls):
        for work in works:
            work()
    return [work.facts() for work in works]


def moves_of_all(roof: Roof, most_bytes: int = 0, calls: int = 4) -> list[dict[str, Any]]:
    """Measures moving bytes in every cache and in memory.

    `enough` is false of the memory's where its buffers are smaller than four times the largest cache, as memory is
    short or `most_bytes` says so.
    """
    footprint, enough = memory_footprint(roof.threads)
    sizes = {level: size // 2 for level, size in capacities(roof.threads).items()} | {MEMORY: footprint}
    found = []
    for level, size in sizes.items():
        work = Moves(roof, min(size, most_bytes or size))
        for _ in range(calls if work.footprint < 1 << 28 else 3):
            work()
        whole = level != MEMORY or (enough and work.footprint == size)
        measured = {"level": level, "footprint": work.footprint, **work.facts(), "byte_rate": work.rate}
        found.append(measured | {"enough": whole})
    return found
