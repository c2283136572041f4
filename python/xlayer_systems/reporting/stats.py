"""Intervals for the accuracies in reports: Wilson for one run, Student's t over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any


@dataclass(frozen=True)
class Interval:
    """Holds a point estimate with its lower and upper confidence bounds."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> Interval:
    """Computes the interval of a proportion from ``correct`` hits among ``total`` independent examples.

    Wilson's score interval (JASA 22, 1927): stays inside [0, 1] and keeps its coverage near 0 and 1.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"expected 0 <= correct <= total and total > 0, got correct={correct}, total={total}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    scale = 1 + z * z / total
    center = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return Interval(share, max(0.0, center - half), min(1.0, center + half))


def student_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Computes the interval of the mean of ``values``, by Student's t with ``len(values) - 1`` degrees of freedom."""
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least two values, got {len(values)}")
    mean = fmean(values)
    half = student_quantile(confidence, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def counted(correct: int, total: int) -> dict[str, Any]:
    """Returns a proportion with its Wilson interval, as ``{"mean", "low", "high", "correct", "total"}``."""
    return {**asdict(wilson_interval(correct, total)), "correct": correct, "total": total}


def over_seeds(proportions: Sequence[Mapping[str, Any]]) -> Interval:
    """Returns Student's interval over the means of several runs, or the own interval of a single one."""
    if len(proportions) > 1:
        return student_interval([proportion["mean"] for proportion in proportions])
    return Interval(*(proportions[0][key] for key in ("mean", "low", "high")))


def kind_over_seeds(seeds: int) -> str:
    """Names the kind of interval that `over_seeds` returns for so many runs."""
    return f"Student's t over {seeds} seeds" if seeds > 1 else "Wilson, one seed"


def student_quantile(confidence: float, degrees: int) -> float:
    """Returns the t with P(|T| < t) = ``confidence`` at a whole number of ``degrees`` of freedom, by bisection."""
    low, high = 0.0, 1.0
    while _student_central(high, degrees) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if _student_central(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return high


def _student_central(t: float, degrees: int) -> float:
    """Computes P(|T| < t) in closed form for integer degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(degrees // 2):
        total += term
        term *= cosine * cosine * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
