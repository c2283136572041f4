"""Registers the operators of quantization: fake tensors, the gradient of FSQ, the grid that FSQ rounds to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xlayer_ext._backend import native_available
from xlayer_ext._ops.registration import (
    accumulation,
    check_fake,
    check_fake_as,
    check_kept,
    check_one_device,
    no_second_derivative,
    register,
    register_fake,
)

MAX_DIMENSIONS, MAX_LEVELS = 64, 2**20
FSQ_EPS = 1e-3
LARGEST_INDEX = 2**63 - 1


def fsq_offsets(levels: Sequence[int], variant: str) -> list[tuple[float, float, float]]:
    """Returns shift, half width and middle of the bound ``offset`` for each dimension."""
    found = []
    for count in levels:
        half = (count - 1) * (1 + FSQ_EPS if variant == "package" else 1 - FSQ_EPS) / 2
        middle = 0.0 if count % 2 else 0.5
        shift = math.atanh(middle / half) if variant == "package" else math.tan(middle / half)
        found.append((shift, half, middle))
    return found


def fsq_basis(levels: Sequence[int]) -> list[int] | None:
    """Returns the weight of each dimension's digit in the index; None where indices would not fit into 63 bits."""
    if len(levels) > 63 or math.prod(levels) > LARGEST_INDEX + 1:  # 64 levels are at least 2 each
        return None
    return [math.prod(levels[:dimension]) for dimension in range(len(levels))]


def _fake_nearest(x: Tensor, codebook: Tensor, cosine: bool, tf32: bool) -> tuple[Tensor, Tensor]:
    check_one_device(x, codebook)
    check_fake(x, x=(x, (None, None, None)))
    check_fake(x, codebook=(codebook, (x.shape[0], None, x.shape[2])))
    if codebook.shape[1] == 0 or codebook.shape[2] == 0:
        raise ValueError(f"codebook must have at least one code and one column, got {list(codebook.shape)}")
    return x.new_empty(x.shape[:2], dtype=torch.int64), x.new_empty(x.shape[:2], dtype=accumulation(x))


def _fake_statistics(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    check_one_device(x, indices)
    check_fake(x, x=(x, (None, None, None)))
    check_fake_as(torch.int64, indices=(indices, x.shape[:2]))
    if codebook_size < 1:
        raise ValueError(f"codebook_size must be at least 1, got {codebook_size}")
    num_codebooks, _, width = x.shape
    wide = accumulation(x)
    return x.new_empty((num_codebooks, codebook_size), dtype=wide), x.new_empty(
        (num_codebooks, codebook_size, width), dtype=wide
    )


def _fake_fsq(
    z: Tensor, levels: list[int], shift: list[float], half: list[float], middle: list[float], offset: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not 1 <= len(levels) <= MAX_DIMENSIONS:
        raise ValueError(f"levels must have 1 to {MAX_DIMENSIONS} entries, got {len(levels)}")
    if z.dim() < 1:
        raise ValueError("z must have at least one dimension")
    check_fake(z, z=(z, (*z.shape[:-1], len(levels))))
    for column in (shift, half, middle):
        if len(column) != (len(levels) if offset else 0):
            raise ValueError(f"shift, half and middle must have an entry per level for offset, got {len(column)}")
    least = 3 if offset else 2
    for level in levels:
        if not least <= level <= MAX_LEVELS:
            raise ValueError(f"levels must be between {least} and {MAX_LEVELS}, got {level}")
    shape = z.shape if fsq_basis(levels) is None else z.shape[:-1]
    return z.new_empty(z.shape), z.new_empty(shape, dtype=torch.int64), z.new_empty(z.shape if keep else 0)


def _setup_fsq(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.keep, (_, indices, slope) = inputs[-1], output
    ctx.save_for_backward(slope)
    ctx.mark_non_differentiable(indices, slope)


def _backward_fsq(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    check_kept(ctx.keep, "fsq")
    if torch.is_grad_enabled():  # the result may be differentiated again, without the slope's own derivative
        raise no_second_derivative("fsq", " with create_graph=True")
    (slope,) = ctx.saved_tensors
    return grad * slope, None, None, None, None, None, None


if native_available("fsq"):
    register_fake("vq_nearest", _fake_nearest)
    register_fake("vq_statistics", _fake_statistics)
    register("fsq", _fake_fsq, _backward_fsq, _setup_fsq)
