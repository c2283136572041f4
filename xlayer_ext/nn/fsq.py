"""Finite scalar quantization as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xlayer_ext import functional as XF
from xlayer_ext.functional._checks import check_floats, check_sizes
from xlayer_ext.functional.quantize import checked_levels
from xlayer_ext.nn._reset import reset
from xlayer_ext.types import Bound, Variant


class FSQOutput(NamedTuple):
    """Holds the result of :class:`FSQ`.

    Attributes:
        quantized: points of the grid, ``[..., hidden_size]``, in the dtype of z. Gradients go straight through to z.
        indices: of the points, int64 ``[...]``; the digits ``[..., len(levels)]`` where no int64 holds an index.
    """

    quantized: Tensor
    indices: Tensor


# The name by which torch.export.save writes it.
torch.utils._pytree._register_namedtuple(FSQOutput, serialized_type_name="xlayer_ext.nn.FSQOutput")


class FSQ(nn.Module):
    """Finite scalar quantization: the codebook is a fixed grid, so no code can go unused for good.

    Args:
        levels: levels per dimension of the grid, for example ``[8, 5, 5, 5]``.
        hidden_size: width of input and output; where it is not the number of levels, linear maps lead in and out.
        bound: ``"tanh"`` (symmetric, from 2 levels) or ``"offset"`` (0 is a code, from 3 levels), as in
            :func:`xlayer_ext.functional.fsq`.
        variant: of ``offset``: ``"package"`` or ``"paper"``.
        device, dtype: of the linear maps.

    Shape:
        - input ``[..., hidden_size]``; quantized ``[..., hidden_size]`` in its dtype, indices int64 ``[...]``, or the
          digits ``[..., len(levels)]`` where the product of the levels exceeds 2⁶³

    Raises:
        ValueError: the input does not have ``hidden_size`` columns, a level is too small, unknown bound or variant.

    Paper: Mentzer et al., Finite Scalar Quantization: VQ-VAE Made Simple, 2023, arXiv 2309.15505.
    """

    def __init__(
        self,
        levels: Sequence[int],
        *,
        hidden_size: int | None = None,
        bound: Bound = "tanh",
        variant: Variant = "package",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.levels, self.bound, self.variant = checked_levels(levels, bound, variant), bound, variant
        width = len(self.levels)
        self.hidden_size = width if hidden_size is None else hidden_size
        check_sizes(hidden_size=self.hidden_size)
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.hidden_size != width:
            self.project_in = nn.Linear(self.hidden_size, width, device=device, dtype=dtype)
            self.project_out = nn.Linear(width, self.hidden_size, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the linear maps anew, where there are any; the grid has nothing to reset."""
        reset(self.project_in, self.project_out)

    @property
    def codebook_size(self) -> int:
        """Returns the number of codes of the grid."""
        return math.prod(self.levels)

    def forward(self, z: Tensor) -> FSQOutput:
        """Rounds vectors ``[..., hidden_size]`` to points of the grid; returns them and their indices.

        Raises:
            TypeError: z is not floating point.
            ValueError: z does not have ``hidden_size`` columns.
        """
        check_floats(z=z)
        if z.dim() < 1 or z.shape[-1] != self.hidden_size:
            raise ValueError(f"z must have shape [..., {self.hidden_size}], got {list(z.shape)}")
        codes, indices = XF.fsq(self.project_in(z), self.levels, bound=self.bound, variant=self.variant)
        return FSQOutput(self.project_out(codes.to(z.dtype)).to(z.dtype), indices)

    def indices_to_codes(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Converts indices to points of the grid ``[..., len(levels)]``, before the linear map out."""
        return XF.fsq_indices_to_codes(indices, self.levels, bound=self.bound, dtype=dtype)

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Converts points of the grid ``[..., len(levels)]`` to indices."""
        return XF.fsq_codes_to_indices(codes, self.levels, bound=self.bound)

    def extra_repr(self) -> str:
        return f"{self.levels}, hidden_size={self.hidden_size}, bound={self.bound!r}, variant={self.variant!r}"
