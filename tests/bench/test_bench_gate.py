"""Native kernels are faster than plain PyTorch by these factors at least, or something was lost.

Ratios of medians of one run, in turns, on one thread: a busy machine slows both sides. The bounds are far below what a
quiet machine shows (benchmarks/results), so that only a kernel that lost its speed fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import aggregate as aggregate_cases
from benchmarks.cases import hdim as hdim_cases
from benchmarks.cases import hyper as hyper_cases
from benchmarks.cases import quantize as quantize_cases
from benchmarks.cases import routing as routing_cases
from benchmarks.harness import measure
from xlayer_ext.memory import keep_freed_memory

HYPER = {"op": "boundary", "kind": "dhc", "size": [1, 256, 512, 4], "packed": False}
NEAREST = {"op": "nearest", "how": "euclidean", "size": [512, 2048, 64]}
SCAN = {"op": "ema", "size": [12, 512, 256]}
CASES = {
    "hdim forward": (2.0, hdim_cases, {"pass_": "fwd", "size": [2, 128, 24, 96, 256]}),
    "hdim forward and backward": (1.5, hdim_cases, {"pass_": "fwd+bwd", "size": [2, 128, 24, 96, 256]}),
    "hyper boundary forward": (1.5, hyper_cases, {"pass_": "fwd", **HYPER}),
    "hyper boundary backward": (1.5, hyper_cases, {"pass_": "bwd", **HYPER}),
    "nearest code": (1.0, quantize_cases, {"pass_": "fwd", **NEAREST}),
    "EMA scan forward": (1.5, aggregate_cases, {"pass_": "fwd", **SCAN}),
    "EMA scan forward and backward": (1.3, aggregate_cases, {"pass_": "fwd+bwd", **SCAN}),
    "masked mean": (1.0, routing_cases, {"pass_": "fwd", "size": [8, 512, 512]}),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    keep_freed_memory()  # as in a benchmark: page faults are no part of a kernel
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def speed_up(module: Any, arguments: dict[str, Any]) -> float:
    given = {"dtype": "float32", "device": "cpu", **arguments}
    try:
        works = {impl: module.build(impl=impl, **given) for impl in ("native", "eager")}
    except measure.Unavailable as reason:
        pytest.skip(str(reason))
    times = measure.compare(works, seconds=0.5, min_rounds=7, turn_seconds=0.02)
    return times["eager"].median / times["native"].median


@pytest.mark.slow
@pytest.mark.cpu_kernels
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_native_kernels_keep_their_lead(name: str) -> None:
    least, module, arguments = CASES[name]
    found = speed_up(module, arguments)
    assert found >= least, f"{name}: {found:.2f} times as fast as plain PyTorch, at least {least} is expected"
