"""Generation of text, token by token, with a key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    end_id: int | None = None,
) -> Tensor:
    """Continues ``input_ids [B, S]`` by up to ``max_new_tokens`` tokens.

    Args:
        input_ids: at least one token per row, and no padding.
        max_new_tokens: at least 0.
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: number of most likely tokens to sample from; None: all.
        generator: of the random numbers, on the device of the model.
        end_id: fills a row after its first occurrence; generation ends once all rows have it.

    Raises:
        ValueError: an argument out of range.
    """
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise ValueError(f"input_ids must have shape [B, S] with S at least 1, got {list(input_ids.shape)}")
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("temperature", temperature, 0.0),
        ("top_k", top_k, 1),
    ):
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    was_training = model.training
    model.eval()
    past, new = model.empty_past(), input_ids
    ended = torch.zeros(len(input_ids), 1, dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        new = _choose(model(new, past)[:, -1], temperature, top_k, generator)
        if end_id is not None:
            new = new.masked_fill(ended, end_id)
            ended = ended | (new == end_id)
        input_ids = torch.cat([input_ids, new], 1)
        if end_id is not None and bool(ended.all()):
            break
    model.train(was_training)
    return input_ids


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Returns the next tokens ``[B, 1]`` by logits ``[B, V]``."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
