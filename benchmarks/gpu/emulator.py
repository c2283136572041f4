"""`--device emulated`: the CUDA kernels on a CPU, through the tests' emulator.

It shows that a script runs; its times say nothing of a GPU, and so its rows are labelled.
"""

from __future__ import annotations

import importlib
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

OPTIONS = ("--device", "cpu", "--label", "emulator", "--no-memory")  # peak memory would be that of another process


def emulation() -> ModuleType:
    """The module of the tests that loads the emulator's library."""
    folder = str(Path(__file__).parents[2] / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("emulation")


def take_over(arguments: list[str]) -> list[str]:
    """The arguments of a benchmark; where they name the emulated device, it serves the native operators from now on."""
    for at, pair in enumerate(pairwise(arguments)):
        if pair == ("--device", "emulated"):
            emulation().take_over()
            return [*arguments[:at], *OPTIONS, *arguments[at + 2 :]]
    return arguments
