"""Finds and loads `libxlayer.so`, the operators. Stable ABI: one file serves every torch >= 2.10.

`load()` runs once, when `xlayer_ext` is imported. It never raises: without the library the reference backend serves,
`LOADED` is False, `REASON` says why in one sentence, and one `RuntimeWarning` says it to the user.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("libxlayer.so")
MINIMUM_TORCH = (2, 10)
if PATH.parents[1].joinpath("setup.py").exists():  # a checkout
    BUILD_COMMAND = "pip install -e . --no-build-isolation"
else:
    BUILD_COMMAND = "with a C++ compiler, pip install --force-reinstall --no-deps --no-build-isolation SOURCE"

LOADED: bool = False
REASON: str | None = None


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _why_not(error: OSError) -> str:
    """Explains the linker's error."""
    text = str(error.__cause__ or error)
    if "undefined symbol" in text:
        symbol = text.rsplit("undefined symbol:", 1)[-1].strip().split(",")[0]
        return (
            f"libxlayer.so does not fit this torch {torch.__version__}: torch lacks `{symbol}`, which the library was "
            f"built to use; build it again in this environment: {BUILD_COMMAND}"
        )
    if "cannot open shared object file" in text:
        missing = text.split(":")[0].strip()
        return f"libxlayer.so needs `{missing}`, which is not on this machine; build it again: {BUILD_COMMAND}"
    return f"libxlayer.so is not a library that this machine can load ({text}); build it again: {BUILD_COMMAND}"


def _try_load() -> str | None:
    """Loads the library; returns None, or one sentence that says why it could not be loaded."""
    if not PATH.exists():
        return f"the native library has not been built ({PATH} is missing); build it: {BUILD_COMMAND}"
    if _torch_version() < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        return f"the native library needs torch >= {wanted}, and this is torch {torch.__version__}; upgrade torch"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return _why_not(error)
    return None


# Messages of torch, and of libxlayer where torch passes none on, for a device without free memory.
_FULL = re.compile(r"(CUDA|HIP) out of memory|not enough memory for ")


def _raising_out_of_memory(op: Callable[..., Any]) -> Callable[..., Any]:
    """Raises `torch.OutOfMemoryError` where ``op`` raises its message as a plain `RuntimeError`."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return op(*args, **kwargs)
        except RuntimeError as error:
            if type(error) is RuntimeError and _FULL.match(str(error)):
                raise torch.OutOfMemoryError(str(error)) from None
            raise

    return call


def _translate_out_of_memory(packets: Iterable[Any]) -> None:
    """Makes operators raise `torch.OutOfMemoryError`, which the stable ABI cannot: errors cross it as messages."""
    for packet in packets:
        for op in (packet, packet.default):
            op._op = _raising_out_of_memory(op._op)


def _operators() -> list[Any]:
    names = torch._C._dispatch_get_all_op_names()
    return [getattr(torch.ops.xlayer, name.split("::")[1]) for name in names if name.startswith("xlayer::")]


def load() -> None:
    """Loads the operators if they are there and fit; otherwise warns once and leaves the reference backend in use."""
    global LOADED, REASON
    if LOADED or REASON is not None:
        return
    REASON = _try_load()
    LOADED = REASON is None
    if LOADED and (torch.version.cuda or torch.version.hip):  # the CPU's allocator raises RuntimeError, as elsewhere
        _translate_out_of_memory(_operators())
    if not LOADED:
        warnings.warn(f"xlayer_ext uses its reference backend (plain PyTorch): {REASON}", RuntimeWarning, stacklevel=3)


load()
