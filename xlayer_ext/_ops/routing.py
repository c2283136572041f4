"""Registers the operators of the layer router: fake tensors and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xlayer_ext._backend import native_available
from xlayer_ext._ops.registration import (
    call,
    check_fake,
    check_fake_as,
    check_one_device,
    register,
    register_derivative,
)


def _fake(x: Tensor, mask: Tensor | None) -> Tensor:
    check_one_device(x, mask)
    check_fake(x, x=(x, (None, None, None)))
    check_fake_as(torch.bool, mask=(mask, x.shape[:2]))
    return x.new_empty((x.shape[0], x.shape[2]))


def _fake_backward(grad: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
    check_one_device(grad, mask)
    check_fake(grad, grad=(grad, (None, None)))
    check_fake_as(torch.bool, mask=(mask, (grad.shape[0], tokens)))
    if tokens < 0:
        raise ValueError(f"tokens must not be negative, got {tokens}")
    return grad.new_empty((grad.shape[0], tokens, grad.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask = inputs
    ctx.save_for_backward(mask)
    ctx.tokens = x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (mask,) = ctx.saved_tensors
    return call("masked_mean_backward", grad, mask, ctx.tokens), None


if native_available("masked_mean"):
    register("masked_mean", _fake, _backward, _setup_context)
    register_derivative("masked_mean_backward", _fake_backward)
