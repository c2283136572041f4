"""Every benchmark in one run: `python -m benchmarks [FAMILY…] --suite quick|full|toy --out DIR`.

The machine's limits come first, then the cases of all families, the curves and the errors. DIR gets `rows.jsonl`, all
else that was found as `found.json`, plots, and `report.html`, which holds everything in one file.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.cases import peers
from benchmarks.harness import cases as harness_cases
from benchmarks.harness.cases import (
    DTYPES,
    IMPLS,
    Case,
    beyond,
    format_table,
    not_compiled,
    said_beyond,
    without_compile,
)
from benchmarks.harness.measure import LimitProbe, Row, Unavailable, compare, device_name, provenance, write_rows
from benchmarks.harness.roof import machine, moves_of_all, multiply_adds_of_all, widest
from benchmarks.report import numerics, page, scaling
from xlayer_ext import functional
from xlayer_ext._backend import use_native
from xlayer_ext.memory import keep_freed_memory

FAMILIES = ("hdim", "routing", "hyper", "quantize", "aggregate", "hyper_model", "systems")
FULL_ONLY = ("hyper_model", "systems")  # whole training steps
ABOUT = {
    "quick": "one case of every operator and pass, and one against each package; two curves",
    "full": "every case, with torch.compile and peak memory; all curves, hyper_model and systems",
    "toy": "tiny cases in an instant, whose times say nothing: shows that all runs",
}


@dataclass(frozen=True)
class Plan:
    """The cost of a suite: seconds for a case and a curve, sizes of the memory curve, of copies and of GEMMs."""

    seconds: float
    limit_seconds: float
    memory_points: tuple[int, ...]
    buffer_bytes: int = 0
    gemm_sizes: tuple[int, int] | None = None  # of CPUs
    shrink: int = 1  # divisor of the points of curves
    minutes: float | None = None  # none: until all is done
    everything: bool = False


PLANS = {
    "quick": Plan(0.7, 0.3, (64, 128, 256), gemm_sizes=(512, 1024), minutes=5.0),
    "full": Plan(3.0, 1.0, (128, 256, 512, 1024), everything=True),
    "toy": Plan(0.02, 0.02, (16, 32), buffer_bytes=8 << 20, gemm_sizes=(128, 256), shrink=8),
}


def parser() -> argparse.ArgumentParser:
    suites = "; ".join(f"{name}: {about}" for name, about in ABOUT.items())
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("family", nargs="*", metavar="FAMILY", help=f"{', '.join(FAMILIES)} (default: all)")
    made.add_argument("--suite", choices=PLANS, default="quick", help=f"{suites} (default: quick)")
    made.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: cpu)")
    made.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="(default: float32)")
    made.add_argument("--out", metavar="DIR", help="folder of the results (default: runs/benchmarks-DATE-TIME)")
    made.add_argument("--minutes", type=float, help="leave cases out that would begin later (default of quick: 5)")
    made.add_argument("--seconds", type=float, help="time for one case, shared by its implementations")
    made.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: what torch takes)")
    made.add_argument("--label", metavar="NAME", help="the device's name in the rows")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which quick does anyway")
    made.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    return made


# ---- the run -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The options of a run, and its findings so far."""

    options: argparse.Namespace
    plan: Plan
    out: Path
    found: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def note(self, text: str) -> None:
        print(f"  note: {text}", file=sys.stderr)
        self.found["notes"].append(text)

    def fail(self, text: str) -> None:
        print(f"  WRONG: {text}", file=sys.stderr)
        self.found["failures"].append(text)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", file=sys.stderr, flush=True)

    def late(self) -> bool:
        """Tells whether three quarters of the time are over: the rest is for curves, errors and the report."""
        minutes = self.plan.minutes if self.options.minutes is None else self.options.minutes
        return minutes is not None and time.monotonic() - self.start > 45 * minutes

    def save(self) -> None:
        (self.out / "found.json").write_text(json.dumps(self.found, indent=1) + "\n")


def main(argv: Sequence[str]) -> int:
    made = parser()
    options = made.parse_args(argv)
    if unknown := set(options.family) - set(FAMILIES):
        made.error(f"unknown family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    out = Path(options.out or time.strftime("runs/benchmarks-%Y%m%d-%H%M%S"))
    if (out / "rows.jsonl").exists():
        made.error(f"--out {out} holds results already")
    if options.threads:
        torch.set_num_threads(options.threads)
    if torch.device(options.device).type == "cuda":
        torch.cuda.set_device(options.device)
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    run = Run(options, PLANS[options.suite], out)
    try:
        measure(run, argv)
    except Unavailable as reason:  # no limits: no case was measured
        made.error(str(reason))
    except KeyboardInterrupt:
        run.note("stopped by hand")
    run.found["minutes"] = (time.monotonic() - run.start) / 60
    run.save()
    print(format_table(run.rows))
    run.say(f"report: {page.write(out)}")
    return 1 if run.found["failures"] else 0


def measure(run: Run, argv: Sequence[str]) -> None:
    options = run.options
    modules = load(options.family, run.plan)
    run.found |= {"command": shlex.join(["python", "-m", "benchmarks", *argv]), "suite": options.suite}
    run.found |= {"device": options.label or device_name(options.device), **provenance()}
    run.found |= {"notes": [], "failures": [], "peers": peers.states(options.device), "curves": [], "numerics": []}
    cases = [(module, case) for module in modules for case in chosen(module, options, run.plan)]
    run.say(f"{options.suite}: {len(cases)} cases of {', '.join(_name(module) for module in modules)}")
    for peer in run.found["peers"]:
        if peer["state"].startswith("missing"):
            run.note(f"{peer['package']} {peer['state']}")
    if not run.plan.everything:
        run.note(f"the suite {options.suite} leaves torch.compile out")
    run.say("limits of the machine")
    probes = measure_limits(run)
    measure_cases(run, by_turns(cases), probes)
    del probes  # their buffers would be in the way of the memory curve
    measure_curves(run, {_name(module) for module in modules})
    measure_numerics(run, modules)


def load(families: Sequence[str], plan: Plan) -> list[ModuleType]:
    wanted = families or [name for name in FAMILIES if plan.everything or name not in FULL_ONLY]
    return [importlib.import_module(f"benchmarks.cases.{name}") for name in wanted]


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


# ---- limits --------------------------------------------------------------------------------------------------------


def measure_limits(run: Run) -> dict[str, LimitProbe]:
    """Measures all limits of the machine, and the cost of a call; returns the probes of the dtypes asked for."""
    device, plan = run.options.device, run.plan
    cpu = torch.device(device).type == "cpu"
    found: dict[str, Any] = measure_roof(plan) if cpu else {}
    probes, copies, gemms = {}, [], {}
    for dtype in DTYPES:
        element = getattr(torch, dtype)
        if dtype not in run.options.dtype:
            gemms[dtype] = gemm_rate(device, element)
            continue
        sizes = plan.gemm_sizes if cpu else None
        amount: dict[str, Any] = {"seconds": plan.limit_seconds, "buffer_bytes": plan.buffer_bytes}
        probe = LimitProbe(device, element, gemm_sizes=sizes, **amount)
        works = probe.works(plan.buffer_bytes or 1 << 28)
        facts = probe.limits(compare(works, device=device, seconds=plan.limit_seconds, min_rounds=3)).facts
        prefix = "torch_" if cpu else ""
        probes[dtype], gemms[dtype] = probe, facts[prefix + "gemm_rate"]
        copies.append(facts[prefix + "copy_rate"])
    found |= {"torch_copy_rate": statistics.median(copies), "gemm_rates": gemms, "launches": launches(device)}
    run.found["limits"] = found
    run.say(f"torch: copy {found['torch_copy_rate'] / 1e9:.1f} GB/s; {_rates(gemms)}")
    run.save()
    return probes


def measure_roof(plan: Plan) -> dict[str, Any]:
    """Measures a CPU's own limits: multiply-adds of every instruction set, moving bytes on every level."""
    threads = torch.get_num_threads()
    roof = widest(threads)
    calls = 8 if plan.shrink == 1 else 2
    return {
        "machine": machine(roof.isa, threads).facts(),
        "multiply_adds": multiply_adds_of_all(sorted({1, threads}), calls),
        "levels": moves_of_all(roof, plan.buffer_bytes, calls),
    }


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Returns the flop/s of the best square product; the next size is left out where it would take seconds."""
    largest = 8192 if torch.device(device).type == "cuda" else 2048
    n, best, seconds = 256, 0.0, 0.0
    while n <= largest and seconds < 0.02:
        factors = [torch.randn(n, n, device=device).to(dtype) for _ in range(2)]
        work = functools.partial(torch.mm, *factors)
        times = compare({"gemm": work}, device=device, seconds=0, turn_seconds=0, cold=False)
        seconds = times["gemm"].median
        best, n = max(best, 2 * n**3 / seconds), 2 * n
    return best


def _rates(gemms: dict[str, float]) -> str:
    return "GEMM " + ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in gemms.items())


def launches(device: str, calls: int = 200) -> dict[str, float]:
    """Measures the seconds of a call on next to nothing, by function: its fixed cost."""
    x, mask = torch.ones(1, 1, 8, device=device), torch.ones(1, 1, dtype=torch.bool, device=device)
    works: dict[str, Callable[[], object]] = {"torch.neg": lambda: torch.neg(x)}
    if use_native("masked_mean", x):
        works["functional.masked_mean"] = lambda: functional.masked_mean(x, mask)
    return {name: min(_seconds_per_call(work, device, calls) for _ in range(5)) for name, work in works.items()}


@torch.no_grad()
def _seconds_per_call(work: Callable[[], object], device: str, calls: int) -> float:
    work()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


# ---- cases ---------------------------------------------------------------------------------------------------------

Cases = list[tuple[ModuleType, Case]]


def chosen(module: ModuleType, options: argparse.Namespace, plan: Plan) -> list[Case]:
    """Selects the suite's cases. Quick takes the first of each operator, pass and dtype, and the first with each peer,
    from the cases made for it (`suite="quick"`) where an operator has them."""
    cases: list[Case] = module.make_cases(options)
    if options.suite == "toy":
        return [case for case in cases if case.suite == "toy"]
    if plan.everything:
        return [case for case in cases if case.suite in ("main", "full")]
    smaller = {case.op for case in cases if case.suite == "quick"}
    seen: set[tuple[str, ...]] = set()
    picked = []
    for case in cases:
        facts = {(case.op, case.pass_, case.dtype, impl) for impl in ("", *not_compiled(case.peers))}
        if case.suite == ("quick" if case.op in smaller else "main") and not facts <= seen:
            seen |= facts
            picked.append(case)
    return picked


def by_turns(cases: Cases) -> Cases:
    """Interleaves the operators' cases, so that a run that ends early has some of each."""
    turns: dict[tuple[str, str], int] = {}
    ranked = []
    for module, case in cases:
        operator = (_name(module), case.op)
        turns[operator] = turns.get(operator, 0) + 1
        ranked.append((turns[operator], (module, case)))
    return [entry for _, entry in sorted(ranked, key=lambda pair: pair[0])]


def measure_cases(run: Run, cases: Cases, probes: dict[str, LimitProbe]) -> None:
    options, left_out = run.options, []
    compiled = run.plan.everything and not options.no_compile
    for at, (module, case) in enumerate(cases, 1):
        name = f"{_name(module)} {case.op} {case.name} {case.pass_} {case.dtype}"
        if run.late():
            left_out.append(name)
            continue
        rows = measure_case(run, module, case, probes[case.dtype], compiled)
        write_rows(run.out / "rows.jsonl", rows)
        run.rows += rows
        for row in beyond(rows):
            run.fail(said_beyond(row))
        run.say(f"{at}/{len(cases)} {name}: {_brief(rows)}")
    if left_out:
        run.note(f"{len(left_out)} cases left out, as the time was up: {', '.join(left_out)}")


def measure_case(run: Run, module: ModuleType, case: Case, probe: LimitProbe, compiled: bool) -> list[Row]:
    """Measures one case; returns its rows, or none where the kernel is wrong, which the report then shows."""
    options = run.options
    impls: Sequence[str] = () if _name(module) in FULL_ONLY else IMPLS
    if not compiled:
        case, impls = without_compile(case), not_compiled(impls)
    try:
        return harness_cases.measure(
            case,
            impls,
            probe,
            device=options.device,
            seconds=options.seconds or run.plan.seconds,
            memory=run.plan.everything and not options.no_memory,
            check=getattr(module, "check", None),
            label=options.label,
            note=run.note,
        )
    except AssertionError as wrong:
        run.fail(f"{case.op} {case.name} {case.pass_} {case.dtype}: {wrong}")
        return []


def _brief(rows: Sequence[Row]) -> str:
    native = next((row for row in rows if row.impl == "native"), None)
    parts = [f"{row.impl} {row.ms_median:.3g} ms" for row in rows]
    if native is not None:
        parts.append(f"{native.fraction_of_limit:.2f} of the limit")
    return ", ".join(parts) or "nothing runs"


# ---- curves and errors ---------------------------------------------------------------------------------------------


def measure_curves(run: Run, families: set[str]) -> None:
    device, dtype = run.options.device, run.options.dtype[0]
    cpu = torch.device(device).type == "cpu"
    found: list[scaling.Measured] = []

    def add(measured: scaling.Measured) -> None:
        if measured.values:
            found.append(measured)
            slopes = ", ".join(f"{impl} {slope:.2f}" for impl, slope in measured.exponents.items())
            run.say(f"{measured.what} over {measured.variable}, {measured.unit}: exponent {slopes}")

    for curve in scaling.curves(cuda=not cpu):
        if curve.family in families and (run.plan.everything or curve.quick):
            points = tuple(max(2, point // run.plan.shrink) for point in curve.points)
            add(scaling.measure(replace(curve, points=points), dtype, device, run.plan.seconds, run.note))
    if "hdim" in families and cpu and run.plan.everything:
        add(scaling.over_threads(dtype, run.plan.seconds, run.note))
    if "hdim" in families and not run.options.no_memory:
        add(scaling.memory(run.plan.memory_points, dtype, device, run.note))
    run.found["curves"] = [asdict(measured) for measured in found]
    run.save()


def measure_numerics(run: Run, modules: Sequence[ModuleType]) -> None:
    run.say("errors against float64")
    for found in numerics.measure(modules, run.options.device, DTYPES, run.note):
        run.found["numerics"].append(found.to_dict())
        if not found.holds:
            said = found.said or f"{found.result}: error {found.native:.2e} exceeds {found.bound:.2e}"
            run.fail(f"{found.op} {found.dtype}: {said}")
    run.save()
