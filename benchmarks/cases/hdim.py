"""Token-pair messaging: the native kernel against plain PyTorch, `torch.compile`, and the machine's limit.

The main cases have the sizes of one XLRB layer: on a CPU on roberta-large (D = 24, M = 96, H = 1024), on a GPU on
roberta-base (H = 768) in batches that fill it. The batch shrinks as the sentence grows so that plain PyTorch, which
writes [B, S, S, 4D] and [B, S, S, M], still fits.
Before anything is timed, results and gradients are checked against float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import cases as harness_cases
from benchmarks.harness.cases import Case, compiled, settled
from benchmarks.harness.measure import Unavailable, Work
from xlayer_ext import functional, reference
from xlayer_ext._backend import use_native
from xlayer_ext.testing import bias_without_kinks, check_oracle

Attention = Callable[..., Tensor]

Sizes = dict[str, tuple[str, int, int, int, int, int, dict[str, Any]]]  # name: (suite, B, S, D, M, H, options)

TOY: Sizes = {"toy": ("toy", 2, 24, 8, 16, 32, {})}
CPU_SIZES: Sizes = {
    "S128": ("main", 8, 128, 24, 96, 1024, {}),
    "S512": ("main", 2, 512, 24, 96, 1024, {}),
    "S1024": ("main", 1, 1024, 24, 96, 1024, {}),
    "S128-masked": ("full", 8, 128, 24, 96, 1024, {"masked": True}),
    "S128-gelu": ("full", 8, 128, 24, 96, 1024, {"activation": "gelu"}),
    "S128-D32": ("full", 8, 128, 32, 128, 1024, {}),
}
CUDA_SIZES: Sizes = {
    "B32-S512": ("main", 32, 512, 24, 96, 768, {}),
    "B8-S128": ("main", 8, 128, 24, 96, 768, {}),
    "B2-S2048": ("main", 2, 2048, 24, 96, 768, {}),
    "B32-S512-masked": ("full", 32, 512, 24, 96, 768, {"masked": True}),
    "B32-S512-gelu": ("full", 32, 512, 24, 96, 768, {"activation": "gelu"}),
    "B32-S512-D32": ("full", 32, 512, 32, 128, 768, {}),
}


# ---- the least work ------------------------------------------------------------------------------------------------


def least_flops(pairs: int, d: int, m: int, h: int, pass_: str) -> int:
    """Counts the floating-point operations that a fused kernel cannot avoid, as far as they grow with the number of
    pairs.

    |a−b| = a + b − 2·min(a, b), so the columns of W1 that see q and k alone leave the pair loop; the Hadamard term and
    the minimum each stay there as a GEMM D → M. What only grows with the tokens, and everything that is not a
    multiply-add of a GEMM (activation, softmax), is left out, which makes the limit stricter.

    Forward: the two GEMMs, and P·v.  Backward: both recomputed, once, since nothing of [B, S, S, M] is kept; for each,
    the gradient of its W1 block and the one of its features (6 in all); dP = dC·vᵀ and dv = Pᵀ·dC.  For B=8, S=128,
    D=24, M=96, H=1024: 1.48 and 4.16 GFLOP.
    """
    pair_gemm, value_gemm = 2 * d * m, 2 * h
    forward = pairs * (2 * pair_gemm + value_gemm)
    backward = pairs * (6 * pair_gemm + 2 * value_gemm)
    return forward if pass_ == "fwd" else forward + backward


def least_alu(pairs: int, m: int, pass_: str) -> int:
    """Counts the float32 operations per pair and hidden unit that no GEMM can take over, a fused multiply-add being
    one.

    Forward: the activation, and the multiply-add with w2. Backward: both again, the product of the pair's gradient
    with w2 where the unit is active, and the sum that is the gradient of w2.
    """
    return pairs * m * (2 if pass_ == "fwd" else 6)


def least_bytes(b: int, s: int, d: int, m: int, h: int, pass_: str, element: int, mask: int) -> int:
    """Counts each input read once and each output written once; the backward reads dC and writes one gradient per
    input.

    Masked keys are counted as if they were read: these bytes are far from deciding.
    """
    inputs = 2 * b * s * d + b * s * h + 4 * d * m + 2 * m
    context = b * s * h
    elements = inputs + context if pass_ == "fwd" else 2 * inputs + 2 * context
    return element * elements + mask


# ---- one implementation --------------------------------------------------------------------------------------------


def native(
    query: Tensor, key: Tensor, value: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, **options: Any
) -> Tensor:
    bias2 = weight2.new_zeros(1)
    context = functional.hdim_attention(query, key, value, weight1, bias1, weight2, bias2, **options)
    assert isinstance(context, Tensor)  # no entropy was asked for
    return context


def eager(*inputs: Tensor, **options: Any) -> Tensor:
    return reference.hdim_attention(*inputs, **options)[0]


def implementation(impl: str, *inputs: Tensor) -> Attention:
    """Returns the function to call; raises `Unavailable` where it cannot run."""
    if impl == "native" and not use_native("hdim_attention", *inputs):
        raise Unavailable("no native kernel is in use; `python -m xlayer_ext.info` says why")
    if impl == "compile":
        return compiled(eager)
    return {"native": native, "eager": eager}[impl]


def make_inputs(size: list[int], dtype: str, device: str) -> list[Tensor]:
    """Draws query, key, value, weight1, bias1, weight2, the same for every implementation, with logits of about unit
    variance."""
    b, s, d, m, h = size
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, s, d), (b, s, d), (b, s, h), (m, 4 * d), (m,), (m,)]
    scales = [1.0, 1.0, 1.0, (4 * d) ** -0.5, 0.1, 2 * m**-0.5]
    drawn = (torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, scales, strict=True))
    return [tensor.to(device=device, dtype=getattr(torch, dtype)) for tensor in drawn]


def make_options(b: int, s: int, device: str, masked: bool = False, activation: str = "relu") -> dict[str, Any]:
    """Returns the keyword arguments of a call; `masked` draws sentence lengths from S/2 to S."""
    lengths = torch.tensor(sentence_lengths(b, s), device=device)
    mask = torch.arange(s, device=device) < lengths.unsqueeze(1) if masked else None
    return {"key_mask": mask, "activation": activation}


def sentence_lengths(b: int, s: int) -> list[int]:
    """Returns b lengths spread evenly from s/2 to s."""
    return [s - (s // 2) * i // max(1, b - 1) for i in range(b)]


def build(impl: str, pass_: str, size: list[int], dtype: str, device: str, **variant: Any) -> Work:
    """Builds the work of one row, which returns the context, and with "fwd+bwd" the gradient of every input as well."""
    inputs = make_inputs(size, dtype, device)
    options = make_options(size[0], size[1], device, **variant)
    attention = implementation(impl, *inputs)
    cotangent = torch.randn_like(inputs[2])
    work = partial(_forward if pass_ == "fwd" else _forward_backward, attention, inputs, options, cotangent)
    return settled(work) if impl == "compile" else work


def _forward(attention: Attention, inputs: list[Tensor], options: dict[str, Any], cotangent: Tensor) -> Tensor:
    with torch.no_grad():
        return attention(*inputs, **options)


def _forward_backward(
    attention: Attention, inputs: list[Tensor], options: dict[str, Any], cotangent: Tensor
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    context = attention(*leaves, **options)
    return [context.detach(), *torch.autograd.grad(context, leaves, cotangent)]


# ---- the check before the clock ------------------------------------------------------------------------------------


def check(case: Case) -> None:
    """Compares context and gradients of the native kernel with float64 (`check_oracle`) on the case's own inputs, but
    with biases away from relu's kink."""
    if case.pass_ == "fwd":
        return  # checked together with its backward
    arguments = dict(case.arguments)
    size, dtype, device, _ = (arguments.pop(key) for key in ("size", "dtype", "device", "pass_"))
    options = make_options(size[0], size[1], device, **arguments)
    inputs = make_inputs(size, dtype, device)
    query, key, _, weight1, bias1, _ = inputs
    inputs[4] = bias_without_kinks(query, key, weight1, bias1)
    # Errors of few pairs are luck: they are pooled over several cotangents.
    draws = 1 if size[0] * size[1] ** 2 > 2**16 else 6
    sides: list[list[list[Tensor]]] = [[], [], []]
    for _ in range(draws):
        cotangent = torch.randn_like(inputs[2])
        sides[0].append(_forward_backward(native, inputs, options, cotangent))
        sides[1].append(_by_rows([tensor.double() for tensor in inputs], options, cotangent.double()))
        sides[2].append(_by_rows(inputs, options, cotangent))
    names = ("context", "grad query", "grad key", "grad value", "grad weight1", "grad bias1", "grad weight2")
    for index, name in enumerate(names):
        actual, exact, plain = (torch.cat([draw[index].flatten() for draw in side]) for side in sides)
        check_oracle(f"{case.name} {name}", actual, exact, plain)


def _by_rows(inputs: list[Tensor], options: dict[str, Any], cotangent: Tensor, rows: int = 64) -> list[Tensor]:
    """Runs `_forward_backward` of the plain formula a few query rows at a time, which need less memory; rows are
    independent."""
    parts = [
        _forward_backward(eager, [query, *inputs[1:]], options, part)
        for query, part in zip(inputs[0].split(rows, 1), cotangent.split(rows, 1), strict=True)
    ]
    context, grad_query, *others = zip(*parts, strict=True)
    totals = [torch.stack(other).to(torch.float64).sum(0).to(other[0].dtype) for other in others]
    return [torch.cat(context, 1), torch.cat(grad_query, 1), *totals]


# ---- the cases -----------------------------------------------------------------------------------------------------


def make_cases(options: argparse.Namespace) -> list[Case]:
    cases = []
    sizes = (CUDA_SIZES if torch.device(options.device).type == "cuda" else CPU_SIZES) | TOY
    for name, (suite, b, s, d, m, h, variant) in sizes.items():
        for dtype in options.dtype:
            element, mask = getattr(torch, dtype).itemsize, b * s if variant.get("masked") else 0
            pairs = s * sum(sentence_lengths(b, s)) if mask else b * s * s
            for pass_ in ("fwd", "fwd+bwd"):
                arguments = {"pass_": pass_, "size": [b, s, d, m, h], "dtype": dtype, "device": options.device}
                moved = least_bytes(b, s, d, m, h, pass_, element, mask)
                flops = least_flops(pairs, d, m, h, pass_)
                what = ("hdim", "hdim_attention", name, pass_, dtype)
                alu = least_alu(pairs, m, pass_)
                cases.append(Case(*what, moved, flops, build, arguments | variant, suite, alu, halve))
    return cases


def halve(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the arguments of the same case with half the batch."""
    b, *rest = arguments["size"]
    return None if b % 2 else arguments | {"size": [b // 2, *rest]}


def main(argv: Sequence[str] | None = None) -> int:
    return harness_cases.main("Benchmark of hdim_attention.", make_cases, argv, check)


if __name__ == "__main__":
    sys.exit(main())
