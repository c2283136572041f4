"""The numbers of the README, from the committed results: `make results` writes them, a test compares them.

README.md names its generated parts: what stands between `<!-- results: NAME -->` and `<!-- end -->` is the text of the
function NAME below. A new table is a new function, and a pair of such lines.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from xlayer_ext import bench

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCKS: dict[str, Callable[[], str]] = {}
EPYC, XEON = "epyc-avx512-2core", "xeon-avx512-2core"
PACKAGES = {"hyper": "hyper-connections", "quantize": "vector-quantize-pytorch"}


def block(function: Callable[[], str]) -> Callable[[], str]:
    BLOCKS[function.__name__] = function
    return function


def rewritten(text: str) -> str:
    """``text`` with every generated part made anew; a name without a function raises `KeyError`."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]().rstrip()}\n{match[3]}", text)


# ---- what tables are made of -----------------------------------------------------------------------------------------


class Rows:
    """The rows of one device; of rows that tell of the same thing the last one counts."""

    def __init__(self, device: str) -> None:
        self.all = bench.read_rows(RESULTS / f"{device}.jsonl")
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
        return "" if row is None else f"{row.fraction_of_limit:.2f}"

    def memory(self, *key: str) -> str:
        row = self.get(*key)
        return "" if row is None or row.peak_bytes is None else _megabytes(row.peak_bytes)

    def runs(self, op: str, case: str) -> list[dict[str, float]]:
        """Times by implementation, run after run: a run ends where an implementation comes again."""
        found: list[dict[str, float]] = [{}]
        for row in self.all:
            if (row.op, row.case) == (op, case):
                if row.impl in found[-1]:
                    found.append({})
                found[-1][row.impl] = row.ms_median
        return found


def milliseconds(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def study(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Markdown; ``head`` is the first line without its outer bars."""
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |") + "\n"


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def interval(found: dict[str, Any], digits: int = 1) -> str:
    return f"{100 * found['low']:.{digits}f} – {100 * found['high']:.{digits}f} %"


# ---- kernels ---------------------------------------------------------------------------------------------------------


@block
def hdim() -> str:
    rows = Rows(XEON)
    lines = []
    for case, shape in (("S128", "8 × 128"), ("S512", "2 × 512"), ("S1024", "1 × 1024")):
        for pass_ in ("fwd", "fwd+bwd"):
            key = ("hdim_attention", case, pass_)
            times = [rows.time(*key, impl) for impl in ("native", "eager", "compile")]
            ratios = [rows.ratio(*key, impl) for impl in ("eager", "compile")]
            memory = [rows.memory(*key, impl) for impl in ("native", "eager")]
            lines.append([f"{shape}, {pass_}", *times, *ratios, rows.fraction(*key, "native"), *memory])
    head = (
        "B × S, pass | native | eager | `torch.compile` | ÷ eager | ÷ compile | of the limit | memory: native | eager"
    )
    return table(head, lines)


@block
def hyper_boundary() -> str:
    rows = Rows(EPYC)
    lines = []
    for op, name in (("pre+post", "pre and post"), ("boundary", "boundary")):
        for case in ("shc", "dhc"):
            for pass_ in bench.PASSES:
                key = (op, case, pass_)
                times = [rows.time(*key, impl) for impl in ("native", "native separate", "eager")]
                measured = [*times, rows.ratio(*key, "eager"), rows.fraction(*key, "native")]
                lines.append([f"{case.upper()}, {name}", pass_, *measured])
    return table(" | pass | native | as two calls | eager | ÷ eager | of the limit", lines)


@block
def hyper_package() -> str:
    rows, package = Rows(EPYC), PACKAGES["hyper"]
    impls = ("native", "eager", "compile", package, f"{package} compile")
    lines = []
    for pass_ in ("fwd", "fwd+bwd"):
        key = ("pre+post", "dhc-rms", pass_)
        ratios = [rows.ratio(*key, impl) for impl in impls[3:]]
        lines.append([pass_, *(rows.time(*key, impl) for impl in impls), *ratios])
    return table("pass | native | eager | `torch.compile` | package | package compiled | ÷ package | ÷ compiled", lines)


@block
def hyper_model() -> str:
    runs = Rows(EPYC).runs("training step", "L12-d768")
    lines = []
    for kind in ("shc", "dhc", "mhc"):
        times = [run for run in runs if f"{kind} native" in run][-1]
        shares = [times.get(f"{kind} {impl}") for impl in ("native", "reference", "compile")]
        lines.append([f"{kind.upper()}", *("" if t is None else f"{t / times['plain']:.3f}" for t in shares)])
    plain = next(run for run in reversed(runs) if "plain compile" in run)
    lines.append(["plain residuals", "", "1", f"{plain['plain compile'] / plain['plain']:.3f}"])
    return table(" | native | plain PyTorch | `torch.compile`", lines).replace("MHC", "mHC")


@block
def quantize() -> str:
    rows, package = Rows(EPYC), PACKAGES["quantize"]
    named = (
        ("nearest code, euclidean", "nearest", "K4096-D256", "fwd"),
        ("nearest code, cosine", "nearest", "K4096-D256-cos", "fwd"),
        ("N = 8192, K = 1024, D = 64", "nearest", "K1024-D64", "fwd"),
        ("training step of the module", "train", "train", "fwd"),
        ("the same, cosine", "train", "train-cos", "fwd"),
        ("sums per code, N = 8192, K = 1024", "statistics", "sums", "fwd"),
        *((f"FSQ, symmetric, {pass_}", "fsq", "fsq-8", pass_) for pass_ in bench.PASSES),
        *((f"FSQ, offset, {pass_}", "fsq", "fsq-8-offset", pass_) for pass_ in bench.PASSES),
    )
    lines = []
    for name, op, case, pass_ in named:
        key = (op, case, pass_)
        times = [rows.time(*key, impl) for impl in ("native", "eager", "compile", "gemm", package)]
        lines.append([name, *times, rows.ratio(*key, package), rows.fraction(*key, "native")])
    large = ("nearest", "K65536-D64", "fwd", "native")
    return (
        table(" | native | eager | `torch.compile` | GEMM alone | package | ÷ package | of the limit", lines)
        + f"\nN = K = 65,536, D = 64, where the scores alone would take 16 GiB: {rows.time(*large)}, "
        f"{rows.fraction(*large)} of the measured GEMM\nrate, with {rows.memory(*large)} beyond inputs and outputs.\n"
    )


@block
def aggregate() -> str:
    rows = Rows(EPYC)
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
    return table(head + " | ÷ eager | ÷ compile | ÷ cell | of the limit", lines)


# ---- studies ---------------------------------------------------------------------------------------------------------


@block
def hyper_lm() -> str:
    found = study("hyper_lm-stdlib-lm")["rows"]
    first = next(row for row in found if row["name"] == "plain")
    lines = []
    for row in found:
        name = "plain" if row is first else f"{row['name'].upper().replace('MHC', 'mHC')}, n = 4"
        apart, tokens = row["difference"], f"{row['tokens']:,.0f}"
        difference = f"{apart['mean']:+.3f} ({apart['low']:+.3f} – {apart['high']:+.3f})".replace("-", "−")
        rest = ["", tokens, ""] if row is first else [difference, tokens, f"{row['speed_up']:.2f}×"]
        lines.append([name, f"{row['loss']:.3f}", f"{row['low']:.3f} – {row['high']:.3f}", *rest])
    head = "residual | validation loss, nats per token | 95 % interval | minus plain, paired by seed"
    return table(head + " | tokens to plain's final loss | fewer", lines)


TELEPATHY = {
    "majority": "majority",
    "random": "random",
    "sender_text": "sender reads and answers",
    "sender_text_5shot": "the same, 5 examples",
    "receiver_text": "receiver reads and answers",
    "receiver_text_5shot": "the same, 5 examples",
    "text_relay": "text relay: sender summarizes, receiver answers",
    "text_relay_5shot": "the same, 5 examples",
    "sender_text_ranked": "sender, likeliest label",
    "receiver_text_ranked": "receiver, likeliest label",
    "text_relay_ranked": "text relay, likeliest label",
    "prompt_tuning": "prompt tuning, without the text",
    "prompt_tuning_text": "prompt tuning, before the text",
    "linear_probe": "linear probe on the sender",
    "noise": "noise in place of the message",
}


@block
def telepathy() -> str:
    found = study("telepathy-stdlib-topics")
    bridge = found["accuracy"]
    lines = [
        ["**bridge, 8 soft tokens**", f"**{percent(bridge['mean'])}**", interval(bridge), percent(found["invalid"])]
    ]
    lines[0].append(str(bridge["total"]))
    for key, name in TELEPATHY.items():
        row = found["baselines"][key]
        invalid = percent(row["invalid"] / row["total"])
        lines.append([name, percent(row["mean"]), interval(row), invalid, str(row["total"])])
    above = 100 * (bridge["mean"] - found["baselines"]["linear_probe"]["mean"])
    return (
        table(" | accuracy | 95 % interval (Wilson) | no valid answer | of", lines)
        + f"\nThe bridge is {above:.1f} points above the linear probe.\n"
    )


@block
def telepathy_latency() -> str:
    lines = []
    for kind, stages in study("telepathy-stdlib-topics")["latency"].items():
        parts = ", ".join(f"{stage} {time:.1f}" for stage, time in stages.items() if stage != "total")
        lines.append([kind.replace("_", " "), f"{stages['total']:.1f}", parts])
    return table("milliseconds per example | total | stages", lines)


def _over_seeds(name: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Rows of a sweep with the results of their runs, baselines left out."""
    found = study(name)
    return [(row, found["runs"][row["name"]]) for row in found["rows"] if row["name"] in found["runs"]]


def _mean(runs: list[dict[str, Any]], *keys: str) -> float | None:
    values = []
    for run in runs:
        value: Any = run
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return None
        values.append(value)
    return float(sum(values) / len(values))


@block
def telepathy_tokens() -> str:
    lines = [
        [row["name"].split("=")[-1], percent(row["mean"]), interval(row), f"{_mean(runs, 'usage', 'similarity'):.3f}"]
        for row, runs in _over_seeds("telepathy-tokens")
    ]
    return table("soft tokens | accuracy | 95 % interval | similarity of messages", lines)


BRIDGES = {
    "continuous": "continuous",
    "vq": "VQ, 512 codes",
    "vq:revive_below=0.1": "VQ, dead codes revived",
    "fsq": "FSQ, 8 dimensions of 8 levels",
    "fsq:variance_diversity=0.1": "FSQ, variance loss 0.1",
    "dit:dit_steps=4": "rectified flow, 4 Euler steps",
}


@block
def telepathy_bridges() -> str:
    lines = []
    for row, runs in _over_seeds("telepathy-bridges"):
        name = BRIDGES[row["name"].removeprefix("classification:bridge=")]
        seeds = ", ".join(f"{100 * run['accuracy']['mean']:.1f}" for run in runs)
        codes = _mean(runs, "usage", "perplexity")
        measured = [f"{_mean(runs, 'usage', 'similarity'):.3f}", "" if codes is None else f"{codes:.1f}"]
        lines.append([name, percent(row["mean"]), interval(row), seeds, *measured])
    head = "bridge | accuracy | 95 % interval | per seed | similarity of messages | code perplexity"
    return table(head, lines)


XLRB = {
    "majority": "majority class",
    "plain": "plain encoder",
    "H9": "H9 as published: `topk_softmax`, gate before the norm",
    "H9:router_weight=full_softmax": "H9, `router_weight=full_softmax`",
    "H9:gate_position=after_norm": "H9, `gate_position=after_norm`",
}


@block
def xlrb() -> str:
    found = study("xlrb-stdlib-topics")["rows"]
    return table(
        " | accuracy | 95 % interval", ([XLRB[row["name"]], percent(row["accuracy"]), interval(row)] for row in found)
    )


def main(arguments: list[str]) -> int:
    """Rewrites README.md; with --check only says whether that would change it."""
    path = ROOT / "README.md"
    before = path.read_text()
    after = rewritten(before)
    if arguments == ["--check"]:
        if before != after:
            print("README.md does not show the committed results: run `make results`", file=sys.stderr)
        return int(before != after)
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
