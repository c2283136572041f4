"""Requests and blocks of text under the base's tokenizer, in the form that the training loop asks for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlayer_systems.data.blocks import IGNORED, LanguageModelingData
from xlayer_systems.data.text import TextCorpus
from xlayer_systems.data.tools import ToolExample, ToolTask, signed_log

BLOCK_EVERY = 8  # requests of a batch per block of text for the language-modelling loss
DOCUMENTS_EVERY = 4  # one document in so many is cut into blocks: far more than a run reads


@dataclass(frozen=True)
class Asked:
    """Holds a request as token ids, with its targets, and a block of text ``[length + 1]``."""

    input_ids: list[int]
    tool: int
    value: float
    plan: tuple[int, ...]
    block: Tensor


class ToolData:
    """Encodes a `ToolTask` and a corpus with one tokenizer.

    Args:
        task: the requests.
        corpus: what the language-modelling loss is measured on.
        tokenizer: the base's.
        max_length: tokens of a request; longer ones are cut.
        lm_length: tokens of a block of text.
        eval_examples: number of validation requests to use, evenly spaced; None: all.
    """

    def __init__(
        self,
        task: ToolTask,
        corpus: TextCorpus,
        tokenizer: Any,
        max_length: int,
        lm_length: int,
        eval_examples: int | None = None,
    ) -> None:
        self.task, self.tokenizer, self.pad_id = task, tokenizer, int(tokenizer.pad_token_id)
        every = slice(None, None, DOCUMENTS_EVERY)
        fewer = dataclasses.replace(corpus, train=corpus.train[every], validation=corpus.validation[every])
        self.text = LanguageModelingData(fewer, tokenizer, lm_length)
        self.train = encode(task.train, tokenizer, max_length, self.text.train)
        self.validation = encode(task.validation, tokenizer, max_length, self.text.validation)
        if eval_examples is not None and eval_examples < len(self.validation):
            whole = len(self.validation)
            self.validation = [self.validation[index * whole // eval_examples] for index in range(eval_examples)]
        self.fingerprint = hashlib.sha256(f"{task.fingerprint}/{self.text.fingerprint}".encode()).hexdigest()[:16]
        self.plan_length = max(1, *(len(example.plan) for example in task.train))
        self.values = torch.tensor([v for e in self.train if (v := e.value) == v], dtype=torch.float64)

    @property
    def has_plans(self) -> bool:
        """Tells whether the requests come with plans."""
        return any(example.plan for example in self.train)

    def lengths(self) -> list[int]:
        """Returns the number of tokens of each training request."""
        return [len(example.input_ids) for example in self.train]

    def collate(self, examples: Sequence[Asked]) -> dict[str, Tensor]:
        """Makes a batch: input_ids and attention_mask ``[B, S]``; tools and values (signed logarithms) ``[B]``; plan
        ``[B, P]``, −100 behind its end; lm_input_ids and lm_labels ``[⌈B/8⌉, lm_length]``."""
        blocks = self.text.collate([example.block for example in examples[::BLOCK_EVERY]])
        return {
            "input_ids": _padded([e.input_ids for e in examples], self.pad_id),
            "attention_mask": _padded([[1] * len(e.input_ids) for e in examples], 0),
            "tools": torch.tensor([e.tool for e in examples]),
            "values": torch.tensor([e.value for e in examples]),
            "plan": _padded([list(e.plan) for e in examples], IGNORED, self.plan_length),
            "lm_input_ids": blocks["input_ids"],
            "lm_labels": blocks["labels"],
        }

    def score(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """Returns per request ``[B, 7 + 2·tools]``: right plan, whether there is a value, its squared error in standard
        deviations, that of always predicting the mean, cross-entropy of the tool; nats and tokens of the block that
        came with it; per tool right and there."""
        tools, values, count = batch["tools"], batch["values"].double(), len(self.task.tools)
        rows = torch.zeros(len(tools), 7 + 2 * count, dtype=torch.float64, device=tools.device)
        if output.plan is not None:
            wanted = torch.nn.functional.pad(batch["plan"], (0, output.plan.shape[1] - self.plan_length), value=IGNORED)
            rows[:, 0] = (output.plan == wanted).all(1).double()
        there = values == values
        rows[:, 1] = there.double()
        if output.values is not None:
            scale = self.values.std()
            rows[there, 2] = (((output.values.double() - values) / scale) ** 2)[there]
            rows[there, 3] = (((self.values.mean() - values) / scale) ** 2)[there]
        right = output.logits_tools.argmax(-1) == tools
        rows[:, 4] = torch.nn.functional.cross_entropy(output.logits_tools.float(), tools, reduction="none").double()
        rows[::BLOCK_EVERY, 5] = output.token_loss.double().sum(1)
        rows[::BLOCK_EVERY, 6] = (batch["lm_labels"] != IGNORED).double().sum(1)
        one_hot = torch.nn.functional.one_hot(tools, count).double()
        rows[:, 7:] = torch.cat([one_hot * right[:, None], one_hot], 1)
        return rows

    def summarize(self, sums: Tensor) -> dict[str, Any]:
        """Computes metrics from the sum of `score`; errors of values are roots of mean squares, in standard
        deviations."""
        rights, totals = sums[7:].round().long().reshape(2, -1).tolist()
        plans, valued, square, of_mean, loss, nats, tokens = sums[:7].tolist()
        correct, total = sum(rights), sum(totals)
        metrics: dict[str, Any] = {
            "accuracy": correct / total,
            "correct": correct,
            "total": total,
            "loss": loss / total,
            "lm_loss": nats / tokens,
            "per_tool": dict(zip(self.task.tools, zip(rights, totals, strict=True), strict=True)),
        }
        if valued:
            metrics |= {"value_error": (square / valued) ** 0.5, "value_error_of_mean": (of_mean / valued) ** 0.5}
        if self.has_plans:
            metrics |= {"plan_accuracy": plans / total, "plans_correct": round(plans)}
        return metrics


def encode(examples: Sequence[ToolExample], tokenizer: Any, max_length: int, blocks: Tensor) -> list[Asked]:
    """Tokenizes requests, each behind the tokenizer's first token, and deals out the blocks evenly."""
    texts = [example.text for example in examples]
    ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=max_length - 1)["input_ids"]
    return [
        Asked(
            [tokenizer.bos_token_id, *row],
            example.tool,
            signed_log(example.value),
            example.plan,
            blocks[number * len(blocks) // len(ids)],
        )
        for number, (row, example) in enumerate(zip(ids, examples, strict=True))
    ]


def _padded(rows: Sequence[list[int]], fill: int, width: int = 0) -> Tensor:
    width = max(width, *(len(row) for row in rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])
