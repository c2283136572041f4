"""Pooling for the layer router."""

from __future__ import annotations

from torch import Tensor

from xlayer_ext import reference
from xlayer_ext._backend import use_native
from xlayer_ext._ops.registration import call
from xlayer_ext.functional._checks import (
    check_device,
    check_floats,
    check_mask,
    check_shapes,
    is_empty,
    with_zero_gradients,
)


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Computes the mean over the tokens that a mask allows.

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

        >>> import torch
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
        result: Tensor = call("masked_mean", x, mask)
        return result
    return reference.masked_mean(x, mask)
