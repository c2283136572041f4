"""Registers an operator with torch: fake tensors, its gradient, and the transforms of torch.func."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from xlayer_ext._backend import FLOATS, REFERENCE, transforms

Function = Callable[..., Any]

_LIBRARY = torch.library.Library("xlayer", "FRAGMENT")  # holds the registrations as long as the process lives
_FUNCTIONS: dict[str, Any] = {}  # an autograd.Function for each operator


def register_fake(op: str, fake: Function) -> None:
    """Registers ``fake`` for tensors without data; before it is called, a required tensor that is None is refused."""
    schema = getattr(torch.ops.xlayer, op).default._schema
    required = [(at, argument.name) for at, argument in enumerate(schema.arguments) if str(argument.type) == "Tensor"]

    @functools.wraps(fake)
    def checked(*arguments: Any) -> Any:
        for at, name in required:
            if arguments[at] is None:
                raise TypeError(f"{name} must be a tensor, got None")
        return fake(*arguments)

    torch.library.register_fake(f"xlayer::{op}", checked)


def register(op: str, fake: Function, backward: Function, setup_context: Function) -> None:
    """Registers ``xlayer::<op>`` and its gradient, as :func:`torch.library.register_autograd` does, for :func:`call`.

    ``backward`` has to reach other operators through :func:`call`.
    """
    register_fake(op, fake)
    _FUNCTIONS[op] = _function(op, backward, setup_context)
    generated = make_autograd_impl(getattr(torch.ops.xlayer, op).default, Info(backward, setup_context))

    def autograd(keyset: Any, *arguments: Any) -> Any:
        # Without these two, tangents are dropped silently, and torch.func raises about a missing setup_context.
        if forward_ad._current_level >= 0 and any(_has_tangent(argument) for argument in arguments):
            raise no_forward_derivative(op)
        if transforms() and torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            raise RuntimeError(f"torch.func can differentiate xlayer::{op} only within xlayer_ext.functional")
        return generated(keyset, *arguments)

    _LIBRARY.impl(op, autograd, "Autograd", with_keyset=True)


def register_derivative(op: str, fake: Function) -> None:
    """Registers ``xlayer::<op>``, itself a derivative: differentiating it raises."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise no_second_derivative(op)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    register(op, fake, backward, setup_context)


def call(op: str, *arguments: Any) -> Any:
    """Calls ``torch.ops.xlayer.<op>``; inside torch.func through an autograd.Function, as its transforms need."""
    if transforms():
        return _FUNCTIONS[op].apply(*arguments)
    return getattr(torch.ops.xlayer, op)(*arguments)


def no_second_derivative(op: str, how: str = "") -> RuntimeError:
    return RuntimeError(f"xlayer::{op} cannot be differentiated{how}: second derivatives need {REFERENCE}")


def no_forward_derivative(op: str) -> RuntimeError:
    return RuntimeError(f"xlayer::{op} has no forward-mode derivative: it needs {REFERENCE}")


def check_one_device(*arguments: object) -> None:
    """Refuses tensors on several devices: fake kernels also get calls that mix meta tensors with real ones."""
    devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def check_kept(keep: bool, op: str) -> None:
    """Refuses a backward whose forward was called with ``keep=False``."""
    if not keep:
        raise RuntimeError(f"xlayer::{op} was called with keep=False: nothing was kept for its gradient")


def check_fake(like: Tensor, **expected: tuple[Tensor | None, Sequence[int | None]]) -> None:
    """Refuses for fake tensors what the operators refuse for real ones: other shapes and dtypes than they need.

    ``name=(tensor, shape)``, None for a length that may be any; every tensor in the dtype of ``like``.
    """
    if like.dtype not in FLOATS:
        name = next((name for name, (tensor, _) in expected.items() if tensor is like), "the first tensor")
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {like.dtype}")
    check_fake_as(like.dtype, **expected)


def check_fake_as(dtype: torch.dtype, **expected: tuple[Tensor | None, Sequence[int | None]]) -> None:
    """Does the same for tensors that need this dtype."""
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        fits = tensor.dim() == len(shape) and all(
            wanted is None or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("*" if length is None else str(length) for length in shape)
            raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")


def accumulation(tensor: Tensor) -> torch.dtype:
    """Returns the accumulation dtype: float64 for float64, else float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def _function(op: str, backward: Function, setup_context: Function) -> Any:
    def forward(*arguments: Any) -> Any:
        return getattr(torch.ops.xlayer, op)(*arguments)

    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        """Makes one call after another: for the cotangents of a Jacobian, of which there are few."""
        size, pairs = info.batch_size, list(zip(arguments, in_dims, strict=True))
        if size == 0:  # one call gives the shapes
            pairs = [(a if d is None else a.new_zeros([*a.shape[:d], 1, *a.shape[d + 1 :]]), d) for a, d in pairs]
        samples = ([a if d is None else a.select(d, index) for a, d in pairs] for index in range(max(size, 1)))
        results = [_FUNCTIONS[op].apply(*sample) for sample in samples]
        return tree_map(lambda *tensors: torch.stack(tensors)[:size], *results), tree_map(lambda _: 0, results[0])

    def jvp(ctx: Any, *tangents: Any) -> None:
        raise no_forward_derivative(op)

    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "vmap": vmap, "jvp": jvp}
    members = {name: staticmethod(method) for name, method in methods.items()}
    return type(f"xlayer_{op}", (torch.autograd.Function,), members)
