"""A causal language model of Hugging Face in the form that the training loop asks for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from xlayer_systems.data.blocks import IGNORED
from xlayer_systems.training.model import TrainingModel


class DecoderOutput(NamedTuple):
    """Holds ``loss``: mean over predicted tokens; ``token_loss``: ``[B, S]``, 0 where nothing is predicted (nats)."""

    loss: Tensor
    token_loss: Tensor


class DecoderModel(TrainingModel):
    """Is the training form of a causal language model; labels are the next tokens already."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, labels: Tensor) -> DecoderOutput:
        """Computes the loss; ``input_ids`` and ``labels`` are ``[B, S]``."""
        logits = self.decoder(input_ids=input_ids, use_cache=False).logits.float()
        token_loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return DecoderOutput(token_loss.sum() / (labels != IGNORED).sum().clamp(min=1), token_loss)
