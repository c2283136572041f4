"""Chooses the implementation of a call: the native kernels or plain PyTorch.

``auto`` (the default) takes the native kernel where the library is loaded and has one for the tensors' device and
dtype, and the reference otherwise. ``native`` insists and raises where there is none; ``reference`` never takes it.
``XLAYER_BACKEND`` sets the choice at import, :class:`backend` for a block of code.

The kernels have first derivatives, in reverse mode. Under forward-mode differentiation, under :func:`torch.vmap`, for
second derivatives with torch.func, and wherever torch.compile traces torch.func, the reference serves whatever the
tensors are; ``native`` then raises.
"""

from __future__ import annotations

import os
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from xlayer_ext import _library

CHOICES = ("auto", "native", "reference")
REFERENCE = "xlayer_ext.backend('reference')"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _checked(choice: str, origin: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{origin} must be one of {', '.join(CHOICES)}; got {choice!r}")
    return choice


_default = _checked(os.environ.get("XLAYER_BACKEND") or "auto", "XLAYER_BACKEND")
_chosen: ContextVar[str] = ContextVar("xlayer_backend")
_tokens: ContextVar[tuple[Token[str], ...]] = ContextVar("xlayer_backend_tokens", default=())
_traced: str | None = None  # chosen by a `with` that torch.compile is tracing; None outside of one


class _Context:
    """Reads the context variable as an attribute, ``chosen``, which is the object itself where nothing was chosen.

    torch.compile can neither trace ``ContextVar.get`` nor guard on it, but it does guard on attributes, and reads those
    that are written in C: so a compiled function follows the choice of the context that it is called in.
    """

    chosen = property(cast(Any, _chosen.get))  # get(default): the object is the default


_context = _Context()


def choice() -> str:
    """Returns what was chosen for this context: ``"auto"``, ``"native"`` or ``"reference"``."""
    if _traced is not None:
        return _traced
    chosen: str | _Context = _context.chosen
    if not isinstance(chosen, _Context):
        return chosen
    if not torch.compiler.is_dynamo_compiling() and torch._C._current_graph_task_id() != -1:
        # Backward may run in a thread of autograd's own and compute a checkpointed block again. torch hands it the
        # context that backward was called in.
        around = torch._C._get_obj_in_tls("context") if torch._C._is_key_in_tls("context") else {}
        return around.get(_chosen, _default)
    return _default


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
    """Returns the backend of a supported input on the CPU: ``"native"`` or ``"reference"``."""
    return "native" if choice() != "reference" and native_available() else "reference"


def _has_kernel(op: str, device: str) -> bool:
    """Whether the operator runs there; on meta its fake kernel does, without the reference's loops."""
    return (op, device) in _KERNELS or (device == "meta" and native_available(op))


@torch.compiler.assume_constant_result  # torch.compile enters those that it traces, and guards on those around it
def transforms() -> list[str]:
    """Names the transforms of torch.func around this call that differentiate or map it, outermost first: ``Grad``,
    ``Jvp``, ``Vmap``."""
    names = [interpreter.key().name for interpreter in torch._C._functorch.get_interpreter_stack() or ()]
    return [name for name in names if name in ("Grad", "Jvp", "Vmap")]


def _unsupported_transform() -> str | None:
    """Names the transform around this call that the kernels do not support; None if there is none."""
    around = transforms()
    if "Jvp" in around:
        return "forward-mode differentiation"
    if "Vmap" in around:
        return "torch.vmap"
    if around.count("Grad") > 1:
        return "second derivatives"
    if around and torch.compiler.is_dynamo_compiling():  # which cannot trace an autograd.Function there
        return "torch.func inside torch.compile"
    # A module global, so that torch.compile guards on it.
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else None


def use_native(op: str, *tensors: Tensor, unsupported_reason: str | None = None) -> bool:
    """Whether ``torch.ops.xlayer.<op>`` should serve these tensors.

    Args:
        unsupported_reason: what the kernels cannot serve, in words; None where they can.

    Raises:
        RuntimeError: the backend ``native`` was asked for by name and cannot serve them.
    """
    chosen = choice()
    if chosen == "reference":
        return False
    unsupported_reason = unsupported_reason or _unsupported_transform()
    supported = unsupported_reason is None and all(
        _has_kernel(op, t.device.type) and t.dtype in FLOATS for t in tensors
    )
    if not supported and chosen == "native":
        got = unsupported_reason or ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        hint = f"it needs {REFERENCE}" if unsupported_reason else "`python -m xlayer_ext.info` says what was built"
        raise RuntimeError(f"backend 'native' was asked for, but there is no native {op} for {got}; {hint}")
    return supported


class backend:
    """Chooses the backend inside a ``with`` block: ``auto``, ``native`` or ``reference``.

    The choice belongs to the context (:mod:`contextvars`): other threads and asyncio tasks do not see it. A thread that
    is started inside the block has the default, an asyncio task what was chosen where it was created. Compiled
    functions follow it in the same way, and are traced once for each choice; only those that autograd calls from a
    thread of its own, to recompute a checkpoint on CUDA, have the default. One object may be entered many times, by
    many threads.

    Example::

        with xlayer_ext.backend("reference"):
            expected = module(x, source)
    """

    def __init__(self, choice: str) -> None:
        self._wanted = _checked(choice, "backend")

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            global _traced
            self._before = _traced
            _traced = self._wanted
        else:
            _tokens.set((*_tokens.get(), _chosen.set(self._wanted)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.compiler.is_dynamo_compiling():
            global _traced
            _traced = self._before
        else:
            *outer, token = _tokens.get()
            _chosen.reset(token)
            _tokens.set(tuple(outer))
