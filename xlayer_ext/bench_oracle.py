"""Errors against float64, and the rule that a benchmark holds a kernel to before it takes its time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Checked:
    """One comparison with float64: the error, that of the plain formula at the same dtype, and the largest allowed."""

    name: str
    dtype: str
    error: float
    plain: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # NaN does not


_records: list[list[Checked]] = []


@contextmanager
def recording() -> Iterator[list[Checked]]:
    """Within, `check_oracle` adds what it finds to the list, and does not raise."""
    found: list[Checked] = []
    _records.append(found)
    try:
        yield found
    finally:
        _records.pop()


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """rms(actual - exact) ÷ rms(exact), in float64; the plain rms where the exact result is 0."""
    exact, actual = exact.detach().double(), actual.detach().double()
    difference, scale = (actual - exact).square().mean().sqrt(), exact.square().mean().sqrt()
    return float(difference / scale if scale > 0 else difference)


def check_oracle(name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> float:
    """Error of `actual` against float64 `exact`; raises `AssertionError` where the plain formula's is much smaller.

    Bound: 1.1 × the error of `plain` (the plain PyTorch formula at the dtype of `actual`) + 2·eps; float64: 1e-12.
    """
    error, by_plain = relative_error(actual, exact), relative_error(plain, exact)
    bound = 1.1 * by_plain + 2 * torch.finfo(actual.dtype).eps
    if actual.dtype == torch.float64:
        bound = 1e-12
    checked = Checked(name, str(actual.dtype).removeprefix("torch."), error, by_plain, bound)
    if _records:
        _records[-1].append(checked)
    elif not checked.holds:
        raise AssertionError(f"{name}: error {error:.2e} exceeds {bound:.2e} ({actual.dtype})")
    return error
