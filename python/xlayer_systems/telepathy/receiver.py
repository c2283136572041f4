"""Lays out the input of the receiver: one layout for training, generation and every baseline.

::

    [padding] primer  soft tokens  (prompt)  BOS | answer  EOS  [padding]

All of it but the answer is context; nothing else in this package puts embeddings in front of a receiver, so training
and generation cannot differ in primer, BOS or mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlayer_systems.data.blocks import IGNORED

Ids = Sequence[int]


class ReceiverInput(NamedTuple):
    """Holds ``inputs_embeds [B, T, d]``, ``attention_mask [B, T]`` int64 (1: real) and ``labels [B, T]`` or None.

    A label stands where its token is, as Hugging Face models want it, not one place before.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor | None


def receiver_input(
    receiver: Any,
    tokenizer: Any,
    soft_tokens: Tensor | None,
    *,
    primer: str,
    answers: Sequence[Ids] | None,
    prompts: Sequence[Ids] | None = None,
) -> ReceiverInput:
    """Lays out a batch for the receiver.

    Args:
        receiver: a causal language model.
        tokenizer: its tokenizer, with ids of BOS, EOS and padding.
        soft_tokens: ``[B, K, d]`` with d the receiver's width, or None where it only reads text.
        primer: text before the soft tokens; "" for none.
        answers: token ids that it has to generate, without EOS; None for generation (`generate_answers`).
        prompts: token ids of texts that it reads behind the soft tokens.

    Returns:
        The input, ending in BOS without ``answers``. Shorter rows are padded on the left where prompts differ in length
        and on the right where answers do.

    Raises:
        ValueError: soft tokens, prompts and answers are all absent, or differ in their number of rows.
    """
    counts = {len(rows) for rows in (soft_tokens, answers, prompts) if rows is not None}
    if len(counts) != 1:
        raise ValueError(f"soft tokens, answers and prompts must have the same number of rows, got {sorted(counts)}")
    (rows,) = counts
    embedding = receiver.get_input_embeddings()
    device = embedding.weight.device
    primer_ids = tokenizer(primer, add_special_tokens=False)["input_ids"] if primer else []
    before = _padded([list(primer_ids)] * rows, tokenizer.pad_token_id, device)
    texts = prompts if prompts is not None else [[]] * rows
    after = _padded([[*ids, tokenizer.bos_token_id] for ids in texts], tokenizer.pad_token_id, device, left=True)
    parts = [embedding(before.ids), embedding(after.ids)]
    masks = [before.mask, after.mask]
    if soft_tokens is not None:
        parts.insert(1, soft_tokens.to(device=device, dtype=embedding.weight.dtype))
        masks.insert(1, torch.ones(soft_tokens.shape[:2], dtype=torch.int64, device=device))
    embeds, mask = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
    embeds, mask = _push_padding_left(embeds, mask) if prompts is not None else (embeds, mask)
    if answers is None:
        return ReceiverInput(embeds, mask, None)
    said = _padded([[*ids, tokenizer.eos_token_id] for ids in answers], tokenizer.pad_token_id, device)
    labels = torch.cat([torch.full_like(mask, IGNORED), said.ids.masked_fill(said.mask == 0, IGNORED)], dim=1)
    return ReceiverInput(torch.cat([embeds, embedding(said.ids)], dim=1), torch.cat([mask, said.mask], dim=1), labels)


def receiver_logits(receiver: Any, given: ReceiverInput, last: int = 0) -> Tensor:
    """Computes the logits ``[B, T, V]`` of the receiver for its input, at the positions that generation would give the
    tokens.

    With ``last``, the logits of the ``last`` tokens only: a vocabulary is wide, and answers are short.
    """
    positions = (given.attention_mask.cumsum(1) - 1).clamp(min=0)
    output = receiver(
        inputs_embeds=given.inputs_embeds,
        attention_mask=given.attention_mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=last,
    )
    logits: Tensor = output.logits
    return logits


@torch.no_grad()
def generate_answers(receiver: Any, tokenizer: Any, given: ReceiverInput, max_new_tokens: int) -> list[str]:
    """Generates the receiver's answers greedily, up to EOS or ``max_new_tokens`` tokens."""
    if given.labels is not None:
        raise ValueError("generation takes an input that ends in BOS, got one with answers")
    tokens = receiver.generate(
        inputs_embeds=given.inputs_embeds,
        attention_mask=given.attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


class _Padded(NamedTuple):
    ids: Tensor
    mask: Tensor


def _padded(rows: Sequence[list[int]], fill: int, device: torch.device, left: bool = False) -> _Padded:
    width = max(len(row) for row in rows)
    gaps = [width - len(row) for row in rows]
    fills = [([fill] * gap, [0] * gap) for gap in gaps]
    ids = [pad + row if left else row + pad for row, (pad, _) in zip(rows, fills, strict=True)]
    present = [[1] * len(row) for row in rows]
    mask = [zero + one if left else one + zero for one, (_, zero) in zip(present, fills, strict=True)]
    shape = (len(rows), width)
    return _Padded(
        torch.tensor(ids, dtype=torch.int64, device=device).reshape(shape),
        torch.tensor(mask, dtype=torch.int64, device=device).reshape(shape),
    )


def _push_padding_left(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the padding between the parts of each row to its front."""
    order = mask.argsort(dim=1, stable=True)  # the zeros first, the ones in their order
    return embeds.gather(1, order[:, :, None].expand_as(embeds)), mask.gather(1, order)
