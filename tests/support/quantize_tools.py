"""Helpers of the tests of quantization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xlayer_ext import reference


def edge_distance(z: Tensor, levels: Sequence[int], bound: str, variant: str) -> Tensor:
    """Returns the distance of each bounded number from the nearest change of its digit, in digits, in float64."""
    z, count = z.double(), torch.tensor(levels, dtype=torch.float64, device=z.device)
    if bound == "tanh":
        place = (count - 1) * (torch.tanh(z) + 1) / 2
    else:
        offsets = zip(*reference.quantize.fsq_offsets(levels, variant), strict=True)
        shift, half, middle = (torch.tensor(column, dtype=torch.float64, device=z.device) for column in offsets)
        place = torch.tanh(z + shift) * half - middle
    return 0.5 - (place - place.round()).abs()
