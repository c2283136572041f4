"""Metrics of the messages in an evaluation, which show a collapse: similarity, spread and use of codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xlayer_systems.telepathy.bridge import BridgeOutput


class Messages:
    """Sums over all messages of an evaluation (of this process)."""

    def __init__(self) -> None:
        self.count = 0
        self.directions: Tensor | None = None  # sum of the messages as unit vectors [K d]
        self.sums: Tensor | None = None  # of the soft tokens and their squares [2, d]
        self.indices: list[Tensor] = []

    def add(self, sent: BridgeOutput) -> None:
        """Counts a batch."""
        soft = sent.soft.detach().double().cpu()
        directions = torch.nn.functional.normalize(soft.flatten(1), dim=1).sum(0)
        tokens = soft.flatten(0, 1)
        sums = torch.stack([tokens.sum(0), tokens.square().sum(0)])
        self.directions = directions if self.directions is None else self.directions + directions
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += len(soft)
        self.tokens = self.count * soft.shape[1]
        if sent.indices is not None:
            self.indices.append(sent.indices.detach().cpu().reshape(self.tokens_of(soft), -1))

    @staticmethod
    def tokens_of(soft: Tensor) -> int:
        """Returns the number of soft tokens in a batch ``[B, K, d]``."""
        return soft.shape[0] * soft.shape[1]

    def summary(self, codebook_size: int | None) -> dict[str, Any]:
        """Returns {} before any message, else

        * ``similarity``: mean cosine between the messages of different examples; 1 where all are the same;
        * ``variance``: of the soft tokens' numbers over examples and tokens, in units of their mean square;
        * ``rms``: of the soft tokens;
        * with a quantizer ``perplexity``, the exponential of the entropy of the codes used, ``codes``, how many
          different ones, and with a codebook ``used``, their share of it.
        """
        if self.directions is None or self.sums is None:
            return {}
        pairs = max(1, self.count * (self.count - 1))
        mean, square = self.sums / self.tokens
        summary = {
            "similarity": (float(self.directions.square().sum()) - self.count) / pairs,
            "variance": float((square - mean.square()).mean() / square.mean().clamp(min=1e-30)),
            "rms": float(square.mean().sqrt()),
        }
        if self.indices:
            counts = torch.unique(torch.cat(self.indices), dim=0, return_counts=True)[1].double()
            shares = counts / counts.sum()
            summary["perplexity"] = float(torch.exp(-(shares * shares.log()).sum()))
            summary["codes"] = len(counts)
            if codebook_size is not None:
                summary["used"] = len(counts) / codebook_size
        return summary
