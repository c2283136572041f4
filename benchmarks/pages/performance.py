"""The page docs/performance.md and its figures, from the committed rows of the kernels."""

from __future__ import annotations

import math
import statistics

from benchmarks.cases import hyper_model
from benchmarks.cases import system_steps as shapes
from benchmarks.cases import systems as steps
from benchmarks.harness import measure, training
from benchmarks.pages import facts, figures, text
from benchmarks.pages.text import figure, part, table, without_empty
from benchmarks.report import bounds as promises

PACKAGES = {"hyper": "hyper-connections", "quantize": "vector-quantize-pytorch"}
LIMIT_HEAD = "of the limit"


class Rows:
    """The rows of one device; of several rows of the same case, the last one counts."""

    def __init__(self, device: str = "") -> None:
        self.all = measure.read_rows(text.RESULTS / f"{device or text.CPU}.jsonl")
        self._last = {(r.op, r.case, r.pass_, r.dtype, r.impl): r for r in self.all}

    def get(self, op: str, case: str, pass_: str, impl: str, dtype: str = "float32") -> measure.Row | None:
        return self._last.get((op, case, pass_, dtype, impl))

    def time(self, *key: str) -> str:
        row = self.get(*key)
        return "" if row is None else text.milliseconds(row.ms_median)

    def speedup(self, op: str, case: str, pass_: str, impl: str) -> float | None:
        """Divides another implementation's time by the native kernel's."""
        row, native = self.get(op, case, pass_, impl), self.get(op, case, pass_, "native")
        return None if row is None or native is None else row.ms_median / native.ms_median

    def ratio(self, *key: str) -> str:
        found = self.speedup(*key)
        return "" if found is None else f"{found:.1f}"

    def fraction(self, *key: str) -> str:
        row = self.get(*key)
        return "" if row is None or not promises.has_limit(row) else f"{row.fraction_of_limit:.2f}"

    def memory(self, *key: str) -> str:
        row = self.get(*key)
        return "" if row is None or row.peak_bytes is None else text.megabytes(row.peak_bytes)

    def runs(self, op: str, case: str) -> list[dict[str, float]]:
        """Groups times by run: a run ends where an implementation comes again."""
        found: list[dict[str, float]] = [{}]
        for row in self.all:
            if (row.op, row.case) == (op, case):
                if row.impl in found[-1]:
                    found.append({})
                found[-1][row.impl] = row.ms_median
        return found


def page() -> str:
    """Builds docs/performance.md."""
    rows = Rows()
    return text.page(
        f"""# Performance

Measured in float32 on {machine(rows)}. Every number on this page comes from
{{source}}`benchmarks/rows`; `make results` writes the page, and a test fails when page and rows differ.

**No GPU has been measured yet.** The CUDA kernels are proven on an emulator and by their machine code
([what is promised](promises.md)); `bash benchmarks/gpu_check.sh OUT_DIR` measures them on a machine that has one.

How to read the tables:

- *native* is the fused kernel, *eager* the same formula in plain PyTorch, *compile* that formula under
  `torch.compile`. "÷ eager" is how many times the native kernel is faster.
- *{LIMIT_HEAD}* is the time that the least work needs at the processor's own roof, divided by the time taken. The
  roof is measured in the same rounds: independent multiply-adds in registers, and the fastest of copying, reading
  and writing as many bytes. A row above 1 fails the benchmark.
- *memory* is the peak beyond inputs, outputs and gradients.
- The host was shared with other work; `spread` in a row says how much the times varied.""",
        f"## Limits of this machine\n\n{limits(rows)}",
        f"## Pair attention\n\n{hdim(rows)}",
        f"## Hyper-connections\n\n{hyper(rows)}",
        f"## Quantization\n\n{quantize(rows)}",
        f"## Aggregation over depth\n\n{aggregate(rows)}",
        f"## Whole training steps\n\n{systems(rows)}",
        f"## Bounds\n\n{bounds(rows)}",
    )


def pictures() -> dict[str, str]:
    """Draws the figures of the page, and the README's, by name."""
    rows = Rows()
    return {
        "speed": _speed(rows),
        "roofline-hdim": _roofline(rows, "hdim", [
            (f"{facts.hdim_shape(case)}, {pass_}", "hdim_attention", case, pass_)
            for case in ("S128", "S512", "S1024") for pass_ in ("fwd", "fwd+bwd")
        ]),
        "roofline-hyper": _roofline(rows, "hyper", [
            (f"{case.upper()} {name}, {pass_}", op, case, pass_)
            for op, name in (("pre+post", "pre+post"), ("boundary", "boundary"))
            for case in ("shc", "dhc") for pass_ in ("fwd", "bwd")
        ]),
        "roofline-quantize": _roofline(rows, "quantize", [
            ("nearest, K = 4096", "nearest", "K4096-D256", "fwd"),
            ("nearest, K = 65536", "nearest", "K65536-D64", "fwd"),
            ("nearest, K = 1024", "nearest", "K1024-D64", "fwd"),
            ("sums per code", "statistics", "sums", "fwd"),
            ("training step", "train", "train", "fwd"),
            ("FSQ, fwd", "fsq", "fsq-8", "fwd"),
            ("FSQ, bwd", "fsq", "fsq-8", "bwd"),
        ]),
        "roofline-aggregate": _roofline(rows, "aggregate", [
            (f"{name} d = {case[5:]}, {pass_}", op, case, pass_)
            for op, name in (("ema", "EMA"), ("gru", "GRU"), ("attention", "attention"))
            for case in ("L24-d128", "L24-d512") for pass_ in ("fwd", "bwd")
        ]),
    }  # fmt: skip


def _roofline(rows: Rows, family: str, cases: list[tuple[str, str, str, str]]) -> str:
    found = [(label, rows.get(op, case, pass_, "native")) for label, op, case, pass_ in cases]
    values = [
        figures.Bar(label, row.fraction_of_limit, f"{row.fraction_of_limit:.2f}", figures.COLOURS[family])
        for label, row in found
        if row is not None and promises.has_limit(row)
    ]
    return figures.bars("Fraction of the machine's limit, float32", values, 1.0, "limit = 1")


SHOWN = {
    "pair attention": ("hdim", (("forward", "hdim_attention", "S512", "fwd"),
                                ("with backward", "hdim_attention", "S512", "fwd+bwd"))),
    "hyper-connections (DHC), boundary": ("hyper", (("forward", "boundary", "dhc", "fwd"),
                                                   ("with backward", "boundary", "dhc", "fwd+bwd"))),
    "vector quantization": ("quantize", (("nearest code", "nearest", "K1024-D64", "fwd"),
                                         ("training step", "train", "train", "fwd"))),
    "EMA over depth": ("aggregate", (("forward", "ema", "L24-d128", "fwd"), ("backward", "ema", "L24-d128", "bwd"))),
}  # fmt: skip


def _speed(rows: Rows) -> str:
    values = []
    for name, (family, cases) in SHOWN.items():
        for at, (label, op, case, pass_) in enumerate(cases):
            speed = rows.speedup(op, case, pass_, "eager")
            if speed is not None:
                heading = name if at == 0 else ""
                values.append(figures.Bar(label, speed, f"{speed:.1f}×", figures.COLOURS[family], heading))
    return figures.bars("Times as fast as plain PyTorch, 2 CPU cores, float32", values)


# ---- sections --------------------------------------------------------------------------------------------------------


def machine(rows: Rows) -> str:
    last = rows.all[-1]
    name = last.device.removesuffix(" AVX512").removesuffix(" Processor")
    torch = ".".join(last.extra["versions"]["torch"].split(".")[:2])
    return f"{last.extra['threads']} cores of an {name} with AVX-512, with torch {torch}"


def limits(rows: Rows) -> str:
    measured = [row for row in rows.all if promises.has_limit(row) and row.dtype == "float32"]
    lines = []
    if measured:
        fma, gemm = (max(row.extra[key] for row in measured) / 1e9 for key in ("fma_rate", "torch_gemm_rate"))
        lines.append(["multiply-adds, float32", f"{fma:.0f} GFLOP/s", f"{gemm:.0f} GFLOP/s (GEMM)"])
    for level in ("L1", "L2", "L3", "memory"):
        here = [row.extra for row in measured if row.extra["bytes_level"] == level]
        if here:
            keys = ("byte_rate", "copy_rate", "torch_copy_rate")
            moved, copied, torch = (statistics.median(extra[key] for extra in here) / 1e9 for key in keys)
            name = f"bytes of cases that {'only memory' if level == 'memory' else level} can hold"
            lines.append([name, f"{moved:.0f} GB/s, copies {copied:.0f} GB/s", f"{torch:.0f} GB/s (`copy_`)"])
    return "What the machine itself can do, and what torch reaches of it:\n\n" + table(" | limit | torch", lines)


def hdim(rows: Rows) -> str:
    lines = []
    for case in ("S128", "S512", "S1024"):
        for pass_ in ("fwd", "fwd+bwd"):
            key = ("hdim_attention", case, pass_)
            times = [rows.time(*key, impl) for impl in ("native", "eager", "compile")]
            ratios = [rows.ratio(*key, impl) for impl in ("eager", "compile")]
            memory = [rows.memory(*key, impl) for impl in ("native", "eager")]
            shape = f"{facts.hdim_shape(case)}, {pass_}"
            lines.append([shape, *times, *ratios, rows.fraction(*key, "native"), *memory])
    head = f"B × S, pass | native | eager | compile | ÷ eager | ÷ compile | {LIMIT_HEAD} | memory: native | eager"
    return part(
        "hdim",
        f"`hdim_attention` at the size that XLRB has on roberta-large, {facts.hdim_size()}:",
        without_empty(head, lines),
        figure("roofline-hdim", "Fractions of the limit that hdim_attention reaches"),
    )


def hyper(rows: Rows) -> str:
    lines = []
    for op, name in (("pre+post", "pre and post"), ("boundary", "boundary")):
        for case in ("shc", "dhc"):
            for pass_ in measure.PASSES:
                key = (op, case, pass_)
                times = [rows.time(*key, impl) for impl in ("native", "native separate", "eager")]
                measured = [*times, rows.ratio(*key, "eager"), rows.fraction(*key, "native")]
                lines.append([f"{case.upper()}, {name}", pass_, *measured])
    kernels = without_empty(f" | pass | native | as two calls | eager | ÷ eager | {LIMIT_HEAD}", lines)
    return part(
        "hyper",
        f"With {facts.hyper_size()}:",
        kernels,
        figure("roofline-hyper", "Fractions of the limit that the hyper-connection kernels reach"),
        f"Beside the PyPI package {facts.pinned('hyper-connections')}, whose norm is RMSNorm, with the same weights "
        "(pre and post, streams packed into the batch):",
        _hyper_package(rows),
        f"A training step of {facts.hyper_model_size()}, as a multiple of the same model with plain residuals:",
        _hyper_model(rows),
    )


def _hyper_package(rows: Rows) -> str:
    package = PACKAGES["hyper"]
    impls = ("native", "eager", "compile", package, f"{package} compile")
    lines = []
    for pass_ in ("fwd", "fwd+bwd"):
        key = ("pre+post", "dhc-rms", pass_)
        ratios = [rows.ratio(*key, impl) for impl in impls[3:]]
        lines.append([pass_, *(rows.time(*key, impl) for impl in impls), *ratios, rows.fraction(*key, "native")])
    head = "pass | native | eager | compile | package | package compiled | ÷ package | ÷ compiled"
    return without_empty(f"{head} | {LIMIT_HEAD}", lines)


def _hyper_model(rows: Rows) -> str:
    runs = rows.runs("training step", "L12-d768")
    lines = []
    for kind in ("shc", "dhc", "mhc"):
        times = [run for run in runs if f"{kind} native" in run][-1]
        shares = [times.get(f"{kind} {impl}") for impl in ("native", "reference", "compile")]
        lines.append([f"{kind.upper()}", *("" if t is None else f"{t / times['plain']:.3f}" for t in shares)])
    plain = next((run["plain compile"] / run["plain"] for run in reversed(runs) if "plain compile" in run), None)
    lines.append(["plain residuals", "", "1", "" if plain is None else f"{plain:.3f}"])
    return without_empty(" | native | plain PyTorch | compile", lines).replace("MHC", "mHC")


def quantize(rows: Rows) -> str:
    package = PACKAGES["quantize"]
    lines_of = (
        ("nearest code, euclidean", "nearest", "K4096-D256", "fwd"),
        ("nearest code, cosine", "nearest", "K4096-D256-cos", "fwd"),
        (f"nearest code, {facts.quantize_size('K1024-D64')}", "nearest", "K1024-D64", "fwd"),
        ("training step of the module", "train", "train", "fwd"),
        ("the same, cosine", "train", "train-cos", "fwd"),
        (f"sums per code, {facts.quantize_size('sums')}", "statistics", "sums", "fwd"),
        *((f"FSQ, symmetric, {pass_}", "fsq", "fsq-8", pass_) for pass_ in measure.PASSES),
        *((f"FSQ, offset, {pass_}", "fsq", "fsq-8-offset", pass_) for pass_ in measure.PASSES),
    )
    lines = []
    for name, op, case, pass_ in lines_of:
        key = (op, case, pass_)
        times = [rows.time(*key, impl) for impl in ("native", "eager", "compile", "gemm", package)]
        lines.append([name, *times, rows.ratio(*key, package), rows.fraction(*key, "native")])
    large = ("nearest", "K65536-D64", "fwd", "native")
    memory = rows.memory(*large)
    beyond = f", with {memory} beyond inputs and outputs" if memory else ""
    return part(
        "quantize",
        f"With {facts.quantize_size('K4096-D256')}, and {facts.fsq_size()} for FSQ. *GEMM alone* is x·cᵀ by torch; "
        f"*package* is {facts.pinned('vector-quantize-pytorch')} with the same codebook, its whole module.",
        without_empty(f" | native | eager | compile | GEMM alone | package | ÷ package | {LIMIT_HEAD}", lines),
        f"With {facts.quantize_size('K65536-D64')} the scores alone would take "
        f"{facts.score_bytes('K65536-D64') / 2**30:.0f} GiB. The search takes {rows.time(*large)}, "
        f"{rows.fraction(*large)} {LIMIT_HEAD}{beyond}.",
        figure("roofline-quantize", "Fractions of the limit that the quantization kernels reach"),
    )


def aggregate(rows: Rows) -> str:
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
    head = " | pass | native | eager | compile | `nn.GRUCell` | products alone"
    return part(
        "aggregate",
        f"With {facts.aggregate_size()}. *Products alone* are the unit's matrix products by torch, layer by layer.",
        without_empty(head + f" | ÷ eager | ÷ compile | ÷ cell | {LIMIT_HEAD}", lines),
        figure("roofline-aggregate", "Fractions of the limit that the aggregation kernels reach"),
    )


SYSTEMS = {
    "xlrb": "XLRB, H9",
    "lformer": "L-Former",
    "bypass": "bypass, stage 2",
    "telepathy": "telepathy, VQ",
}


def systems(rows: Rows) -> str:
    lines = []
    for system, name in SYSTEMS.items():
        size = shapes.CPU[system]
        scale = training.scale(shapes.PAPER[system], size)
        keys = [(system, steps.named(size), "fwd+bwd", impl) for impl in steps.BACKENDS]
        lines.append([name, *_step(rows, size["B"] * size["S"], *keys), scale])
    shape = hyper_model.settings(cuda=False)["L12-d768"].size
    keys = [("training step", "L12-d768", "fwd+bwd", f"dhc {how}") for how in ("native", "reference")]
    lines.append(["hyper-connections, DHC", *_step(rows, shape[0] * shape[1], *keys), hyper_model.scale(shape)])
    head = " | native | plain PyTorch | ÷ native | tokens/s: native | plain | memory: native | plain"
    return part(
        "systems",
        """Forward, loss and the gradient of every trained parameter, with random weights on random tokens, the same
model on both backends (`python -m benchmarks systems`). On two cores the systems are smaller than in their papers,
each so that the kernels' share of the step stays near what it is there. Memory is the peak beyond parameters and
gradients.

At these sizes the models' own matrix products decide: the search for codes and a side path over pooled taps are too
small a part of a step to show in its time. The bypass has no kernel of its own; its ratio is noise alone.""",
        without_empty(f"{head} | smaller than the paper's shape", lines),
    )


def _step(rows: Rows, tokens: int, native: tuple[str, ...], plain: tuple[str, ...]) -> list[str]:
    """Formats times, ratio, tokens per second and memory of a training step on both backends."""
    found = [rows.get(*key) for key in (native, plain)]
    times = [math.nan if row is None else row.ms_median for row in found]
    rates = [f"{1e3 * tokens / time:,.0f}" for time in times]
    memory = [rows.memory(*key) for key in (native, plain)]
    return [rows.time(*native), rows.time(*plain), f"{times[1] / times[0]:.2f}", *rates, *memory]


def bounds(rows: Rows) -> str:
    """Describes how many bounds hold, and lists those that do not."""
    verdicts = promises.judged(rows.all)
    missed = [verdict.cells[:-1] for verdict in verdicts if not verdict.holds]
    shown = table(" | ".join(promises.HEAD[:-1]), missed) if missed else ""
    return part(
        "bounds",
        f"""{{source}}`benchmarks/bounds` lists what the project demands of its own float32 rows on two cores, none
of it beyond the machine's limit. `python -m benchmarks.report.bounds` judges a file of rows. The fractions of the limit
were set to nine tenths of these same rows: they hold by construction, and guard what was reached.
{promises.summary(verdicts)}""",
        "These do not hold in the committed rows:" if missed else "",
        shown,
    )
