"""Runs the cases of a benchmark script: all implementations of each, a table, the command line.

A script (`benchmarks.cases`) lists its cases, builds one, and calls `main`; `measure` takes the times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.harness.measure import (
    BEYOND,
    PASSES,
    PROBE,
    Builder,
    LimitProbe,
    Row,
    Timing,
    Unavailable,
    Work,
    compare,
    cuda_peak,
    device_name,
    peak_memory,
    provenance,
    write_rows,
)
from xlayer_ext.memory import keep_freed_memory

DTYPES = ("float64", "float32", "bfloat16", "float16")
IMPLS = ("native", "eager", "compile")


@dataclass(frozen=True)
class Case:
    """One comparison. `build(impl=…, **arguments)` makes the inputs and returns the work to be timed.

    `bytes` and `flops` are the fewest that the work needs: each input read once, each output written once; `alu` is the
    fewest float32 operations outside GEMMs. `halve(arguments)` gives the arguments of the same case with half the work,
    or None: where plain PyTorch does not fit into memory, a smaller case shows its speed. `peers` are implementations
    beyond the usual ones that `build` knows by these names: other packages, or another way to do the same work.
    `tokens` are those of a training step, whose rows tell tokens per second; `facts` are further keys of the rows.
    """

    family: str
    op: str
    name: str
    pass_: str
    dtype: str
    bytes: int
    flops: int
    build: Builder
    arguments: dict[str, Any]
    suite: str = "main"  # "main", "full" (only with --suite full) or "toy" (only with --quick)
    alu: int = 0
    halve: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
    peers: tuple[str, ...] = ()
    tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


Check = Callable[[Case], None]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function for the shapes of one case; `run` resets the compiler between cases."""
    return torch.compile(function, dynamic=False)


def _forget_compiled() -> None:
    """Resets the compiler: at its recompilation limit dynamo would run the plain function without a word."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes seconds
        torch.compiler.reset()


def settled(work: Work) -> Work:
    """Calls the work once and returns it; raises `Unavailable` where a compiler fails in that call."""
    try:
        work()
    except Exception as error:
        raise Unavailable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
    return work


def run(
    cases: Sequence[Case],
    impls: Sequence[str],
    *,
    device: str = "cpu",
    seconds: float = 3.0,
    limit_seconds: float = 1.0,
    buffer_bytes: int = 0,
    memory: bool = True,
    check: Check | None = None,
    out: str | None = None,
    label: str | None = None,
) -> list[Row]:
    """Times every case with every implementation that is available; notes on stderr name what is skipped.

    `check(case)` comes first where the native kernel is available, and raises when its results are wrong. `seconds` is
    spent on each case, the machine's limits included, which are measured in the same rounds; `limit_seconds` and
    `buffer_bytes` are those of `LimitProbe`. Each case's rows are appended to the file `out` once it is done.
    `label` names the device in the rows.
    """
    dtypes = dict.fromkeys(case.dtype for case in cases)
    probes = {
        name: LimitProbe(device, getattr(torch, name), seconds=limit_seconds, buffer_bytes=buffer_bytes)
        for name in dtypes
    }
    rows: list[Row] = []
    for case in cases:
        probe = probes[case.dtype]
        found = measure(case, impls, probe, device=device, seconds=seconds, memory=memory, check=check, label=label)
        if out:
            write_rows(out, found)
        rows += found
    return rows


def _on_stderr(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)


def measure(
    case: Case,
    impls: Sequence[str],
    probe: LimitProbe,
    *,
    device: str = "cpu",
    seconds: float = 3.0,
    memory: bool = True,
    check: Check | None = None,
    label: str | None = None,
    note: Callable[[str], None] = _on_stderr,
) -> list[Row]:
    """Measures one case of `run`, and returns its rows; calls `note` with what is left out, and why."""
    _forget_compiled()
    works, peaks = _prepare(case, [*impls, *case.peers], device, memory, check, note)
    smaller, parts = _smaller_eager(case, device) if works and "eager" in set(impls) - works.keys() else ({}, 1)
    probes = probe.works(footprint(case)) if works else {}
    times = compare(works | smaller | probes, device=device, seconds=seconds) if works else {}
    return list(_rows(case, times, peaks, probe, label or device_name(device), provenance(), parts))


def footprint(case: Case) -> int:
    """Returns the fewest bytes that a call touches: `case.bytes`, less what a forward with its backward reads twice.

    With inputs i and outputs o the forward moves i + o and the backward 2·i + o: all inputs, the outputs' gradients,
    and a gradient for each input. Together these are 2·(i + o) of 3·i + 2·o bytes, at least two thirds.
    """
    return case.bytes * 2 // 3 if case.pass_ == "fwd+bwd" else case.bytes


def _prepare(
    case: Case, impls: Sequence[str], device: str, memory: bool, check: Check | None, note: Callable[[str], None]
) -> tuple[dict[str, Work], dict[str, int | None]]:
    """Builds and checks the works that can run here; returns them with their peak memory."""
    works: dict[str, Work] = {}
    peaks: dict[str, int | None] = {}
    for impl in impls:
        arguments = {"impl": impl, **case.arguments}
        try:
            work = _fitting(case.build, arguments, device)
            if check and impl == "native":
                check(case)
            works[impl] = work
            peaks[impl] = _peak(case.build, work, arguments, device) if memory else None
        except Unavailable as reason:
            note(f"{case.name} {case.pass_} {case.dtype} {impl}: {reason}")
    return works, peaks


def _fitting(build: Builder, arguments: Mapping[str, Any], device: str) -> Work:
    """Builds the work; raises `Unavailable` where a first call does not fit into the GPU's memory."""
    try:
        work = build(**arguments)
        if torch.device(device).type == "cuda":
            work()
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
    else:
        return work
    torch.cuda.empty_cache()  # here, where the exception no longer holds the tensors of the call
    raise Unavailable(f"out of memory: {reason}")


def _peak(build: Builder, work: Work, arguments: Mapping[str, Any], device: str) -> int:
    return cuda_peak(work, device) if torch.device(device).type == "cuda" else peak_memory(build, arguments)


def _smaller_eager(case: Case, device: str) -> tuple[dict[str, Work], int]:
    """Builds plain PyTorch on the largest 1/2, 1/4, … of the case that fits; returns it and the number of parts."""
    arguments, parts = case.arguments, 1
    while case.halve and (smaller := case.halve(arguments)):
        arguments, parts = smaller, 2 * parts
        try:
            return {_SMALLER: _fitting(case.build, {"impl": "eager", **arguments}, device)}, parts
        except Unavailable:
            continue
    return {}, 1


_SMALLER = "eager on a part"


def _rows(
    case: Case,
    times: Mapping[str, Timing],
    peaks: Mapping[str, int | None],
    probe: LimitProbe,
    device: str,
    origin: Mapping[str, Any],
    parts: int = 1,
) -> Iterator[Row]:
    if not times:
        return
    limits = probe.limits(times)
    least = (case.bytes, case.flops)
    facts: dict[str, Any] = {"bound": limits.bound(*least, case.alu), **limits.facts}
    if probe.alu_source:
        facts |= {"alu": case.alu, "alu_rate": limits.alu_rate, "alu_rate_source": probe.alu_source}
    eager = times["eager"].median if "eager" in times else None
    if _SMALLER in times:
        eager = parts * times[_SMALLER].median
        facts["eager_parts"] = parts
    for impl, timing in times.items():
        if impl.startswith(PROBE) or impl == _SMALLER:
            continue
        extra = {"spread": timing.spread, **facts, **case.facts, **origin}
        if case.tokens:
            extra |= {"tokens": case.tokens, "tokens_per_second": case.tokens / timing.median}
        if eager:
            extra["speedup_over_eager"] = eager / timing.median
        fraction = limits.fraction(*least, timing.median, case.alu)
        if "machine" in facts:  # a CPU, whose limit is one
            extra["beyond_limit"] = fraction > BEYOND
        what = (case.family, case.op, case.name, case.pass_, case.dtype, device, impl)
        ms = (timing.median * 1e3, timing.minimum * 1e3)
        yield Row(*what, *ms, case.bytes, case.flops, peaks.get(impl), fraction, extra)


def main(
    description: str,
    make_cases: Callable[[argparse.Namespace], list[Case]],
    argv: Sequence[str] | None = None,
    check: Check | None = None,
    *,
    impls: Sequence[str] = IMPLS,
    table: Callable[[Sequence[Row]], str] | None = None,
) -> int:
    """Runs a benchmark script: its cases, with every implementation, as a table or as JSON lines on stdout.

    `impls` are those of every case, beside its peers; `table` formats the rows, by default `format_table`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines, not as a table")
    parser.add_argument("--out", metavar="FILE", help="append the rows to this JSON-lines file as well")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only these cases, whatever the suite")
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only these operators")
    parser.add_argument("--pass", nargs="+", dest="passes", choices=PASSES, help="only these passes")
    parser.add_argument("--impl", nargs="+", metavar="NAME", help="only these implementations")
    parser.add_argument("--suite", choices=("main", "full"), default="main", help="full: masks and variants as well")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="element types")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--label", metavar="NAME", help="the device's name in the rows (default: what it says itself)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: what torch takes)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for one case, shared by its implementations")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, of peers too")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--quick", action="store_true", help="the toy case only, in an instant: shows that all runs")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if torch.device(options.device).type == "cuda":
        torch.cuda.set_device(options.device)  # events and streams are the current device's
    keep_freed_memory()
    chosen = _chosen(parser, options, make_cases(options))
    if options.no_compile:
        chosen = [without_compile(case) for case in chosen]
        impls = not_compiled(impls)
    if options.impl:
        known = list(dict.fromkeys([*impls, *(peer for case in chosen for peer in case.peers)]))
        if unknown := set(options.impl) - set(known):
            parser.error(f"unknown impl {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        chosen = [replace(case, peers=tuple(peer for peer in case.peers if peer in options.impl)) for case in chosen]
        impls = [impl for impl in impls if impl in options.impl]
    quick = {"seconds": 0.1, "limit_seconds": 0.02, "buffer_bytes": 32 << 20}
    amount: dict[str, Any] = quick if options.quick else {"seconds": options.seconds}
    amount |= {"memory": not options.no_memory, "check": check, "out": options.out, "label": options.label}
    try:
        rows = run(chosen, impls, device=options.device, **amount)
    except Unavailable as reason:  # no limits
        parser.error(str(reason))
    print("\n".join(row.to_json() for row in rows) if options.json else (table or format_table)(rows))
    wrong = beyond(rows)
    for row in wrong:
        print(f"error: {said_beyond(row)}", file=sys.stderr)
    return 1 if wrong else 0


def beyond(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that are faster than the machine's limit, whose counts, or the limit, must be wrong."""
    return [row for row in rows if row.extra.get("beyond_limit")]


def said_beyond(row: Row) -> str:
    what = f"{row.op} {row.case} {row.pass_} {row.dtype} {row.impl}"
    return f"{what}: {row.fraction_of_limit:.2f} of the limit, which nothing can exceed: the benchmark is wrong"


def _chosen(parser: argparse.ArgumentParser, options: argparse.Namespace, cases: list[Case]) -> list[Case]:
    """Returns the cases that the options ask for; an unknown name ends the program."""
    wanted = options.case or (["toy"] if options.quick else None)
    for what, names, known in (
        ("case", wanted, [case.name for case in cases]),
        ("op", options.op, [case.op for case in cases]),
    ):
        if names and (unknown := set(names) - set(known)):
            there = ", ".join(dict.fromkeys(known))
            parser.error(f"unknown {what} {', '.join(sorted(unknown))}; there are {there}")
    return [
        case
        for case in cases
        if (case.name in wanted if wanted else case.suite in ("main", options.suite))
        and (not options.op or case.op in options.op)
        and (not options.passes or case.pass_ in options.passes)
    ]


def not_compiled(impls: Sequence[str]) -> tuple[str, ...]:
    """Returns those of `impls` that do not use `torch.compile`."""
    return tuple(impl for impl in impls if not impl.endswith("compile"))


def without_compile(case: Case) -> Case:
    return replace(case, peers=not_compiled(case.peers))


def format_table(rows: Sequence[Row]) -> str:
    """Formats the rows as a table for each operator, under the device's name and measured limits."""
    ops = dict.fromkeys(row.op for row in rows)
    if len(ops) > 1:
        return "\n\n".join(f"{op}\n{format_table([row for row in rows if row.op == op])}" for op in ops)
    wide = max([9, *(len(row.impl) + 1 for row in rows)])
    head = f"{'case':<14}{'pass':<9}{'dtype':<10}{'impl':<{wide}}{'ms':>10}{'min':>10}{'spread':>8}{'MB peak':>10}"
    lines = [f"{head}{'÷ eager':>9}{'of limit':>10} bound by"]
    for row in rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
        bound = row.extra.get("bound", "-")
        speedup = f"{row.extra['speedup_over_eager']:.2f}x" if "speedup_over_eager" in row.extra else "-"
        lines.append(
            f"{row.case:<14}{row.pass_:<9}{row.dtype:<10}{row.impl:<{wide}}{row.ms_median:>10.3f}{row.ms_min:>10.3f}"
            f"{row.extra['spread']:>8.2f}{peak:>10}{speedup:>9}{row.fraction_of_limit:>10.3f} {bound}"
            f"{' BEYOND THE LIMIT' if row.extra.get('beyond_limit') else ''}"
        )
    if rows:
        lines.insert(0, f"{rows[-1].device}, {rows[-1].extra['threads']} threads; {format_limits(rows)}")
    return "\n".join(lines)


def format_limits(rows: Sequence[Row]) -> str:
    """Formats the limits in some rows of one device, with torch's rates."""

    def span(key: str, unit: float, name: str, rows: Sequence[Row] = rows) -> str:
        found = sorted(row.extra[key] / unit for row in rows if key in row.extra)
        ends = dict.fromkeys(f"{value:.3g}" for value in (found[0], found[-1])) if found else ["-"]
        return f"{' to '.join(ends)} {name}"

    cpu = "fma_rate" in rows[-1].extra
    gemm, copy = ("torch_gemm_rate", "torch_copy_rate") if cpu else ("gemm_rate", "copy_rate")
    dtypes: dict[str, list[Row]] = {}
    for row in rows:
        dtypes.setdefault(row.dtype, []).append(row)
    gemms = ", ".join(f"{dtype} {span(gemm, 1e9, 'GFLOP/s', some)}" for dtype, some in dtypes.items())
    rivals = f"copy {span(copy, 1e9, 'GB/s')}, GEMM {gemms}"
    if cpu:
        levels: dict[str, list[Row]] = {}
        for row in rows:
            levels.setdefault(row.extra["bytes_level"], []).append(row)
        moved = ", ".join(f"{level} {span('byte_rate', 1e9, 'GB/s', some)}" for level, some in levels.items())
        flops = ", ".join(f"{dtype} {span('fma_rate', 1e9, 'GFLOP/s', some)}" for dtype, some in dtypes.items())
        return f"limits: {moved}, multiply-adds {flops}; torch: {rivals}"
    if "alu_rate" in rows[-1].extra:
        alu = rows[-1].extra
        rivals += f", float32 {alu['alu_rate'] / 1e12:.1f} T operations/s ({alu['alu_rate_source']})"
    return rivals
