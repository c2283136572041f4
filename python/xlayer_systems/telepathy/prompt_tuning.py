"""Prompt tuning (Lester, Al-Rfou and Constant, EMNLP 2021, arXiv 2104.08691): soft tokens that are the same for every
text.

The receiver's input is laid out as for a bridge; only the soft tokens are parameters, the same for every example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlayer_ext.functional.losses import language_modeling_loss
from xlayer_systems.telepathy import receiver as receiving
from xlayer_systems.training.optim import linear_schedule

Ids = Sequence[int]


@dataclass(frozen=True)
class Schedule:
    """Defines AdamW without weight decay, whose rate rises over the ``warmup`` share of the steps, then falls to 0."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    clip: float = 1.0


def tune_prompt(
    receiver: Any,
    tokenizer: Any,
    soft_tokens: int,
    primer: str,
    answers: Sequence[Ids],
    prompts: Sequence[Ids] | None,
    schedule: Schedule,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Learns ``soft_tokens`` vectors that make the frozen ``receiver`` generate ``answers``, after ``prompts`` if any.

    They begin as embeddings of tokens drawn from the vocabulary, as the paper found best after class labels.

    Args:
        answers, prompts: token ids of the training examples; None: the receiver sees no text at all.
        progress: called with each step's number and loss in nats.

    Returns:
        ``[K, d]``.
    """
    generator = torch.Generator().manual_seed(seed)
    table = receiver.get_input_embeddings().weight.detach()
    drawn = torch.randint(0, len(table), (soft_tokens,), generator=generator)
    prompt = table[drawn.to(table.device)].clone().requires_grad_()
    optimizer = torch.optim.AdamW([prompt], lr=schedule.learning_rate, weight_decay=0.0)
    rates = linear_schedule(optimizer, schedule.steps, schedule.warmup)
    order: list[int] = []
    with torch.enable_grad():
        for step in range(schedule.steps):
            if len(order) < schedule.batch_size:
                order += torch.randperm(len(answers), generator=generator).tolist()
            rows, order = order[: schedule.batch_size], order[schedule.batch_size :]
            given = receiving.receiver_input(
                receiver,
                tokenizer,
                prompt.expand(len(rows), -1, -1),
                primer=primer,
                answers=[answers[i] for i in rows],
                prompts=None if prompts is None else [prompts[i] for i in rows],
            )
            assert given.labels is not None
            last = max(len(answers[i]) for i in rows) + 2  # BOS, answer, EOS
            logits = receiving.receiver_logits(receiver, given, last)
            loss = language_modeling_loss(logits, given.labels[:, -last:])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([prompt], schedule.clip)
            optimizer.step()
            rates.step()
            if progress is not None:
                progress(step, loss.item())
    return prompt.detach()
