"""Finds and loads `libxlayer.so`, the operators. Stable ABI: one file serves every torch >= 2.10.

`load()` runs once, when `xlayer_ext` is imported. It never raises: without the library the reference backend serves,
`LOADED` is False, `REASON` says why in one sentence, and one `RuntimeWarning` says it to the user.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

PATH = Path(__file__).with_name("libxlayer.so")
MINIMUM_TORCH = (2, 10)
BUILD_COMMAND = "pip install -e . --no-build-isolation"

LOADED: bool = False
REASON: str | None = None


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _why_not(error: OSError) -> str:
    """The linker's complaint, in words."""
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


def load() -> None:
    """Loads the operators if they are there and fit; otherwise warns once and leaves the reference backend in use."""
    global LOADED, REASON
    if LOADED or REASON is not None:
        return
    REASON = _try_load()
    LOADED = REASON is None
    if not LOADED:
        warnings.warn(f"xlayer_ext uses its reference backend (plain PyTorch): {REASON}", RuntimeWarning, stacklevel=3)


load()
