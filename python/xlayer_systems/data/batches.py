"""Batches of text: tokenization, padding, and the order in which examples are visited."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlayer_systems.data.tasks import Example, TextTask

BUCKET_BATCHES = 16


@dataclass(frozen=True)
class Encoded:
    """Holds an example as token ids, its segment per token (0, 1; -1 for special tokens of a pair) and its label."""

    input_ids: list[int]
    segment_ids: list[int]
    special: list[int]
    label: int


class ClassificationData:
    """Encodes a `TextTask` with a tokenizer, in the form that the training loop asks for.

    Args:
        task: the examples.
        tokenizer: a fast Hugging Face tokenizer.
        max_length: longer inputs are cut (of a pair, the longer text first).
    """

    def __init__(self, task: TextTask, tokenizer: Any, max_length: int) -> None:
        self.task = task
        self.pad_id: int = tokenizer.pad_token_id
        self.train = encode(task.train, tokenizer, max_length)
        self.validation = encode(task.validation, tokenizer, max_length)

    @property
    def fingerprint(self) -> str:
        """Identifies the examples."""
        return self.task.fingerprint

    def lengths(self) -> list[int]:
        """Returns the number of tokens of each training example."""
        return [len(example.input_ids) for example in self.train]

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Returns a batch padded to its longest example.

        Keys: input_ids, attention_mask, segment_ids, special_tokens_mask ``[B, S]`` and labels ``[B]``, all int64.
        """
        width = max(len(example.input_ids) for example in examples)

        def padded(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

        return {
            "input_ids": padded([e.input_ids for e in examples], self.pad_id),
            "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
            "segment_ids": padded([e.segment_ids for e in examples], -1),
            "special_tokens_mask": padded([e.special for e in examples], 1),
            "labels": torch.tensor([e.label for e in examples]),
        }

    def score(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """Returns per example ``[B, C*C + 1]`` the one-hot cell of the confusion matrix, then cross-entropy in nats."""
        logits, labels = output.logits.float(), batch["labels"]
        classes = logits.shape[-1]
        cell = labels * classes + logits.argmax(-1)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return torch.cat([torch.nn.functional.one_hot(cell, classes * classes).double(), loss.double()[:, None]], dim=1)

    def summarize(self, sums: Tensor) -> dict[str, float | int]:
        """Returns the metrics from the sum of `score` over the whole validation set."""
        classes = len(self.task.labels)
        confusion = sums[:-1].reshape(classes, classes)
        hits, total = confusion.diagonal(), confusion.sum()
        f1 = 2 * hits / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
        return {
            "accuracy": float(hits.sum() / total),
            "macro_f1": float(f1.mean()),
            "loss": float(sums[-1] / total),
            "correct": int(hits.sum()),
            "total": int(total),
        }


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Encoded]:
    """Tokenizes texts and pairs; segment ids are 0 throughout for a single text."""
    paired = examples[0].second is not None
    seconds = [example.second for example in examples] if paired else None
    encoding = tokenizer(
        [example.first for example in examples],
        seconds,
        truncation=True,
        max_length=max_length,
        return_special_tokens_mask=True,
    )
    found = []
    for index, example in enumerate(examples):
        ids = encoding["input_ids"][index]
        segments = [-1 if s is None else s for s in encoding.sequence_ids(index)] if paired else [0] * len(ids)
        found.append(Encoded(ids, segments, encoding["special_tokens_mask"][index], example.label))
    return found


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Returns the batches of one epoch as lists of indices, the same on every process and after every restart.

    Examples are shuffled, and sorted by length inside windows of `BUCKET_BATCHES` batches so that little padding is
    computed; then the batches are shuffled. The shuffle's last, incomplete batch is left out.
    """
    generator = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    order = order[: len(order) - len(order) % batch_size]
    window = batch_size * BUCKET_BATCHES
    batches = []
    for start in range(0, len(order), window):
        bucket = sorted(order[start : start + window], key=lambda index: lengths[index])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    generator.shuffle(batches)
    return batches
