"""Errors of the kernels against float64, beside those of plain PyTorch, for every element type.

Each benchmark compares its kernel with float64 before it takes its time (`check`). Here the same comparisons are made
on small cases of every element type, and written down instead of raised.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

from benchmarks.harness.cases import Case
from benchmarks.harness.measure import Unavailable
from xlayer_ext import testing

# The toy cases of the scripts with other sizes: an error of few numbers is luck. By operator.
HYPER, VQ, DEPTH = [2, 64, 256, 4], [512, 1024, 64], [8, 64, 64]
SIZES: dict[str, list[int]] = {
    "hdim_attention": [5, 128, 24, 96, 64],
    "masked_mean": [8, 128, 256],
    **dict.fromkeys(("pre", "post", "pre+post", "boundary"), HYPER),
    **dict.fromkeys(("nearest", "train"), VQ),
    "statistics": [2048, 256, 64],
    "fsq": [4096, 8, 8],
    **dict.fromkeys(("ema", "ema-last", "gru", "attention"), DEPTH),
}


@dataclass(frozen=True)
class Exactness:
    """The result or gradient of a kernel that comes nearest to its bound, or exceeds it most."""

    family: str
    op: str
    dtype: str
    result: str
    native: float
    eager: float
    bound: float
    comparisons: int
    holds: bool
    said: str = ""  # by a check that is not about rounding

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    modules: Iterable[ModuleType], device: str, dtypes: Iterable[str], note: Callable[[str], None]
) -> Iterator[Exactness]:
    """Yields one line per kernel and element type."""
    for module in modules:
        for dtype in dtypes:
            for case in small_cases(module, device, dtype):
                if (found := _of_case(module, case, note)) is not None:
                    yield found


def small_cases(module: ModuleType, device: str, dtype: str) -> list[Case]:
    """Returns the last pass of every operator, whose check covers gradients too where there are any; none without a
    check."""
    if not hasattr(module, "check"):
        return []
    made = module.make_cases(argparse.Namespace(device=device, dtype=[dtype]))
    last = {case.op: case for case in made if case.suite == "toy"}
    return [
        replace(case, arguments=case.arguments | {"size": SIZES.get(case.op, case.arguments["size"])})
        for case in last.values()
    ]


def _of_case(module: ModuleType, case: Case, note: Callable[[str], None]) -> Exactness | None:
    said = ""
    with testing.recording() as found:
        try:
            case.build(impl="native", **case.arguments)  # is there a kernel?
            module.check(case)
        except Unavailable as reason:
            note(f"numerics of {case.op} {case.dtype}: {reason}")
            return None
        except AssertionError as wrong:
            said = str(wrong)
    return summary(case, found, said)


def summary(case: Case, found: list[testing.Comparison], said: str = "") -> Exactness | None:
    what = (case.family, case.op, case.dtype)
    if not found:
        return Exactness(*what, "", 0.0, 0.0, 0.0, 0, False, said) if said else None
    worst = max(found, key=lambda one: (not one.holds, one.error / one.bound))
    errors = (worst.error, worst.plain, worst.bound)
    return Exactness(*what, worst.name, *errors, len(found), not said and all(one.holds for one in found), said)
