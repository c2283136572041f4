"""The README's tables of kernels, from the committed rows."""

from __future__ import annotations

import math
import statistics

from benchmarks import readme_tables as tables
from benchmarks.cases import hdim as bench_hdim
from benchmarks.cases import hyper_model as bench_hyper_model
from benchmarks.cases import quantize as bench_quantize
from benchmarks.cases import system_steps as shapes
from benchmarks.cases import systems as bench_systems
from benchmarks.harness import measure as bench
from benchmarks.harness import training as bench_training
from benchmarks.readme_tables import block, milliseconds, named, table, without_empty
from benchmarks.report import bounds as promises

PACKAGES = {"hyper": "hyper-connections", "quantize": "vector-quantize-pytorch"}


class Rows:
    """The rows of one device; of rows that tell of the same thing the last one counts."""

    def __init__(self, device: str) -> None:
        self.all = bench.read_rows(tables.RESULTS / f"{device}.jsonl")
        self._last = {(r.op, r.case, r.pass_, r.dtype, r.impl): r for r in self.all}

    def get(self, op: str, case: str, pass_: str, impl: str, dtype: str = "float32") -> bench.Row | None:
        return self._last.get((op, case, pass_, dtype, impl))

    def time(self, *key: str) -> str:
        row = self.get(*key)
        return "" if row is None else milliseconds(row.ms_median)

    def ratio(self, op: str, case: str, pass_: str, impl: str, digits: int = 1) -> str:
        """How many times the native kernel is faster."""
        row, native = self.get(op, case, pass_, impl), self.get(op, case, pass_, "native")
        return "" if row is None or native is None else f"{row.ms_median / native.ms_median:.{digits}f}"

    def fraction(self, *key: str) -> str:
        row = self.get(*key)
        return "" if row is None or not promises.has_limit(row) else f"{row.fraction_of_limit:.2f}"

    def memory(self, *key: str) -> str:
        row = self.get(*key)
        return "" if row is None or row.peak_bytes is None else megabytes(row.peak_bytes)

    def runs(self, op: str, case: str) -> list[dict[str, float]]:
        """Times by implementation, run after run: a run ends where an implementation comes again."""
        found: list[dict[str, float]] = [{}]
        for row in self.all:
            if (row.op, row.case) == (op, case):
                if row.impl in found[-1]:
                    found.append({})
                found[-1][row.impl] = row.ms_median
        return found


def megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@block
def hdim() -> str:
    rows = Rows(tables.CPU)
    lines = []
    for case in ("S128", "S512", "S1024"):
        shape = " × ".join(str(size) for size in bench_hdim.CPU_SIZES[case][1:3])
        for pass_ in ("fwd", "fwd+bwd"):
            key = ("hdim_attention", case, pass_)
            times = [rows.time(*key, impl) for impl in ("native", "eager", "compile")]
            ratios = [rows.ratio(*key, impl) for impl in ("eager", "compile")]
            memory = [rows.memory(*key, impl) for impl in ("native", "eager")]
            lines.append([f"{shape}, {pass_}", *times, *ratios, rows.fraction(*key, "native"), *memory])
    head = (
        "B × S, pass | native | eager | `torch.compile` | ÷ eager | ÷ compile | of the limit | memory: native | eager"
    )
    return without_empty(head, lines)


@block
def hyper_boundary() -> str:
    rows = Rows(tables.CPU)
    lines = []
    for op, name in (("pre+post", "pre and post"), ("boundary", "boundary")):
        for case in ("shc", "dhc"):
            for pass_ in bench.PASSES:
                key = (op, case, pass_)
                times = [rows.time(*key, impl) for impl in ("native", "native separate", "eager")]
                measured = [*times, rows.ratio(*key, "eager"), rows.fraction(*key, "native")]
                lines.append([f"{case.upper()}, {name}", pass_, *measured])
    return without_empty(" | pass | native | as two calls | eager | ÷ eager | of the limit", lines)


@block
def hyper_package() -> str:
    rows, package = Rows(tables.CPU), PACKAGES["hyper"]
    impls = ("native", "eager", "compile", package, f"{package} compile")
    lines = []
    for pass_ in ("fwd", "fwd+bwd"):
        key = ("pre+post", "dhc-rms", pass_)
        ratios = [rows.ratio(*key, impl) for impl in impls[3:]]
        lines.append([pass_, *(rows.time(*key, impl) for impl in impls), *ratios, rows.fraction(*key, "native")])
    head = "pass | native | eager | `torch.compile` | package | package compiled | ÷ package | ÷ compiled"
    return without_empty(f"{head} | of the limit", lines)


@block
def hyper_model() -> str:
    runs = Rows(tables.CPU).runs("training step", "L12-d768")
    lines = []
    for kind in ("shc", "dhc", "mhc"):
        times = [run for run in runs if f"{kind} native" in run][-1]
        shares = [times.get(f"{kind} {impl}") for impl in ("native", "reference", "compile")]
        lines.append([f"{kind.upper()}", *("" if t is None else f"{t / times['plain']:.3f}" for t in shares)])
    plain = next((run["plain compile"] / run["plain"] for run in reversed(runs) if "plain compile" in run), None)
    lines.append(["plain residuals", "", "1", "" if plain is None else f"{plain:.3f}"])
    return without_empty(" | native | plain PyTorch | `torch.compile`", lines).replace("MHC", "mHC")


SYSTEMS = {
    "xlrb": "XLRB, H9",
    "lformer": "L-Former",
    "bypass": "bypass, stage 2",
    "telepathy": "telepathy, VQ",
}


@block
def systems() -> str:
    rows = Rows(tables.CPU)
    lines = []
    for system, name in SYSTEMS.items():
        size = shapes.CPU[system]
        scale = bench_training.scale(shapes.PAPER[system], size)
        keys = [(system, bench_systems.named(size), "fwd+bwd", impl) for impl in bench_systems.BACKENDS]
        lines.append([name, *_step(rows, size["B"] * size["S"], *keys), scale])
    shape = bench_hyper_model.settings(cuda=False)["L12-d768"].size
    keys = [("training step", "L12-d768", "fwd+bwd", f"dhc {how}") for how in ("native", "reference")]
    lines.append(["hyper-connections, DHC", *_step(rows, shape[0] * shape[1], *keys), bench_hyper_model.scale(shape)])
    head = " | native | plain PyTorch | ÷ native | tokens/s: native | plain | memory: native | plain"
    return without_empty(f"{head} | smaller than the paper's shape", lines)


def _step(rows: Rows, tokens: int, native: tuple[str, ...], plain: tuple[str, ...]) -> list[str]:
    """Times, ratio, tokens per second and memory of a training step on both backends."""
    found = [rows.get(*key) for key in (native, plain)]
    times = [math.nan if row is None else row.ms_median for row in found]
    rates = [f"{1e3 * tokens / time:,.0f}" for time in times]
    memory = [rows.memory(*key) for key in (native, plain)]
    return [rows.time(*native), rows.time(*plain), f"{times[1] / times[0]:.2f}", *rates, *memory]


@block
def quantize() -> str:
    rows, package = Rows(tables.CPU), PACKAGES["quantize"]
    sizes = {case: named(**dict(zip("NKD", s.size, strict=True))) for case, s in bench_quantize.settings(False).items()}
    lines_of = (
        ("nearest code, euclidean", "nearest", "K4096-D256", "fwd"),
        ("nearest code, cosine", "nearest", "K4096-D256-cos", "fwd"),
        (f"nearest code, {sizes['K1024-D64']}", "nearest", "K1024-D64", "fwd"),
        ("training step of the module", "train", "train", "fwd"),
        ("the same, cosine", "train", "train-cos", "fwd"),
        (f"sums per code, {sizes['sums']}", "statistics", "sums", "fwd"),
        *((f"FSQ, symmetric, {pass_}", "fsq", "fsq-8", pass_) for pass_ in bench.PASSES),
        *((f"FSQ, offset, {pass_}", "fsq", "fsq-8-offset", pass_) for pass_ in bench.PASSES),
    )
    lines = []
    for name, op, case, pass_ in lines_of:
        key = (op, case, pass_)
        times = [rows.time(*key, impl) for impl in ("native", "eager", "compile", "gemm", package)]
        lines.append([name, *times, rows.ratio(*key, package), rows.fraction(*key, "native")])
    large = ("nearest", "K65536-D64", "fwd", "native")
    n, k, _ = bench_quantize.settings(False)["K65536-D64"].size
    scores = 4 * n * k / 2**30
    head = " | native | eager | `torch.compile` | GEMM alone | package | ÷ package | of the limit"
    memory = rows.memory(*large)
    beyond = f",\nwith {memory} beyond inputs and outputs" if memory else ""
    return (
        f"{without_empty(head, lines)}\n{sizes['K65536-D64']}, where the scores alone would take {scores:.0f} GiB: "
        f"{rows.time(*large)}, {rows.fraction(*large)} of the limit{beyond}.\n"
    )


@block
def aggregate() -> str:
    rows = Rows(tables.CPU)
    lines = []
    for op, name in (("ema", "EMA scan"), ("ema-last", "EMA, last state"), ("gru", "GRU"), ("attention", "attention")):
        for case in ("L24-d128", "L24-d512"):
            for pass_ in ("fwd", "bwd"):
                key = (op, case, pass_)
                if rows.get(*key, "native") is None:
                    continue
                times = [rows.time(*key, impl) for impl in ("native", "eager", "compile", "cell", "gemm")]
                ratios = [rows.ratio(*key, impl) for impl in ("eager", "compile", "cell")]
                lines.append([f"{name}, d = {case[5:]}", pass_, *times, *ratios, rows.fraction(*key, "native")])
    head = " | pass | native | eager | `torch.compile` | `nn.GRUCell` | products alone"
    return without_empty(head + " | ÷ eager | ÷ compile | ÷ cell | of the limit", lines)


@block
def limits() -> str:
    """The roof of the machine, as it was measured beside the cases, and what torch reaches of it."""
    rows = [row for row in Rows(tables.CPU).all if promises.has_limit(row) and row.dtype == "float32"]
    lines = []
    if rows:
        fma, gemm = (max(row.extra[key] for row in rows) / 1e9 for key in ("fma_rate", "torch_gemm_rate"))
        lines.append(["multiply-adds, float32", f"{fma:.0f} GFLOP/s", f"{gemm:.0f} GFLOP/s (GEMM)"])
    for level in ("L1", "L2", "L3", "memory"):
        here = [row.extra for row in rows if row.extra["bytes_level"] == level]
        if here:
            keys = ("byte_rate", "copy_rate", "torch_copy_rate")
            moved, copied, torch = (statistics.median(extra[key] for extra in here) / 1e9 for key in keys)
            name = f"bytes of cases that {'only memory' if level == 'memory' else level} can hold"
            lines.append([name, f"{moved:.0f} GB/s, copies {copied:.0f} GB/s", f"{torch:.0f} GB/s (`copy_`)"])
    return table(" | limit | torch", lines)


@block
def bounds() -> str:
    """How many hold, and those that do not."""
    verdicts = promises.judged(Rows(tables.CPU).all)
    missed = [verdict.cells[:-1] for verdict in verdicts if not verdict.holds]
    shown = f"\n{table(' | '.join(promises.HEAD[:-1]), missed)}" if missed else ""
    return f"{promises.summary(verdicts)}\n{shown}"
