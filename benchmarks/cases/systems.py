"""One training step of each system at its paper's shape: time, tokens per second and peak memory of both backends.

`native` and `eager` are the same model on the native and the reference backend, in turns, with the same weights and
tokens (`system_steps.py`, which also counts the least work). A step is the forward, the loss and the gradient of every
trained parameter. On a CPU the systems are smaller, and `scale` in the rows says in what. 16-bit rows run under
autocast. The fifth system, a language model with hyper-connections, is in hyper_model.py.

    python -m benchmarks systems --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import system_steps
from benchmarks.cases.system_steps import Size
from benchmarks.harness import cases as harness_cases
from benchmarks.harness import training
from benchmarks.harness.cases import Case
from benchmarks.harness.measure import Row, Unavailable, Work
from benchmarks.harness.training import autocast, check_loss, times_reference
from xlayer_ext import backend
from xlayer_ext._backend import use_native

BACKENDS = {"native": "native", "eager": "reference"}


def make(system: str, size: Size, dtype: str, device: str) -> system_steps.Step:
    """Calls `system_steps.make`; raises `Unavailable` where the packages that the systems need are missing."""
    try:
        return system_steps.make(system, size, dtype, device)
    except ImportError as error:
        raise Unavailable(str(error)) from error


_LAST: dict[tuple[Any, ...], system_steps.Step] = {}


def shared(system: str, size: Size, dtype: str, device: str) -> system_steps.Step:
    """Returns the step of a case, one for both backends; drops the previous case's first, as two may not fit on a
    GPU."""
    key = (system, str(size), dtype, device)
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = make(system, size, dtype, device)
    return _LAST[key]


def build(impl: str, system: str, size: Size, dtype: str, device: str) -> Work:
    """Builds the work of one row, which returns the loss and all gradients."""
    kernel = system_steps.KERNELS[system]
    if impl == "native" and kernel and not use_native(kernel, torch.empty(1, device=device)):
        raise Unavailable("no native kernel is in use; `python -m xlayer_ext.info` says why")
    made = shared(system, size, dtype, device)
    trained = made.trained()

    def loss_of() -> Tensor:
        with autocast(dtype, device):
            loss: Tensor = made.model(**made.batch).loss
        return loss

    def step() -> list[Tensor]:
        with backend(BACKENDS[impl]):
            loss = loss_of()
            grads = torch.autograd.grad(loss, trained)
        return [loss.detach(), *grads]

    if impl == "native":
        check_loss(system, loss_of, dtype)
    return step


# ---- the cases and their table -------------------------------------------------------------------------------------


def make_cases(options: argparse.Namespace) -> list[Case]:
    cuda = torch.device(options.device).type == "cuda"
    return [
        make_case(system, size, suite, dtype, options.device)
        for suite, sizes in (("main", system_steps.PAPER if cuda else system_steps.CPU), ("toy", system_steps.TOY))
        for system, size in sizes.items()
        for dtype in options.dtype
    ]


def make_case(system: str, size: Size, suite: str, dtype: str, device: str) -> Case:
    work, facts = counted(system, size, dtype)
    arguments = {"system": system, "size": size, "dtype": dtype, "device": device}
    what = ("systems", system, "toy" if suite == "toy" else named(size), "fwd+bwd", dtype)
    steps: dict[str, Any] = {"peers": tuple(BACKENDS), "tokens": size["B"] * size["S"], "facts": facts}
    return Case(*what, *work, build, arguments, suite, **steps)


def counted(system: str, size: Size, dtype: str) -> tuple[tuple[int, int], dict[str, Any]]:
    """Counts the least bytes and flops of a step; returns them and the facts that its rows hold beside the times."""
    facts: dict[str, Any] = {"scale": training.scale(system_steps.PAPER[system], size)}
    try:
        step = make(system, size, dtype, "meta")
    except Unavailable:  # `build` raises the same error, which is then noted
        return (0, 0), facts
    facts |= {"parameters": step.parameters(), "trained_parameters": sum(p.numel() for p in step.trained())}
    return (step.least_bytes(getattr(torch, dtype).itemsize), step.least_flops()), facts


def named(size: Size) -> str:
    """Names a size: "L24-d1024-B16-S256"; of two models "L32+32-…"."""
    layers, d = ("+".join(map(str, n)) if isinstance(n, list) else n for n in (size["layers"], size["d"]))
    return f"L{layers}-d{d}-B{size['B']}-S{size['S']}"


def format_table(rows: Sequence[Row]) -> str:
    """Formats the rows as a table, with the scale of each case below."""
    head = f"{'system':<11}{'case':<23}{'dtype':<10}{'impl':<8}{'ms':>10}{'spread':>8}{'tokens/s':>11}"
    lines = [f"{head}{'MB peak':>10}{'× reference':>13}{'of limit':>10}"]
    scales = {}
    for row in rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
        times = times_reference(row, rows)
        lines.append(
            f"{row.op:<11}{row.case:<23}{row.dtype:<10}{row.impl:<8}{row.ms_median:>10.1f}{row.extra['spread']:>8.2f}"
            f"{row.extra['tokens_per_second']:>11.0f}{peak:>10}{'-' if times is None else f'{times:.2f}':>13}"
            f"{row.fraction_of_limit:>10.3f}"
        )
        scales[f"{row.op} {row.case}"] = row.extra["scale"] or "the paper's shape"
    lines += [f"{case}: {scale}" for case, scale in scales.items()]
    return "\n".join([f"{rows[-1].device}, {rows[-1].extra['threads']} threads", *lines] if rows else lines)


def main(argv: Sequence[str] | None = None) -> int:
    description = "Benchmark of a training step of each system."
    return harness_cases.main(description, make_cases, argv, impls=(), table=format_table)
