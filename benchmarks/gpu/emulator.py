"""Runs the CUDA kernels on a CPU with the tests' emulator, for `--device emulated`.

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
    """Imports the tests' module that loads the emulator's library."""
    folder = str(Path(__file__).parents[2] / "tests" / "support")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("emulation")


def take_over(arguments: list[str]) -> list[str]:
    """Makes the emulator serve the native operators if the arguments name it; returns the arguments without it."""
    for at, pair in enumerate(pairwise(arguments)):
        if pair == ("--device", "emulated"):
            emulation().take_over()
            return [*arguments[:at], *OPTIONS, *arguments[at + 2 :]]
    return arguments
