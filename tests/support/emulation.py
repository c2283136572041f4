"""The emulator's operator library (tests/emulator): the CUDA kernels, run on tensors of the CPU.

It registers them as ``torch.ops.xlayer_emulated.*``, beside the CPU kernels of ``torch.ops.xlayer.*``. With
``--device emulated`` they serve ``torch.ops.xlayer.*`` too, and so everything above them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parents[2] / "build" / "emulator"
LIBRARY = Path(os.environ.get("XLAYER_EMULATOR_LIBRARY") or FOLDER / "libxlayer_emulated.so")
SEED = int(os.environ.get("XLAYER_EMULATOR_SEED", "1"))

_overrides: torch.library.Library | None = None


@functools.cache
def library() -> ctypes.CDLL:
    """Loads the library and registers its operators."""
    if not LIBRARY.exists():
        raise FileNotFoundError(f"{LIBRARY} is missing: make emulator")
    torch.ops.load_library(str(LIBRARY))
    loaded = ctypes.CDLL(str(LIBRARY))
    loaded.xlayer_emulator_launches.restype = ctypes.c_uint64
    loaded.xlayer_emulator_set_seed.argtypes = [ctypes.c_uint64]
    loaded.xlayer_emulator_launched_blocks.restype = ctypes.c_char_p
    return loaded


def launches() -> int:
    """Counts the kernels that have been launched."""
    return int(library().xlayer_emulator_launches())


def set_seed(seed: int) -> None:
    """Chooses the order in which blocks and threads take turns."""
    library().xlayer_emulator_set_seed(seed)


class LaunchedBlock(NamedTuple):
    """Threads of a block in launches of a kernel, and the most shared memory that a launch with so many asked for."""

    kernel: str
    threads: int
    shared_bytes: int


@functools.cache
def functions() -> dict[int, str]:
    """Returns the names of the library's functions, with parameters, by their addresses in it."""
    run = subprocess.run(["nm", "-C", "--defined-only", LIBRARY], capture_output=True, text=True, check=True)
    symbols = (line.split(maxsplit=2) for line in run.stdout.splitlines())
    return {int(address, 16): name for address, kind, name in symbols if kind in "tTwW"}


def launched_blocks() -> list[LaunchedBlock]:
    """Returns the blocks of all launches since ``forget_launched_blocks()``."""
    lines = library().xlayer_emulator_launched_blocks().decode().splitlines()
    blocks = (map(int, line.split()) for line in lines)
    return [LaunchedBlock(functions()[kernel], threads, shared_bytes) for kernel, threads, shared_bytes in blocks]


def forget_launched_blocks() -> None:
    library().xlayer_emulator_forget_launched_blocks()


def kernels_of(namespace: str) -> frozenset[str]:
    """Names of the operators in a namespace that have a kernel for tensors of the CPU."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")]
    return frozenset(
        name.removeprefix(f"{namespace}::")
        for name in names
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    )


@functools.cache
def operators() -> frozenset[str]:
    """Names of the operators whose CUDA kernels the emulator has."""
    library()
    return kernels_of("xlayer_emulated")


def active() -> bool:
    """Tells whether the emulator serves ``torch.ops.xlayer.*``."""
    return _overrides is not None


def take_over() -> None:
    """Makes the emulator serve ``torch.ops.xlayer.*`` from now on; an operator that it lacks raises."""
    global _overrides

    def lacking(name: str) -> Callable[..., Any]:
        def raises(*arguments: Any) -> Any:
            raise NotImplementedError(f"xlayer::{name} has no CUDA kernel for the emulator to run")

        return raises

    import xlayer_ext  # registers torch.ops.xlayer.*

    assert xlayer_ext._library.LOADED, xlayer_ext._library.REASON
    set_seed(SEED)
    has = operators()
    _overrides = torch.library.Library("xlayer", "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # torch's, of every override
        for name in kernels_of("xlayer"):
            _overrides.impl(name, getattr(torch.ops.xlayer_emulated, name).default if name in has else lacking(name))
