"""Tests a kernel against the float64 reference: the oracle rule, and inputs on which it can hold.

The oracle rule compares three results of the same inputs: that of the kernel, that of the plain PyTorch formula at the
kernel's dtype (:mod:`xlayer_ext.reference`), and that of the formula in float64, which counts as exact::

    error = rms(actual - exact) / rms(exact)
    error(kernel) ≤ 1.1 · error(plain) + 2 · eps(dtype)        (float64: ≤ 1e-12)

A kernel that keeps it is as accurate as what it replaces. Errors of few elements scatter: concatenate the results of
several draws before they are compared, about a thousand elements in all.

Example::

    exact, plain = (formula(*(x.to(dtype) for x in inputs)) for dtype in (torch.float64, torch.bfloat16))
    check_oracle("my_kernel", my_kernel(*(x.bfloat16() for x in inputs)), exact, plain)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from xlayer_ext.reference.hdim import pair_features

__all__ = [
    "Comparison",
    "bias_without_kinks",
    "check_oracle",
    "compare_with_oracle",
    "oracle_bound",
    "recording",
    "relative_error",
]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Computes rms(actual - exact) / rms(exact) in float64; the plain rms of the difference where ``exact`` is 0."""
    exact, actual = exact.detach().double(), actual.detach().double()
    difference, scale = (actual - exact).square().mean().sqrt(), exact.square().mean().sqrt()
    return float(difference / scale if scale > 0 else difference)


def oracle_bound(plain_error: float, dtype: torch.dtype) -> float:
    """Returns the largest error that the oracle rule allows, given that of the plain formula at the same dtype."""
    return 1e-12 if dtype == torch.float64 else 1.1 * plain_error + 2 * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Comparison:
    """One result compared with float64.

    Args:
        name: of the result, for messages.
        dtype: of the result, for example ``"bfloat16"``.
        error: of the result.
        plain: error of the plain formula at the same dtype.
        bound: largest error that the oracle rule allows.
    """

    name: str
    dtype: str
    error: float
    plain: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the rule is kept; false where the error is NaN."""
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.2e} exceeds {self.bound:.2e} ({self.dtype})"


def compare_with_oracle(name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> Comparison:
    """Compares ``actual`` and ``plain``, of one dtype, with ``exact`` in float64."""
    error, plain_error = relative_error(actual, exact), relative_error(plain, exact)
    bound = oracle_bound(plain_error, actual.dtype)
    return Comparison(name, str(actual.dtype).removeprefix("torch."), error, plain_error, bound)


_records: list[list[Comparison]] = []


@contextmanager
def recording() -> Iterator[list[Comparison]]:
    """Collects the comparisons that :func:`check_oracle` makes inside the block, which then does not raise."""
    found: list[Comparison] = []
    _records.append(found)
    try:
        yield found
    finally:
        _records.pop()


def check_oracle(name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> float:
    """Checks the oracle rule for one result; returns its error.

    Args:
        name: of the result, for the message.
        actual: result of the kernel under test.
        exact: result of the formula in float64, of the same shape.
        plain: result of the formula at the dtype of ``actual``.

    Raises:
        AssertionError: the error exceeds the bound.
    """
    found = compare_with_oracle(name, actual, exact, plain)
    if _records:
        _records[-1].append(found)
    elif not found.holds:
        raise AssertionError(str(found))
    return found.error


@torch.no_grad()
def bias_without_kinks(query: Tensor, key: Tensor, weight1: Tensor, bias1: Tensor) -> Tensor:
    """Moves the biases of hidden units for which some pair lies at the kink of relu.

    Where a pre-activation is as near to 0 as rounding, relu passes it or not by chance, and the gradient is one of two,
    neither of them wrong. Of very many pairs some are always near, so a kernel's gradients can be compared only on
    inputs without such pairs.

    Args:
        query: (B, Sq, D).
        key: (B, Sk, D).
        weight1: (M, 4·D), of the hidden layer of the scorer in :func:`xlayer_ext.functional.hdim_attention`.
        bias1: (M,).

    Returns:
        Another ``bias1``, (M,).
    """
    near = min(2e-6, 0.3 / max(1, query.shape[0] * query.shape[1] * key.shape[1]))
    bias, weight, key = bias1.clone(), weight1.double(), key.double()
    wrong = torch.ones_like(bias, dtype=torch.bool)
    while wrong.any():
        units = wrong.nonzero().squeeze(-1)
        closest = torch.full((len(units),), torch.inf, dtype=torch.float64, device=bias.device)
        for rows in query.double().split(64, 1):
            hidden = pair_features(rows, key) @ weight[units].mT + bias[units].double()
            closest = torch.minimum(closest, hidden.abs().flatten(0, -2).amin(0))
        wrong[units] = closest < near
        bias[wrong] += 0.0625
    return bias
