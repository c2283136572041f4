"""Checks arguments and applies autocast for the functional API and the modules.

Every error names the argument, what it got and what it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from xlayer_ext._backend import FLOATS


def check_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def check_common(**tensors: Tensor) -> None:
    """Checks that all tensors have one dtype and are on one device."""
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}; got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}; got {tensor.device}")


def check_mask(name: str, mask: Tensor | None, like: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor (True = may be used), got {mask.dtype}")
    if mask.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other inputs, got {mask.device}")


def check_shapes(layouts: dict[str, str], **tensors: Tensor | None) -> None:
    """Checks shapes against layouts such as ``{"query": "B Sq D", "weight1": "M 4D"}``.

    An axis gets its size where it is met first, alone if the tensor has it alone; a number before it multiplies.
    ``None`` tensors are skipped.
    """
    sizes: dict[str, int] = {}
    owners: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        axes = layouts[name].split()
        wanted = f"{name} must have shape [{', '.join(axes)}]"
        if tensor.dim() != len(axes):
            raise ValueError(f"{wanted}, got {list(tensor.shape)}")
        pairs = list(zip(axes, tensor.shape, strict=True))
        alone = [pair for pair in pairs if not pair[0][0].isdigit()]
        for axis, size in alone + [pair for pair in pairs if pair[0][0].isdigit()]:
            symbol = axis.lstrip("0123456789")
            if symbol not in sizes:
                sizes[symbol] = size
                owners[symbol] = name
            if size != int(axis[: -len(symbol)] or 1) * sizes[symbol]:
                why = f"{symbol} = {sizes[symbol]} as in {owners[symbol]}"
                raise ValueError(f"{wanted} with {why}, got {list(tensor.shape)}")


def check_choice(name: str, got: str, choices: Sequence[str]) -> None:
    if got not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {got!r}")


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor lives."""
    device = tensor.device.type
    # torch.amp.is_autocast_available would tell this of meta, but torch.compile of torch 2.11 cannot trace it.
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts the tensors, float64 excepted, to the dtype of autocast where it is on."""
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def no_autocast(like: Tensor) -> AbstractContextManager[None]:
    """Returns a context without autocast on the device of ``like``, for products that it must not round."""
    return torch.autocast(like.device.type, enabled=False) if autocasts(like) else nullcontext()


@torch.compiler.assume_constant_result  # a compiled graph guards on the setting, but cannot read it
def tf32_allowed() -> bool:
    """Whether the user lets factors of float32 products be rounded."""
    return torch.get_float32_matmul_precision() != "highest"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a forward must keep what its backward reads."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---- what the public functions are given -----------------------------------------------------------------------------

MAX_INTEGER = 2**63 - 1  # the operators count in int64
MAX_ITERATIONS = 1000  # of Sinkhorn's algorithm and of k-means: far beyond where either still changes anything


def check_floats(**tensors: Tensor) -> None:
    """Checks that each is a dense tensor of float64, float32, bfloat16 or float16."""
    check_floating(**tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got one of layout {tensor.layout}")


def check_int64(**tensors: Tensor) -> None:
    """Checks that each is a tensor of int64."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")


def check_device(**tensors: Tensor | None) -> None:
    """Checks that all tensors are on one device."""
    (first_name, first), *rest = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in rest:
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}; got {tensor.device}")


def check_integer(name: str, value: int, least: int = -MAX_INTEGER - 1, most: int = MAX_INTEGER) -> None:
    """Checks that a value is an integer in [least, most], within int64."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def check_sizes(**sizes: int) -> None:
    """Checks that each is an integer of at least 1."""
    for name, size in sizes.items():
        check_integer(name, size, 1)


def check_not_negative(**numbers: float) -> None:
    """Checks that each is a finite number of at least 0."""
    for name, number in numbers.items():
        _check_number(name, number)
        if not 0 <= number <= sys.float_info.max:
            raise ValueError(f"{name} must not be negative, and finite; got {number}")


def check_positive(**numbers: float) -> None:
    """Checks that each is a finite number above 0."""
    for name, number in numbers.items():
        _check_number(name, number)
        if not 0 < number <= sys.float_info.max:
            raise ValueError(f"{name} must be positive and finite, got {number}")


def check_finite(**numbers: float) -> None:
    """Checks that each is a finite number."""
    for name, number in numbers.items():
        _check_number(name, number)
        if not abs(number) <= sys.float_info.max:
            raise ValueError(f"{name} must be finite, got {number}")


def _check_number(name: str, number: float) -> None:
    if not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(number, bool):
        raise TypeError(f"{name} must be a float, got {type(number).__name__}")


def check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")


def check_values(name: str, tensor: Tensor, below: int, besides: int | None = None) -> None:
    """Checks that integers are in [0, below) or equal to ``besides``.

    Reads the values only where that costs neither a wait for a device nor a break of a graph; elsewhere torch's own
    kernels raise.
    """
    if torch.compiler.is_compiling() or not _readable(tensor):
        return
    wrong = (tensor < 0) | (tensor >= below)
    if besides is not None:
        wrong &= tensor != besides
    if wrong.any():
        exception = "" if besides is None else f", or {besides}"
        found = int(tensor[wrong][0])
        raise ValueError(f"{name} must be at least 0 and below {below}{exception}; got {found}")


def _readable(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and type(tensor) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def is_empty(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape has no elements."""
    return any(size == 0 for size in shape)


def with_zero_gradients(result: Tensor, *inputs: Tensor | None) -> Tensor:
    """Adds ``inputs`` to the graph of ``result`` with gradient 0, for empty results that need no computation."""
    for tensor in inputs:
        if tensor is not None:
            result = result + tensor[(slice(0),) * tensor.dim()].sum()
    return result
