"""Times one training step of a language model with each kind of hyper-connection, beside plain residuals.

All kinds and backends run in turns in one process, on the same tokens. `native` and `reference` are the backends of the
same model; `compile` is `torch.compile` of the model on the reference backend. A step is the forward, the loss and the
gradient of every parameter, and in the case `adamw` the optimizer's step as well. 16-bit rows run under autocast.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import cases as harness_cases
from benchmarks.harness import training
from benchmarks.harness.cases import Case, compiled, settled
from benchmarks.harness.measure import Row, Unavailable, Work
from benchmarks.harness.training import autocast, check_loss
from xlayer_ext import backend
from xlayer_ext._backend import use_native

KINDS = ("shc", "dhc", "mhc")
IMPLS = ("plain", "plain compile", *(f"{kind} {how}" for kind in KINDS for how in ("native", "reference", "compile")))
NAMES = ("B", "S", "d", "layers", "heads", "vocabulary")
PAPER = (2, 1024, 2048, 24, 16, 50304)


class Setting(NamedTuple):
    suite: str
    size: tuple[int, int, int, int, int, int]  # as in NAMES
    optimizer: bool = False


def settings(cuda: bool) -> dict[str, Setting]:
    size = (8, 1024, 768, 12, 12, 4096) if cuda else (4, 256, 768, 12, 12, 4096)
    longer = (2, 4096, 768, 12, 12, 4096) if cuda else (2, 512, 768, 12, 12, 4096)
    return {
        "L12-d768": Setting("main", size),
        **({"L24-d2048": Setting("full", PAPER)} if cuda else {}),
        "longer": Setting("full", longer),
        "adamw": Setting("full", size, optimizer=True),
        "toy": Setting("toy", (2, 16, 32, 2, 2, 64)),
    }


def scale(size: Sequence[int]) -> str:
    """Describes in words how a case differs from the paper's shape."""
    paper, here = (dict(zip(NAMES, numbers, strict=True)) for numbers in (PAPER, size))
    return training.scale(paper, here)


# ---- the least work ------------------------------------------------------------------------------------------------


def matrix_elements(size: Sequence[int]) -> tuple[int, int]:
    """Counts the elements of all weights of the plain model, and of those that every token is multiplied with.

    A layer has 4·d² in its attention and 8·d² in its MLP; the embedding makes the logits too, but tokens only look
    their rows up in it.
    """
    _, _, d, layers, _, vocabulary = size
    matrices = 12 * layers * d * d + vocabulary * d
    return matrices + (2 * layers + 1) * d, matrices


def least_bytes(size: Sequence[int], element: int, optimizer: bool) -> int:
    """Counts every parameter read in the forward and in the backward, and its gradient written once. AdamW reads the
    parameter, its gradient and two averages, and writes all but the gradient."""
    return (3 + (7 if optimizer else 0)) * matrix_elements(size)[0] * element


def least_flops(size: Sequence[int]) -> int:
    """Counts two per multiply-add of the plain model's GEMMs and of causal attention, and twice that in the
    backward."""
    b, s, d, layers, _, _ = size
    attention = layers * 2 * b * s * s * d  # queries · keys and weights · values, half of each
    return 3 * (2 * b * s * matrix_elements(size)[1] + attention)


# ---- one implementation --------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1 + len(KINDS))
def make_model(kind: str, size: tuple[int, ...], optimizer: bool, dtype: str, device: str) -> nn.Module:
    """Makes the model of a kind, the same object for all backends."""
    try:
        module = importlib.import_module("xlayer_systems.hyper_lm.model")
    except ImportError as error:
        raise Unavailable(str(error)) from error
    _, _, d, layers, heads, vocabulary = size
    torch.manual_seed(0)
    model: nn.Module = module.HyperTransformer(vocabulary, d, layers, heads, residual=kind)
    return model.to(device, torch.float64 if dtype == "float64" else torch.float32)


@functools.lru_cache(maxsize=1 + len(KINDS))
def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def make_tokens(size: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
    """Draws random inputs and the tokens to predict, `[B, S]` each."""
    b, s, *_, vocabulary = size
    tokens = torch.randint(vocabulary, (b, s + 1), generator=torch.Generator().manual_seed(0)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def build(impl: str, size: list[int], optimizer: bool, dtype: str, device: str) -> Work:
    """Builds the work of one row, a training step, which returns the loss and all gradients."""
    kind, _, how = impl.partition(" ")
    if how == "native" and not use_native("hyper_post_pre", torch.empty(1, device=device)):
        raise Unavailable("no native kernel is in use; `python -m xlayer_ext.info` says why")
    model = make_model(kind, tuple(size), optimizer, dtype, device)
    inputs, labels = make_tokens(size, device)
    parameters = list(model.parameters())

    def loss_of() -> Tensor:
        with autocast(dtype, device):
            logits = model(inputs)
        return F.cross_entropy(
            logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten()
        )

    forward = compiled(loss_of) if how == "compile" else loss_of

    def step() -> list[Tensor]:
        with _backend(how):
            loss = forward()
            grads = torch.autograd.grad(loss, parameters)
        if optimizer:
            _step(model, parameters, grads)
        return [loss.detach(), *grads]

    if how == "native":
        check_loss(impl, loss_of, dtype)
    return settled(step) if how == "compile" else step


def _step(model: nn.Module, parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    make_optimizer(model).step()
    for parameter in parameters:
        parameter.grad = None


def _backend(how: str) -> AbstractContextManager[Any]:
    return nullcontext() if not how else backend("native" if how == "native" else "reference")


# ---- the cases and their table -------------------------------------------------------------------------------------


def make_cases(options: argparse.Namespace) -> list[Case]:
    cases = []
    for name, (suite, size, optimizer) in settings(torch.device(options.device).type == "cuda").items():
        for dtype in options.dtype:
            element = 8 if dtype == "float64" else 4
            arguments = {"size": list(size), "optimizer": optimizer, "dtype": dtype, "device": options.device}
            what = ("hyper", "training step", name, "fwd+bwd", dtype)
            work = (least_bytes(size, element, optimizer), least_flops(size))
            facts = {"scale": scale(size)}
            steps: dict[str, Any] = {"peers": IMPLS, "tokens": size[0] * size[1], "facts": facts}
            cases.append(Case(*what, *work, build, arguments, suite, **steps))
    return cases


def format_table(rows: Sequence[Row]) -> str:
    """Formats the rows as a table: times and peak memory, also as multiples of those of plain residuals."""
    plain = {(row.case, row.dtype): row for row in rows if row.impl == "plain"}
    head = f"{'case':<14}{'dtype':<10}{'impl':<15}{'ms':>10}{'min':>10}{'spread':>8}{'× plain':>9}"
    lines = [f"{head}{'MB peak':>10}{'× plain':>9}{'of limit':>10}"]
    for row in rows:
        beside = plain.get((row.case, row.dtype))
        times = f"{row.ms_median / beside.ms_median:.3f}" if beside else "-"
        peak, peaks = (f"{row.peak_bytes / 1e6:.1f}", "-") if row.peak_bytes is not None else ("-", "-")
        if beside and beside.peak_bytes and row.peak_bytes is not None:
            peaks = f"{row.peak_bytes / beside.peak_bytes:.3f}"
        lines.append(
            f"{row.case:<14}{row.dtype:<10}{row.impl:<15}{row.ms_median:>10.1f}{row.ms_min:>10.1f}"
            f"{row.extra['spread']:>8.2f}{times:>9}{peak:>10}{peaks:>9}{row.fraction_of_limit:>10.3f}"
        )
    return "\n".join([f"{rows[-1].device}, {rows[-1].extra['threads']} threads", *lines] if rows else lines)


def main(argv: Sequence[str] | None = None) -> int:
    description = "Benchmark of a training step with hyper-connections."
    return harness_cases.main(description, make_cases, argv, impls=(), table=format_table)


if __name__ == "__main__":
    sys.exit(main())
