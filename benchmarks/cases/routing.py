"""Masked mean over tokens, the router's summary of a layer: one read of the hidden states decides.

On the CPU a hidden state that its layer has just written is still in the cache, so a fraction above 1 is no error; the
large case is bigger than most caches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.harness import cases as harness_cases
from benchmarks.harness.cases import Case, compiled, settled
from benchmarks.harness.measure import Unavailable, Work
from xlayer_ext import functional, reference
from xlayer_ext._backend import use_native
from xlayer_ext.testing import check_oracle

# name: (suite, B, S, H)
SIZES = {
    "B8-S128": ("main", 8, 128, 1024),
    "B64-S1024": ("main", 64, 1024, 1024),
    "toy": ("toy", 2, 24, 32),
}


def make_inputs(size: list[int], dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draws x `[B, S, H]`, a mask of sentence lengths from S/2 to S, and the output's gradient `[B, H]`."""
    b, s, h = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, s, h, generator=generator).to(device=device, dtype=getattr(torch, dtype))
    lengths = torch.tensor(sentence_lengths(b, s), device=device)
    return x, torch.arange(s, device=device) < lengths.unsqueeze(1), torch.ones_like(x[:, 0])


def sentence_lengths(b: int, s: int) -> list[int]:
    """Returns b lengths spread evenly from s/2 to s."""
    return [s - (s // 2) * i // max(1, b - 1) for i in range(b)]


def least_bytes(b: int, s: int, h: int, pass_: str, element: int) -> int:
    """Counts the forward's reads of unmasked tokens and mask and its write of the mean; the backward writes all
    tokens."""
    forward = element * h * (sum(sentence_lengths(b, s)) + b) + b * s
    return forward if pass_ == "fwd" else forward + element * h * (b + b * s)


def build(impl: str, pass_: str, size: list[int], dtype: str, device: str) -> Work:
    """Builds the work of one row, which returns the mean, and with "fwd+bwd" the gradient of x as well."""
    x, mask, cotangent = make_inputs(size, dtype, device)
    if impl == "native" and not use_native("masked_mean", x):
        raise Unavailable("no native kernel is in use; `python -m xlayer_ext.info` says why")
    mean = functional.masked_mean if impl == "native" else reference.masked_mean
    mean = compiled(mean) if impl == "compile" else mean

    def forward() -> Tensor:
        with torch.no_grad():
            return mean(x, mask)

    def forward_backward() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        out = mean(leaf, mask)
        return [out.detach(), *torch.autograd.grad(out, leaf, cotangent)]

    work = forward if pass_ == "fwd" else forward_backward
    return settled(work) if impl == "compile" else work


def check(case: Case) -> None:
    """Compares the mean and its gradient with float64."""
    x, mask, cotangent = make_inputs(**{key: case.arguments[key] for key in ("size", "dtype", "device")})
    leaf, exact_leaf, plain_leaf = (tensor.detach().requires_grad_() for tensor in (x, x.double(), x))
    means = [functional.masked_mean(leaf, mask), *(reference.masked_mean(x, mask) for x in (exact_leaf, plain_leaf))]
    check_oracle(f"{case.name} mean", *means)
    tensors = (leaf, exact_leaf, plain_leaf)
    gradients = [torch.autograd.grad(mean, x, cotangent.to(mean))[0] for mean, x in zip(means, tensors, strict=True)]
    check_oracle(f"{case.name} grad x", *gradients)


def make_cases(options: argparse.Namespace) -> list[Case]:
    cases = []
    for name, (suite, b, s, h) in SIZES.items():
        for dtype in options.dtype:
            for pass_ in ("fwd", "fwd+bwd"):
                moved = least_bytes(b, s, h, pass_, getattr(torch, dtype).itemsize)
                adds = h * sum(sentence_lengths(b, s))
                arguments = {"pass_": pass_, "size": [b, s, h], "dtype": dtype, "device": options.device}
                what = ("hdim", "masked_mean", name, pass_, dtype)
                cases.append(Case(*what, moved, adds, build, arguments, suite))
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    return harness_cases.main("Benchmark of masked_mean.", make_cases, argv, check)


if __name__ == "__main__":
    sys.exit(main())
