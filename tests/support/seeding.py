"""Seeds of the tests' random inputs.

A seed is made of the test's id without its folder, a number (`--seed`, 0 by default) and how many seeds the test has
taken before. A test so draws the same inputs in every run, in whatever order and beside whatever others it runs. `make
soak` runs the tests that draw with fresh numbers.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy
import torch


@dataclass
class _Running:
    """State of the test that runs now; outside of pytest, for example in a child process of a test, it stays empty."""

    test: str = ""
    number: int = 0
    taken: int = 0


_running = _Running()


def begin(test: str, number: int) -> None:
    """Starts the seeds of a test, and seeds the global generators of Python, NumPy and torch."""
    global _running
    file, *name = test.split("::", 1)
    _running = _Running("::".join([f"tests/{file.split('/')[-1]}", *name]), number)
    seed = _seed(-1)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def next_seed() -> int:
    """Returns the running test's next seed, in [0, 2³¹)."""
    _running.taken += 1
    return _seed(_running.taken)


def drew() -> bool:
    """Tells whether the running test has taken a seed, or numbers of torch's global generator as `begin` left it."""
    seed = _seed(-1)
    untouched = torch.Generator().manual_seed(seed).get_state()
    return _running.taken > 0 or (torch.initial_seed() == seed and not torch.equal(torch.get_rng_state(), untouched))


def _seed(position: int) -> int:
    text = f"{_running.test} {_running.number} {position}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
