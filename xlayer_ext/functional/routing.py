"""Pooling for the layer router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xlayer_ext import reference
from xlayer_ext._backend import native_available, use_native
from xlayer_ext.functional._checks import (
    check_device,
    check_floats,
    check_mask,
    check_one_device,
    check_shapes,
    forbid_second_derivative,
    is_empty,
    with_zero_gradients,
)


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean over the tokens that a mask allows.

    .. math:: y_{bh} = \frac{1}{|\{s: m_{bs}\}|} \sum_{s: m_{bs}} x_{bsh}

    Sums in float32 (float64 for float64), whatever the dtype; deterministic. A masked token may hold NaN.

    Args:
        x: ``[B, S, H]``, float64, float32, bfloat16 or float16, any strides.
        mask: bool ``[B, S]``, True = counts; ``None`` counts every token.

    Returns:
        ``[B, H]`` in the dtype of ``x``; 0 where no token counts.

    Raises:
        TypeError: ``x`` is not floating point, or ``mask`` not boolean.
        ValueError: shapes disagree.

    Example::

        >>> masked_mean(torch.tensor([[[1.0], [3.0], [8.0]]]), torch.tensor([[True, True, False]]))
        tensor([[2.]])
    """
    check_floats(x=x)
    if isinstance(mask, Tensor):
        check_device(x=x, mask=mask)
    check_mask("mask", mask, x)
    check_shapes({"x": "B S H", "mask": "B S"}, x=x, mask=mask)
    if is_empty((x.shape[0], x.shape[2])):
        return with_zero_gradients(x.new_empty(x.shape[0], x.shape[2]), x)
    if use_native("masked_mean", x):
        return torch.ops.xlayer.masked_mean(x, mask)
    return reference.masked_mean(x, mask)


def _fake(x: Tensor, mask: Tensor | None) -> Tensor:
    check_one_device(x, mask)
    return x.new_empty((x.shape[0], x.shape[2]))


def _fake_backward(grad: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
    check_one_device(grad, mask)
    return grad.new_empty((grad.shape[0], tokens, grad.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask = inputs
    ctx.save_for_backward(mask)
    ctx.tokens = x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (mask,) = ctx.saved_tensors
    return torch.ops.xlayer.masked_mean_backward(grad, mask, ctx.tokens), None


if native_available("masked_mean"):
    torch.library.register_fake("xlayer::masked_mean", _fake)
    torch.library.register_fake("xlayer::masked_mean_backward", _fake_backward)
    torch.library.register_autograd("xlayer::masked_mean", _backward, setup_context=_setup_context)
    forbid_second_derivative("masked_mean_backward")
