"""Quantization in plain PyTorch: nearest codes of a codebook, their counts and sums, finite scalar quantization."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xlayer_ext.reference._precision import no_autocast

FSQ_EPS = 1e-3
LARGEST_INDEX = 2**63 - 1


def vq_nearest(x: Tensor, codebook: Tensor, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """Finds the nearest code of each row of ``x [..., N, D]`` in ``codebook [..., K, D]``: indices and distances
    ``[..., N]``, the latter in float32 (float64 for float64). Writes the scores ``[..., N, K]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, codebook = x.to(wide), codebook.to(wide)
    with no_autocast(x):
        product = x @ codebook.transpose(-1, -2)
    if metric == "euclidean":
        score = codebook.square().sum(-1).unsqueeze(-2) / 2 - product
    else:
        score = -product * _inverse(codebook.norm(dim=-1)).unsqueeze(-2)
    # A code that is not finite is never chosen, and a row that is not has no nearest code: its index is 0.
    unusable = ~codebook.isfinite().all(-1).unsqueeze(-2) | ~x.isfinite().all(-1).unsqueeze(-1) | score.isnan()
    indices = score.masked_fill(unusable, math.inf).argmin(-1)
    winner = codebook.gather(-2, indices.unsqueeze(-1).expand(x.shape))
    if metric == "euclidean":
        return indices, (x - winner).square().sum(-1)
    cosine = (x * winner).sum(-1) * _inverse(x.norm(dim=-1)) * _inverse(winner.norm(dim=-1))
    return indices, (1 - cosine).clamp(min=0)


def vq_statistics(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Counts the rows of ``x [..., N, D]`` of each code, ``[..., K]``, and sums them, ``[..., K, D]``, in float32
    (float64 for float64). Rows whose index is outside of [0, K) count nowhere."""
    wide = torch.promote_types(x.dtype, torch.float32)
    counted = (indices >= 0) & (indices < codebook_size)
    index = torch.where(counted, indices, codebook_size)  # one code more, for masked rows
    counts = torch.zeros(*index.shape[:-1], codebook_size + 1, dtype=wide, device=x.device)
    counts = counts.scatter_add(-1, index, counted.to(wide))
    sums = torch.zeros(*index.shape[:-1], codebook_size + 1, x.shape[-1], dtype=wide, device=x.device)
    sums = sums.scatter_add(-2, index.unsqueeze(-1).expand(x.shape), x.to(wide))
    return counts[..., :codebook_size].contiguous(), sums[..., :codebook_size, :].contiguous()


def fsq(z: Tensor, levels: Sequence[int], *, bound: str = "tanh", variant: str = "package") -> tuple[Tensor, Tensor]:
    """Computes codes ``[..., c]`` in the dtype of ``z [..., c]`` and their indices (`xlayer_ext.functional.fsq`)."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    count = wide.new_tensor(levels)
    if bound == "tanh":
        bounded = torch.tanh(wide)
        digit = torch.floor((count - 1) * (bounded + 1) / 2 + 0.5).clamp(min=0).minimum(count - 1)
    else:
        shift, half, middle = (wide.new_tensor(column) for column in zip(*fsq_offsets(levels, variant), strict=True))
        width = torch.floor(count / 2)
        stretched = torch.tanh(wide + shift) * half
        digit = (torch.round(stretched - middle) + width).clamp(min=0).minimum(count - 1)
        bounded = stretched / width
    codes = _codes(digit, count, bound)
    straight = codes.detach() + (bounded - bounded.detach())
    return straight.to(z.dtype), _index(digit.detach().nan_to_num(0).long(), levels)


def fsq_offsets(levels: Sequence[int], variant: str) -> list[tuple[float, float, float]]:
    """Returns (shift, half width, middle) of the bound ``offset`` per dimension."""
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


def fsq_codes_to_indices(codes: Tensor, levels: Sequence[int], *, bound: str = "tanh") -> Tensor:
    """Converts ``codes [..., c]`` to indices: the inverse of `fsq_indices_to_codes`."""
    codes = codes.double()
    count = codes.new_tensor(levels)
    width = torch.floor(count / 2)
    digit = (codes + 1) * (count - 1) / 2 if bound == "tanh" else codes * width + width
    return _index(digit.round().clamp(min=0).minimum(count - 1).nan_to_num(0).long(), levels)


def fsq_indices_to_codes(
    indices: Tensor, levels: Sequence[int], *, bound: str = "tanh", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Converts to codes ``[..., c]`` the indices ``[...]`` (or digits ``[..., c]`` where the index does not fit)."""
    basis, count = fsq_basis(levels), torch.tensor(levels, device=indices.device)
    digit = indices
    if basis is not None:
        digit = indices.unsqueeze(-1) // torch.tensor(basis, device=indices.device) % count
    wide = torch.promote_types(dtype, torch.float32)
    return _codes(digit.to(wide), count.to(wide), bound).to(dtype)


def _codes(digit: Tensor, count: Tensor, bound: str) -> Tensor:
    if bound == "tanh":
        return (2 * digit - (count - 1)) / (count - 1)
    width = torch.floor(count / 2)
    return (digit - width) / width


def _index(digit: Tensor, levels: Sequence[int]) -> Tensor:
    basis = fsq_basis(levels)
    return digit if basis is None else (digit * torch.tensor(basis, device=digit.device)).sum(-1)


def _inverse(length: Tensor) -> Tensor:
    return torch.where(length > 0, 1 / length, torch.zeros_like(length))
