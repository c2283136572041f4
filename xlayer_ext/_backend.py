"""Which implementation serves a call: the native kernels or plain PyTorch.

``auto`` (the default) takes the native kernel where the library is loaded and has one for the tensors' device and
dtype, and the reference otherwise. ``native`` insists and raises where there is none; ``reference`` never takes it.
``XLAYER_BACKEND`` sets the choice at import, :class:`backend` for a block of code. The choice is one module global, so
``torch.compile`` guards on it and a compiled function follows a change.
"""

from __future__ import annotations

import os
from types import TracebackType

import torch
from torch import Tensor

from xlayer_ext import _library

CHOICES = ("auto", "native", "reference")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _checked(choice: str, origin: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{origin} must be one of {', '.join(CHOICES)}; got {choice!r}")
    return choice


_choice = _checked(os.environ.get("XLAYER_BACKEND") or "auto", "XLAYER_BACKEND")


def _kernels() -> frozenset[tuple[str, str]]:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("xlayer::")]
    return frozenset(
        (name.removeprefix("xlayer::"), device)
        for name in names
        for device in ("cpu", "cuda")
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())
    )


_library.load()
_KERNELS = _kernels()  # (operator, device type) of every native kernel; a constant to torch.compile


def native_available(op: str | None = None) -> bool:
    """Whether the native library is loaded in this process and, if ``op`` is given, has that operator."""
    return any(op in (None, name) for name, _ in _KERNELS)


def current_backend() -> str:
    """``"native"`` or ``"reference"``: what a supported input on the CPU would use now."""
    return "native" if _choice != "reference" and native_available() else "reference"


def use_native(op: str, *tensors: Tensor, beyond: str | None = None) -> bool:
    """Whether ``torch.ops.xlayer.<op>`` should serve these tensors; not if they are ``beyond`` what it can, in words.

    Raises:
        RuntimeError: the backend ``native`` was asked for by name and cannot serve them.
    """
    if _choice == "reference":
        return False
    supported = beyond is None and all((op, t.device.type) in _KERNELS and t.dtype in _DTYPES for t in tensors)
    if not supported and _choice == "native":
        got = beyond or ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise RuntimeError(
            f"backend 'native' was asked for, but there is no native {op} for {got}; "
            "`python -m xlayer_ext.info` says what was built"
        )
    return supported


class backend:
    """Context manager that chooses the backend inside a ``with`` block: ``auto``, ``native`` or ``reference``.

    Example::

        with xlayer_ext.backend("reference"):
            expected = module(x, source)
    """

    def __init__(self, choice: str) -> None:
        self._wanted = _checked(choice, "backend")

    def __enter__(self) -> None:
        global _choice
        self._before = _choice
        _choice = self._wanted

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _choice
        _choice = self._before
