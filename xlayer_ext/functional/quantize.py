r"""Vector quantization without the matrix of all distances, and finite scalar quantization (FSQ) in one pass.

:func:`vq_nearest` finds the nearest of K codes for each of N rows; the N × K scores stay in registers, where the plain
formula writes them. :func:`vq_statistics` tells how many rows fall to each code and what they add up to: the update of
a codebook, and the gradient of looking codes up. :func:`fsq` bounds and rounds every number of a row to one of a few
levels: a codebook that is a grid, and cannot collapse to unused codes.

Papers: van den Oord et al., Neural Discrete Representation Learning, 2017, arXiv 1711.00937; Mentzer et al., Finite
Scalar Quantization: VQ-VAE Made Simple, 2023, arXiv 2309.15505.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from xlayer_ext import reference
from xlayer_ext._backend import transforms, use_native
from xlayer_ext._ops.quantize import MAX_DIMENSIONS, MAX_LEVELS, fsq_basis, fsq_offsets
from xlayer_ext._ops.registration import accumulation
from xlayer_ext.functional._checks import (
    FLOATS,
    autocasts,
    check_choice,
    check_common,
    check_device,
    check_floats,
    check_int64,
    check_integer,
    is_empty,
    needs_grad,
    tf32_allowed,
)
from xlayer_ext.types import Bound, Metric, Variant

METRICS, BOUNDS, VARIANTS = get_args(Metric), get_args(Bound), get_args(Variant)
MAX_CODES = 2**31 - 1  # no codebook comes near it, and a search of more would never end

__all__ = ["fsq", "fsq_codes_to_indices", "fsq_indices_to_codes", "vq_nearest", "vq_statistics"]


def vq_nearest(x: Tensor, codebook: Tensor, *, metric: Metric = "euclidean") -> tuple[Tensor, Tensor]:
    r"""Finds the nearest code of each row: :math:`k_n = \arg\min_k d(x_n, c_k)`.

    ``euclidean``: :math:`d = |x - c|^2`; ``cosine``: :math:`d = 1 - \frac{x \cdot c}{|x|\,|c|}`, where a vector of
    length 0 has cosine 0 with all others. Of codes that are equally near the lowest index wins, so of equal codes the
    first. Nothing of size N × K is written. Products and distances are float32 (float64 for float64), also under
    autocast; on CUDA float32 products follow :func:`torch.set_float32_matmul_precision`. No gradient.

    Args:
        x: ``[N, D]``, or ``[h, N, D]`` for h codebooks at once; float64, float32, bfloat16 or float16.
        codebook: ``[K, D]`` or ``[h, K, D]``, of the same dtype; K at least 1. Unit stride along D spares a copy.
        metric: ``"euclidean"`` or ``"cosine"``.

    Returns:
        Indices, int64 ``[N]`` or ``[h, N]``, and the distances to these codes, float32 (float64 for float64), never
        negative. A code that holds a NaN or inf is never chosen; a row that does gets index 0, and distance inf or NaN.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ.
        ValueError: shapes or devices disagree, no codes or more than 2³¹ − 1, an unknown metric.

    Example::

        >>> indices, distance = vq_nearest(torch.tensor([[0.9, 0.1]]), torch.eye(2))
        >>> indices, distance
        (tensor([0]), tensor([0.0200]))
    """
    check_floats(x=x, codebook=codebook)
    check_choice("metric", metric, METRICS)
    if autocasts(x):
        x, codebook = (t if t.dtype == torch.float64 else t.float() for t in (x, codebook))
    check_common(x=x, codebook=codebook)
    lead = x.dim() - 2
    if lead not in (0, 1) or codebook.dim() != x.dim() or codebook.shape[:lead] != x.shape[:lead]:
        raise ValueError(
            f"x and codebook must have shapes [N, D] and [K, D], or [h, N, D] and [h, K, D]; got {list(x.shape)} and "
            f"{list(codebook.shape)}"
        )
    if codebook.shape[-1] != x.shape[-1]:
        raise ValueError(f"codebook must have the width of x, {x.shape[-1]}; got {list(codebook.shape)}")
    if codebook.shape[-2] == 0 or codebook.shape[-1] == 0:
        raise ValueError(f"codebook must have at least one code and one column, got {list(codebook.shape)}")
    if codebook.shape[-2] > MAX_CODES:
        raise ValueError(f"codebook must have at most {MAX_CODES} codes, got {list(codebook.shape)}")
    x, codebook = x.detach(), codebook.detach()
    rows = x.shape[:-1]
    if is_empty(rows):
        return x.new_empty(rows, dtype=torch.int64), x.new_empty(rows, dtype=accumulation(x))
    if not use_native("vq_nearest", x):
        return reference.vq_nearest(x, codebook, metric)
    batched = (t.unsqueeze(0) if lead == 0 else t for t in (x, codebook))
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    indices, distance = torch.ops.xlayer.vq_nearest(*batched, metric == "cosine", tf32)
    return (indices.squeeze(0), distance.squeeze(0)) if lead == 0 else (indices, distance)


def vq_statistics(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    r"""Counts and sums the rows of each code.

    .. math:: \mathrm{counts}_k = |\{n: i_n = k\}|, \qquad \mathrm{sums}_k = \sum_{n: i_n = k} x_n

    Deterministic: the sums are made by halves, in an order that the indices alone decide. No gradient.

    Args:
        x: ``[N, D]`` or ``[h, N, D]``, float64, float32, bfloat16 or float16.
        indices: int64 ``[N]`` or ``[h, N]``, of :func:`vq_nearest`. A row whose index is outside of
            [0, codebook_size), such as −1 for padding, counts nowhere and may hold NaN.
        codebook_size: K, the number of codes.

    Returns:
        counts ``[K]`` or ``[h, K]`` and sums ``[K, D]`` or ``[h, K, D]``, float32 (float64 for float64).

    Raises:
        TypeError: ``x`` is not floating point, or ``indices`` not int64.
        ValueError: shapes or devices disagree, or ``codebook_size`` is below 1 or above 2³¹ − 1.
    """
    check_floats(x=x)
    check_int64(indices=indices)
    if x.dim() not in (2, 3) or indices.shape != x.shape[:-1]:
        raise ValueError(
            f"x and indices must have shapes [N, D] and [N], or [h, N, D] and [h, N]; got {list(x.shape)} and "
            f"{list(indices.shape)}"
        )
    check_device(x=x, indices=indices)
    check_integer("codebook_size", codebook_size, 1, MAX_CODES)
    x = x.detach()
    if not use_native("vq_statistics", x):
        return reference.vq_statistics(x, indices, codebook_size)
    lead = x.dim() - 2
    batched = (t.unsqueeze(0) if lead == 0 else t for t in (x, indices))
    counts, sums = torch.ops.xlayer.vq_statistics(*batched, codebook_size)
    return (counts.squeeze(0), sums.squeeze(0)) if lead == 0 else (counts, sums)


def fsq(
    z: Tensor, levels: Sequence[int], *, bound: Bound = "tanh", variant: Variant = "package"
) -> tuple[Tensor, Tensor]:
    r"""Quantizes by finite scalar quantization: bounds every number of a row and rounds it to one of L levels.

    ``bound="tanh"``, symmetric around 0, L at least 2: digit :math:`\lfloor (L-1)(\tanh z + 1)/2 + \frac12 \rfloor`,
    code :math:`2\,\mathrm{digit}/(L-1) - 1`. The PyPI package calls it ``preserve_symmetry``.

    ``bound="offset"``, with 0 among the codes, L at least 3: with :math:`h = (L-1)(1+\epsilon)/2`, :math:`\epsilon =
    10^{-3}`, o = ½ for even L and 0 for odd, :math:`s = \mathrm{artanh}(o/h)`, it is digit
    :math:`\mathrm{round}(\tanh(z + s)\,h - o) + \lfloor L/2 \rfloor` and code :math:`(\mathrm{digit} - \lfloor L/2
    \rfloor) / \lfloor L/2 \rfloor`. ``variant="paper"`` takes :math:`h = (L-1)(1-\epsilon)/2` and :math:`s =
    \tan(o/h)`, as the paper's listing does.

    The gradient goes straight through the rounding, and so is that of the bounded z in units of the code. Where one is
    needed, its slope is kept, in the size and dtype of z; else nothing is. Arithmetic is float32 (float64 for float64),
    also under autocast.

    Args:
        z: ``[..., c]``, float64, float32, bfloat16 or float16.
        levels: L of each of the c dimensions, for example ``[8, 5, 5, 5]``; at most 64 dimensions.
        bound: ``"tanh"`` or ``"offset"``.
        variant: of ``offset``: ``"package"`` or ``"paper"``.

    Returns:
        codes ``[..., c]``, in [−1, 1] and in the dtype of z; indices, int64 ``[...]``, :math:`\sum_i \mathrm{digit}_i
        \prod_{j<i} L_j`, first dimension least significant; where the product of all levels exceeds 2⁶³, the digits
        themselves, int64 ``[..., c]``. A NaN gives the code NaN and the digit 0.

    Raises:
        TypeError: z is not floating point, or a level not a whole number.
        ValueError: c is not the number of levels, a level is too small, an unknown bound or variant.

    Example::

        >>> fsq(torch.tensor([[0.0, 10.0]]), [3, 2])
        (tensor([[0., 1.]]), tensor([4]))
    """
    check_floats(z=z)
    levels = checked_levels(levels, bound, variant)
    if z.dim() < 1 or z.shape[-1] != len(levels):
        raise ValueError(f"z must have shape [..., {len(levels)}], a column for each of levels; got {list(z.shape)}")
    if autocasts(z) and z.dtype != torch.float64:
        z = z.float()
    if not use_native("fsq", z, unsupported_reason=_unsupported_reason(levels)):
        return reference.fsq(z, levels, bound=bound, variant=variant)
    codes, indices, _ = torch.ops.xlayer.fsq(z, *_operator_levels(levels, bound, variant), needs_grad(z))
    return codes, indices


def fsq_codes_to_indices(codes: Tensor, levels: Sequence[int], *, bound: Bound = "tanh") -> Tensor:
    """Converts codes ``[..., c]`` to the indices of :func:`fsq`; a code between two counts as the nearest."""
    check_floats(codes=codes)
    levels = checked_levels(levels, bound)
    if codes.dim() < 1 or codes.shape[-1] != len(levels):
        raise ValueError(
            f"codes must have shape [..., {len(levels)}], a column for each of levels; got {list(codes.shape)}"
        )
    return reference.fsq_codes_to_indices(codes, levels, bound=bound)


def fsq_indices_to_codes(
    indices: Tensor, levels: Sequence[int], *, bound: Bound = "tanh", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Converts indices ``[...]`` of :func:`fsq` (digits ``[..., c]`` where the product of levels exceeds 2⁶³) to its
    codes ``[..., c]``, with the same bits."""
    levels = checked_levels(levels, bound)
    check_int64(indices=indices)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    if fsq_basis(levels) is None and (indices.dim() < 1 or indices.shape[-1] != len(levels)):
        raise ValueError(f"indices must be digits, [..., {len(levels)}], for so many levels; got {list(indices.shape)}")
    return reference.fsq_indices_to_codes(indices, levels, bound=bound, dtype=dtype)


# ---- arguments -------------------------------------------------------------------------------------------------------


def checked_levels(levels: Sequence[int], bound: Bound, variant: Variant = "package") -> list[int]:
    """Checks the levels and returns them as a list.

    Raises:
        TypeError: they are no sequence of whole numbers.
        ValueError: there are none, one is out of range, an unknown bound or variant.
    """
    check_choice("bound", bound, BOUNDS)
    check_choice("variant", variant, VARIANTS)
    if not isinstance(levels, Sequence):
        raise TypeError(f"levels must be a sequence of whole numbers, got {type(levels).__name__}")
    found = list(levels)
    least = 2 if bound == "tanh" else 3
    if not found:
        raise ValueError("levels must name at least one dimension, got none")
    for count in found:
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"levels must be whole numbers, got {count!r}")
        if not least <= count <= MAX_LEVELS:
            raise ValueError(f"levels must be between {least} and {MAX_LEVELS} for bound {bound}, got {count}")
    return found


def _unsupported_reason(levels: Sequence[int]) -> str | None:
    if transforms():  # torch.func always keeps a graph of the backward, and this one must not be differentiated
        return "the transforms of torch.func"
    return f"more than {MAX_DIMENSIONS} dimensions" if len(levels) > MAX_DIMENSIONS else None


def _operator_levels(levels: list[int], bound: Bound, variant: Variant) -> tuple[Any, ...]:
    """Returns levels, shift, half width and middle per dimension, and whether the bound is ``offset``."""
    if bound == "tanh":
        return levels, [], [], [], False
    columns = zip(*fsq_offsets(levels, variant), strict=True)
    return levels, *(list(column) for column in columns), True
