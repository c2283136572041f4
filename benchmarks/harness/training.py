"""Helpers for benchmarks of whole training steps: autocast, a check of the loss, the scale of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.measure import Row
from xlayer_ext._backend import backend
from xlayer_ext.testing import relative_error


def autocast(dtype: str, device: str) -> AbstractContextManager[Any]:
    """Returns autocast for element types of two bytes, and an empty context for the others."""
    element = getattr(torch, dtype)
    return torch.autocast(torch.device(device).type, element) if element.itemsize == 2 else nullcontext()


@torch.no_grad()
def check_loss(what: str, loss_of: Callable[[], Tensor], dtype: str) -> None:
    """Checks that both backends compute the same loss, with the same dropout; the operators' own benchmarks compare
    results and gradients closely."""
    losses = []
    for choice in ("native", "reference"):
        torch.manual_seed(0)
        with backend(choice):
            losses.append(loss_of())
    error = relative_error(*losses)
    if not error <= (1e-2 if getattr(torch, dtype).itemsize == 2 else 1e-4):
        raise AssertionError(f"{what}: the loss differs from the reference's by {error:.1e}")


def scale(paper: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Describes how a size differs from the paper's: "layers 24→4, d 1024→256"; "" where it does not.

    A list holds the numbers of several models."""
    return ", ".join(f"{name} {_said(paper[name])}→{_said(here[name])}" for name in paper if paper[name] != here[name])


def _said(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def times_reference(row: Row, rows: Sequence[Row]) -> float | None:
    """Computes the speed of a row of the native or reference backend over the same step on the reference backend."""
    kind, _, how = row.impl.rpartition(" ")
    if how not in ("native", "reference", "eager"):
        return None
    wanted = {f"{kind} reference".strip(), f"{kind} eager".strip()}
    same = (row.family, row.op, row.case, row.dtype, row.device)
    found = [r.ms_median for r in rows if r.impl in wanted and (r.family, r.op, r.case, r.dtype, r.device) == same]
    return found[-1] / row.ms_median if found else None
