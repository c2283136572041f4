"""A corpus as blocks of tokens of one length, for language models."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from xlayer_systems.data.text import TextCorpus
from xlayer_systems.errors import UserError

IGNORED = -100  # as a label: nothing is to be predicted here


class LanguageModelingData:
    """Encodes a `TextCorpus` with a tokenizer, in the form that the training loop asks for.

    The documents of a split are joined, with the end-of-text token before each and after the last, and cut into blocks.
    Every token but the first is predicted in exactly one block; what remains of training after the last whole block is
    left out, in validation it is padded.

    Args:
        corpus: the documents.
        tokenizer: a byte-level Hugging Face tokenizer that keeps the text.
        length: tokens of a block.
        eval_blocks: number of validation blocks to use, evenly spaced; None: all.
    """

    def __init__(self, corpus: TextCorpus, tokenizer: Any, length: int, eval_blocks: int | None = None) -> None:
        self.corpus, self.tokenizer, self.length = corpus, tokenizer, length
        self.end_id: int = tokenizer.eos_token_id
        self.train = self._blocks(corpus.train, drop_last=True)
        self.validation = self._blocks(corpus.validation, drop_last=False)
        if not len(self.train):
            raise UserError(f"data set {corpus.name!r} has less training text than one block of {length} tokens")
        self.whole_validation = len(self.validation)
        if eval_blocks is not None and eval_blocks < len(self.validation):
            self.validation = self.validation[torch.arange(eval_blocks) * len(self.validation) // eval_blocks]
        self.bytes_of = token_bytes(tokenizer)
        # Another tokenizer is other data: its losses per token cannot be compared.
        described = f"{corpus.fingerprint}/{tokenizer.backend_tokenizer.to_str()}"
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()[:16]

    def lengths(self) -> list[int]:
        """Returns the number of tokens of each training block."""
        return [self.length] * len(self.train)

    def collate(self, examples: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns ``input_ids`` and ``labels`` ``[B, S]``, int64: every label is the token that follows."""
        blocks = torch.stack(list(examples)).long()
        labels = blocks[:, 1:]
        inputs = blocks[:, :-1]
        return {"input_ids": torch.where(inputs == IGNORED, self.end_id, inputs), "labels": labels.contiguous()}

    def score(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """Returns for each block ``[B, 3]``: cross-entropy in nats, tokens that were predicted, and their bytes."""
        labels = batch["labels"]
        predicted = labels != IGNORED
        lengths = self.bytes_of.to(labels.device)[labels.clamp(min=0)] * predicted
        return torch.stack([output.token_loss.double().sum(1), predicted.sum(1), lengths.sum(1)], dim=1).double()

    def summarize(self, sums: Tensor) -> dict[str, float | int]:
        """Returns cross-entropy in nats per token, its exponential, and in bits per byte of text."""
        nats, tokens, size = sums.tolist()
        loss = nats / tokens
        perplexity = math.exp(min(loss, 700.0))  # a diverged model must not stop its run by an overflow
        return {
            "loss": loss,
            "perplexity": perplexity,
            "bits_per_byte": nats / math.log(2) / size,
            "tokens": int(tokens),
        }

    def _blocks(self, texts: Iterable[str], drop_last: bool) -> Tensor:
        """Returns ``[N, length + 1]`` int32: the last token of a block is the first of the next."""
        ids = [self.end_id]
        for row in encode_text(self.tokenizer, texts):
            ids += [*row, self.end_id]
        missing = -(len(ids) - 1) % self.length
        if missing and not drop_last:
            ids += [IGNORED] * missing
        if len(ids) <= self.length:
            return torch.empty(0, self.length + 1, dtype=torch.int32)
        return torch.tensor(ids, dtype=torch.int32).unfold(0, self.length + 1, self.length)


class DecoderData(LanguageModelingData):
    """Blocks of documents, each enclosed by its own first and last special token.

    A receiver reads a message, then its first token, then answers and ends; both tokens must have been learned.
    """

    def _blocks(self, texts: Iterable[str], drop_last: bool) -> Tensor:
        first = self.tokenizer.bos_token_id
        ids = [id for row in encode_text(self.tokenizer, texts) for id in (first, *row, self.end_id)]
        missing = -(len(ids) - 1) % self.length
        if missing and not drop_last:
            ids += [IGNORED] * missing
        if len(ids) <= self.length:
            return torch.empty(0, self.length + 1, dtype=torch.int32)
        return torch.tensor(ids, dtype=torch.int32).unfold(0, self.length + 1, self.length)


def encode_text(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    """Returns the ids of each text and nothing else; a text that spells a special token, such as ``</s>``, is still
    text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    # What the tokenizer's file asks for, or its last call asked for, cuts or pads no document.
    backend.no_truncation()
    backend.no_padding()
    return [row.ids for row in backend.encode_batch(list(texts), add_special_tokens=False)]


def token_bytes(tokenizer: Any) -> Tensor:
    """Counts the bytes of text that each token of a byte-level tokenizer stands for, ``[vocabulary]``; 0 for special
    tokens."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    # Byte-level BPE writes every byte as one character.
    return torch.tensor([0 if id in special else len(name) for id, name in enumerate(names)])
