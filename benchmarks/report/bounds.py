"""Bounds that the project promises of its CPU rows (float32, 2 cores), and whether measured rows keep them.

A fraction is of the machine's own roof (`benchmarks.harness.roof`), so none is above 1; older rows without it say
nothing of fractions. Rows are compared within one run on one machine. A ratio to another implementation is promised
only where the roof leaves room for it: `possible` computes how much.

`python -m benchmarks.report.bounds [FILE]` prints every bound, what the rows of FILE show and whether it holds; the
exit code is 1 unless all of them do. A bound without its rows counts as not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.measure import Row, read_rows

ROWS = Path(__file__).parents[1] / "results/xeon-amx-avx512-2core.jsonl"
LIMIT, SPEED, TIME, MEMORY = "fraction_of_limit", "speedup", "time", "memory"
AT_LEAST = (LIMIT, SPEED)  # the others are upper bounds


class Bound(NamedTuple):
    """A number of the row of `impl`, beside the implementation `over` unless there is none."""

    family: str
    op: str
    case: str
    pass_: str
    what: str
    value: float
    over: str | None = None
    impl: str = "native"

    @property
    def promised(self) -> str:
        sign = "≥" if self.what in AT_LEAST else "≤"
        if self.what == LIMIT:
            return f"{sign} {self.value:g} of the limit"
        if self.over is None:
            return f"{sign} {self.value / 1e6:g} MB"
        kind = {SPEED: "the speed", TIME: "the time", MEMORY: "the memory"}[self.what]
        return f"{sign} {self.value:g} × {kind} of {self.over}"

    def holds(self, measured: float) -> bool:
        return measured >= self.value if self.what in AT_LEAST else measured <= self.value


HYPER_PACKAGE, VQ_PACKAGE = "hyper-connections", "vector-quantize-pytorch"

# Nine tenths of what the rows in ROWS show: set from them, so that they hold there by construction.
FRACTIONS = {
    ("hdim", "hdim_attention"): {
        "S128": {"fwd": 0.45, "fwd+bwd": 0.43},
        "S512": {"fwd": 0.49, "fwd+bwd": 0.5},
        "S1024": {"fwd": 0.52, "fwd+bwd": 0.52},
    },
    ("hyper", "pre+post"): {
        "shc": {"fwd": 0.58, "bwd": 0.41},
        "dhc": {"fwd": 0.42, "bwd": 0.37},
        "dhc-rms": {"fwd": 0.55, "fwd+bwd": 0.35},
    },
    ("hyper", "boundary"): {
        "shc": {"fwd": 0.56, "bwd": 0.35},
        "dhc": {"fwd": 0.49, "bwd": 0.26},
    },
    ("quantize", "nearest"): {
        "K4096-D256": {"fwd": 0.42},
        "K65536-D64": {"fwd": 0.45},
    },
    ("aggregate", "ema"): {
        "L24-d128": {"fwd": 0.47, "bwd": 0.25},
        "L24-d512": {"fwd": 0.35, "bwd": 0.35},
    },
    ("aggregate", "gru"): {
        "L24-d128": {"fwd": 0.5, "bwd": 0.37},
        "L24-d512": {"fwd": 0.58, "bwd": 0.42},
    },
    ("aggregate", "attention"): {
        "L24-d128": {"fwd": 0.43, "bwd": 0.29},
        "L24-d512": {"fwd": 0.56, "bwd": 0.42},
    },
}
BOUNDS = (
    *(
        Bound(*operator, case, pass_, LIMIT, least)
        for operator, cases in FRACTIONS.items()
        for case, passes in cases.items()
        for pass_, least in passes.items()
    ),
    *(
        bound
        for case in ("S128", "S512", "S1024")  # longer sentences no worse
        for bound in (
            Bound("hdim", "hdim_attention", case, "fwd", SPEED, 9, "eager"),
            Bound("hdim", "hdim_attention", case, "fwd", SPEED, 3.5, "compile"),
            Bound("hdim", "hdim_attention", case, "fwd", MEMORY, 1 / 20, "eager"),
            Bound("hdim", "hdim_attention", case, "fwd+bwd", SPEED, 4.5, "eager"),
            Bound("hdim", "hdim_attention", case, "fwd+bwd", MEMORY, 1 / 20, "eager"),
        )
    ),
    # Beside the package itself, and its compiled backward, more was promised once than the roof leaves room for.
    Bound("hyper", "pre+post", "dhc-rms", "fwd", SPEED, 7, f"{HYPER_PACKAGE} compile"),
    Bound("hyper", "boundary", "shc", "fwd+bwd", SPEED, 1.5, "native separate"),
    Bound("hyper", "boundary", "dhc", "fwd+bwd", SPEED, 1.5, "native separate"),
    Bound("hyper", "training step", "L12-d768", "fwd+bwd", TIME, 1.10, "plain", "shc native"),
    Bound("hyper", "training step", "L12-d768", "fwd+bwd", TIME, 1.10, "plain", "dhc native"),
    Bound("hyper", "training step", "L12-d768", "fwd+bwd", TIME, 1.10, "plain", "mhc native"),
    Bound("quantize", "nearest", "K4096-D256", "fwd", TIME, 1.2, "gemm"),
    Bound("quantize", "nearest", "K4096-D256", "fwd", SPEED, 2.7, VQ_PACKAGE),
    Bound("quantize", "train", "train", "fwd", SPEED, 4, VQ_PACKAGE),
    Bound("quantize", "fsq", "fsq-8", "fwd", SPEED, 15, VQ_PACKAGE),
    Bound("quantize", "fsq", "fsq-8-offset", "fwd", SPEED, 15, VQ_PACKAGE),
    Bound("quantize", "nearest", "K65536-D64", "fwd", MEMORY, 64e6),
    *(
        bound
        for case in ("L24-d128", "L24-d512")
        for pass_ in ("fwd", "bwd")
        for bound in (
            Bound("aggregate", "ema", case, pass_, SPEED, 4, "eager"),
            Bound("aggregate", "ema", case, pass_, SPEED, 1.5, "compile"),
        )
    ),
    Bound("aggregate", "gru", "L24-d128", "fwd", SPEED, 1.3, "cell"),
    Bound("aggregate", "gru", "L24-d512", "fwd", SPEED, 0.9, "gemm"),
)

Run = dict[str, Row]  # rows by implementation


def is_promised(row: Row) -> bool:
    """Tells whether bounds apply to such rows: float32 on 2 cores of a CPU. GPU rows give a rate of the other units
    (`alu`)."""
    on_cpu = "alu" not in row.extra and row.device != "emulator"
    return on_cpu and row.dtype == "float32" and row.extra.get("threads") == 2


def runs(rows: Iterable[Row], bound: Bound) -> list[Run]:
    """Groups the bound's rows by run, since only rows measured together, on one machine, may be compared."""
    found: list[Run] = [{}]
    machine: tuple[Any, ...] | None = None
    for row in rows:
        if is_promised(row) and (row.family, row.op, row.case, row.pass_) == bound[:4]:
            here = (row.device, row.extra.get("machine"))
            if row.impl in found[-1] or here != machine:
                found.append({})
            found[-1][row.impl], machine = row, here
    return found


def measured(bound: Bound, rows: Sequence[Row]) -> float | None:
    """Returns the value of the last run that has the rows for it."""
    values = [value for run in runs(rows, bound) if (value := _value(bound, run)) is not None]
    return values[-1] if values else None


def possible(bound: Bound, rows: Sequence[Row]) -> float | None:
    """Returns the largest possible fraction, 1, or ratio of speeds: how far the other implementation is from the limit.

    None where no row has a limit, and for bounds of other kinds.
    """
    if bound.what == LIMIT:
        return 1.0
    others = [run[bound.over] for run in runs(rows, bound) if bound.over in run and bound.what == SPEED]
    found = [1 / row.fraction_of_limit for row in others if has_limit(row)]
    return found[-1] if found else None


def has_limit(row: Row) -> bool:
    """Tells whether the row's fraction is of the machine's roof: older ones are of what torch reached."""
    return "machine" in row.extra and not row.extra.get("beyond_limit")


def _value(bound: Bound, run: Run) -> float | None:
    row, other = run.get(bound.impl), run.get(bound.over or bound.impl)
    if row is None or other is None:
        return None
    if bound.what == LIMIT:
        return row.fraction_of_limit if has_limit(row) else None
    if bound.what == SPEED:
        return other.ms_median / row.ms_median
    if bound.what == TIME:
        return row.ms_median / other.ms_median
    if bound.over is None:
        return row.peak_bytes
    return row.peak_bytes / other.peak_bytes if row.peak_bytes is not None and other.peak_bytes else None


class Verdict(NamedTuple):
    bound: Bound
    measured: float | None

    @property
    def holds(self) -> bool | None:
        return None if self.measured is None else self.bound.holds(self.measured)

    @property
    def cells(self) -> list[str]:
        """Returns the cells of a table's line: operator, case, pass, promised, measured, holds."""
        bound = self.bound
        op = bound.op if bound.impl == "native" else f"{bound.op}, {bound.impl}"
        mark = {None: "", True: "✓", False: "✗"}[self.holds]
        return [op, bound.case, bound.pass_, bound.promised, self._said(), mark]

    def _said(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.bound.what == MEMORY and self.bound.over is None:
            return f"{self.measured / 1e6:.1f} MB"
        return f"{self.measured:.3g}"


HEAD = ("operator", "case", "pass", "promised", "measured", "holds")


def judged(rows: Sequence[Row], bounds: Iterable[Bound] = BOUNDS) -> list[Verdict]:
    return [Verdict(bound, measured(bound, rows)) for bound in bounds]


def summary(verdicts: Sequence[Verdict]) -> str:
    """Describes how many bounds hold, do not, and are not measured."""
    states = [verdict.holds for verdict in verdicts]
    counts = f"{states.count(True)} hold, {states.count(False)} do not, {states.count(None)} are not measured"
    return f"Of {len(states)} bounds {counts}."


def main(arguments: Sequence[str]) -> int:
    verdicts = judged(read_rows(arguments[0] if arguments else ROWS), BOUNDS)
    lines = [HEAD, *(verdict.cells for verdict in verdicts)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(summary(verdicts))
    return 0 if all(verdict.holds for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
