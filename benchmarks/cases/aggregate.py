"""Aggregation over depth: native kernels against plain PyTorch, `torch.compile`, stepped cells and the machine's limit.

Three operators: `ema`, the gated average of all states with LayerNorm of the taps fused in (`ema-last`: the last state
alone); `gru`, the gated recurrent unit; `attention`, the state that attends to its last four taps, keys and values
included. In rows of `gru`, `cell` is `torch.nn.GRUCell` called once per layer, and `gemm` the matrix products alone,
layer by layer, without the gates.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.harness import cases as harness_cases
from benchmarks.harness.cases import Case, compiled, settled
from benchmarks.harness.measure import PASSES, Unavailable, Work
from xlayer_ext import backend, functional
from xlayer_ext._backend import use_native
from xlayer_ext.testing import check_oracle

Outputs = tuple[Tensor, ...]
Operator = Callable[..., Tensor]
HEADS, WINDOW = 4, 4
KERNELS = {"ema": "ema_scan", "ema-last": "ema_scan", "gru": "depth_gru", "attention": "depth_attention"}


class Setting(NamedTuple):
    """Suite, operator and size (layers, tokens, width) of a case."""

    suite: str
    op: str
    size: tuple[int, int, int]


def settings(cuda: bool) -> dict[str, list[Setting]]:
    tokens = 32768 if cuda else 4096
    return {"L12-d128": [Setting("quick", op, (12, tokens // 4, 128)) for op in KERNELS]} | {
        f"L24-d{width}": [
            Setting("main", "ema", (24, tokens, width)),
            Setting("full", "ema-last", (24, tokens, width)),
            Setting("main", "gru", (24, tokens, width)),
            Setting("full" if width == 512 else "main", "attention", (24, tokens, width)),
        ]
        for width in (128, 512)
    }


TOYS = tuple(Setting("toy", op, (3, 10, 16)) for op in KERNELS)


# ---- the least work ------------------------------------------------------------------------------------------------


def least_bytes(op: str, pass_: str, size: Sequence[int], element: int) -> int:
    """Counts taps, states, their gradients and the matrices, each read or written once; per-column vectors are left
    out."""
    layers, tokens, width = size
    rows = tokens * width * element
    weights = {"gru": 6, "attention": 4}.get(op, 0) * width * width * element
    if op.startswith("ema"):
        states = 1 if op == "ema-last" else layers
        forward, backward = (layers + states) * rows, (2 * layers + states) * rows
    else:
        forward, backward = 2 * layers * rows + weights, 4 * layers * rows + 2 * weights
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[pass_]


def least_flops(op: str, pass_: str, size: Sequence[int]) -> int:
    """Counts two for each multiply-add of the matrix products; the backward has two products for each of the
    forward's."""
    layers, tokens, width = size
    products = {"gru": 6, "attention": 4}.get(op, 0)
    forward = 2 * products * layers * tokens * width * width
    return {"fwd": forward, "bwd": 2 * forward, "fwd+bwd": 3 * forward}[pass_]


# ---- inputs --------------------------------------------------------------------------------------------------------


def make_inputs(op: str, size: Sequence[int], dtype: str, device: str) -> Outputs:
    """Draws taps and parameters, the same for every implementation."""
    layers, tokens, width = size
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale
        return values.to(device=device, dtype=getattr(torch, dtype))

    taps, scale = draw(layers, tokens, width), width**-0.5
    if op.startswith("ema"):
        return taps, draw(layers) - 2, 1 + draw(width) / 10, draw(width)
    if op == "gru":
        matrices = [draw(3 * width, width, scale=scale) for _ in range(2)]
        return taps, *matrices, *(draw(3 * width, scale=scale) for _ in range(2))
    return taps, *(draw(width, width, scale=scale) for _ in range(4))


def ema(last_only: bool, x: Tensor, gate_logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.ema_scan(x, gate_logits, norm_weight=weight, norm_bias=bias, last_only=last_only)


def attention(x: Tensor, *weights: Tensor) -> Tensor:
    query, key, value, out = weights
    return functional.depth_attention(x, query, key, value, out, num_heads=HEADS, window=WINDOW)


OPERATORS: dict[str, Operator] = {
    "ema": partial(ema, False),
    "ema-last": partial(ema, True),
    "gru": functional.depth_gru,
    "attention": attention,
}


# ---- one implementation --------------------------------------------------------------------------------------------


def with_backend(choice: str, operator: Operator, *given: Tensor) -> Tensor:
    with backend(choice):
        return operator(*given)


def cell(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    """Steps `torch.gru_cell`, the function of `nn.GRUCell`, through the layers."""
    state = x.new_zeros(x.shape[1], weight_hh.shape[1])
    states = []
    for tap in x:
        state = torch.gru_cell(tap, state, weight_ih, weight_hh, bias_ih, bias_hh)
        states.append(state)
    return torch.stack(states)


def gemm(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, *biases: Tensor) -> Tensor:
    """Computes the matrix products of the recurrent unit and nothing else."""
    products = None
    for tap in x:
        products = linear(tap, weight_ih), linear(tap, weight_hh)
    assert products is not None
    return products[0]


def implementation(impl: str, op: str, given: Outputs) -> Callable[[], Tensor]:
    """Returns the function to call; raises `Unavailable` where it cannot run."""
    if impl == "native" and not use_native(KERNELS[op], given[0]):
        raise Unavailable("no native kernel is in use; `python -m xlayer_ext.info` says why")
    if impl in ("cell", "gemm"):
        return partial(cell if impl == "cell" else gemm, *given)
    operator: Operator = partial(with_backend, "native" if impl == "native" else "reference", OPERATORS[op])
    return partial(compiled(operator) if impl == "compile" else operator, *given)


def build(impl: str, op: str, pass_: str, size: list[int], dtype: str, device: str) -> Work:
    """Builds the work of one row, which returns the states, or the gradients of taps and parameters."""
    given = make_inputs(op, size, dtype, device)
    if pass_ != "fwd":
        given = tuple(tensor.requires_grad_() for tensor in given)
    call = implementation(impl, op, given)
    work = {"fwd": _forward, "bwd": _backward, "fwd+bwd": _forward_backward}[pass_](call, given)
    return settled(work) if impl == "compile" else work


def _forward(call: Callable[[], Tensor], given: Outputs) -> Work:
    return torch.no_grad()(call)


def _backward(call: Callable[[], Tensor], given: Outputs) -> Work:
    """Builds a work that runs the backward alone, on one graph that the first call makes and keeps."""

    @functools.cache
    def graph() -> tuple[Tensor, Tensor]:
        with torch._functorch.config.patch(donated_buffer=False):
            states = call()
        return states, torch.ones_like(states)

    return lambda: torch.autograd.grad(graph()[0], given, graph()[1], retain_graph=True)


def _forward_backward(call: Callable[[], Tensor], given: Outputs) -> Work:
    def forward_backward() -> Outputs:
        states = call()
        return states.detach(), *torch.autograd.grad(states, given, torch.ones_like(states))

    return forward_backward


# ---- the check before the clock ------------------------------------------------------------------------------------


def check(case: Case) -> None:
    """Compares the native kernels with float64 on the first tokens of the case's own inputs."""
    a = case.arguments
    _check(case.op, tuple(a["size"]), a["dtype"], a["device"])


@functools.cache  # the passes of a case share their results
def _check(op: str, size: tuple[int, ...], dtype: str, device: str) -> None:
    taps, *parameters = make_inputs(op, (size[0], min(size[1], 256), size[2]), dtype, device)
    weight = torch.randn_like(OPERATORS[op](taps, *parameters))
    sides = []
    for choice, element in (("native", taps.dtype), ("reference", torch.float64), ("reference", taps.dtype)):
        given = [tensor.detach().to(element).requires_grad_() for tensor in (taps, *parameters)]
        states = with_backend(choice, OPERATORS[op], *given)
        sides.append((states.detach(), *torch.autograd.grad(states, given, weight.to(element))))
    names = ("states", "gradient of the taps", *(f"gradient {i}" for i in range(len(parameters))))
    for name, *triple in zip(names, *sides, strict=True):
        check_oracle(f"{op} {name}", *triple)


# ---- the cases -----------------------------------------------------------------------------------------------------


def make_cases(options: argparse.Namespace) -> list[Case]:
    named = settings(cuda=torch.device(options.device).type == "cuda")
    return [
        make_case(name, setting, pass_, dtype, options.device)
        for name, chosen in [*named.items(), ("toy", TOYS)]
        for setting in chosen
        for dtype in options.dtype
        for pass_ in PASSES
    ]


def make_case(name: str, setting: Setting, pass_: str, dtype: str, device: str) -> Case:
    suite, op, size = setting
    work = (least_bytes(op, pass_, size, getattr(torch, dtype).itemsize), least_flops(op, pass_, size))
    arguments = {"op": op, "pass_": pass_, "size": list(size), "dtype": dtype, "device": device}
    peers = {"gru": ("cell", "gemm") if pass_ == "fwd" else ("cell",)}.get(op, ())
    return Case("aggregate", op, name, pass_, dtype, *work, build, arguments, suite, peers=peers)


def main(argv: Sequence[str] | None = None) -> int:
    return harness_cases.main("Benchmark of aggregation over depth.", make_cases, argv, check)


if __name__ == "__main__":
    sys.exit(main())
