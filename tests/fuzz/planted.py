"""Operators with planted faults, which the fuzzers must report: `python tests/fuzz --plugin tests/fuzz/planted.py`."""

from __future__ import annotations

import ctypes
import os
import time

import torch
from torch import Tensor

from fuzz import recipes

_library = torch.library.Library("xlayer", "FRAGMENT")


def _crash(x: Tensor) -> Tensor:
    ctypes.string_at(0)
    return x


def _abort(x: Tensor) -> Tensor:
    os.abort()


def _hang(x: Tensor) -> Tensor:
    time.sleep(1000)
    return x


def _silent(x: Tensor) -> Tensor:
    raise RuntimeError("aoti_torch_empty() API call failed at ops.h, line 1")


def _odd_error(x: Tensor) -> Tensor:
    raise LookupError("x")


def _overflow(x: Tensor) -> Tensor:
    """Writes a byte beyond a tensor of its own: seen under AddressSanitizer alone."""
    own = torch.empty(17)
    ctypes.CDLL(None).memset(ctypes.c_void_p(own.data_ptr() + 17 * 4), 0, ctypes.c_size_t(1))
    return x


def _reads_beyond(x: Tensor) -> Tensor:
    """Reads some bytes more than it was given: seen on guard pages."""
    if x.device.type == "cpu" and x.layout == torch.strided:
        ctypes.string_at(x.data_ptr(), x.numel() * x.element_size() + 16)
    return x.clone()


def _wrong(x: Tensor) -> Tensor:
    return 1.5 * x


FAULTS = {
    "crash": _crash, "abort": _abort, "hang": _hang, "silent": _silent, "odd_error": _odd_error,
    "overflow": _overflow, "reads_beyond": _reads_beyond, "wrong": _wrong,
}  # fmt: skip
for _name, _fault in FAULTS.items():
    _library.define(f"planted_{_name}(Tensor x) -> Tensor")
    _library.impl(f"planted_{_name}", _fault, "CPU")
for _name in ("reads_beyond", "wrong"):
    recipes.OPERATORS[f"planted_{_name}"] = recipes.Recipe(
        lambda d: {"x": d.float(d.size("n", (1, 2, 3)))}, lambda x: (x,)
    )
