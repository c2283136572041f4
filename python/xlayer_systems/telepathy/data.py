"""A task with text answers under the tokenizers of both models, in the form that the training loop asks for."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlayer_systems.data.answers import AnswerExample, AnswerTask
from xlayer_systems.data.blocks import IGNORED
from xlayer_systems.telepathy.evaluation import count_entities

BUCKETS = 1 << 14
STATES_BATCH = 64
ANSWER_MARK = "Answer:"


@dataclass(frozen=True)
class Spoken:
    """Holds an example as token ids: the sender's of the text, the receiver's of text, answer and target.

    ``states``: what the sender makes of the text ``[T, d]``, once `TelepathyData.keep_states` has asked it.
    """

    number: int
    input_ids: list[int]
    question_ids: list[int]
    answer_ids: list[int]
    target_ids: list[int]
    states: Tensor | None = None


class TelepathyData:
    """Encodes an `AnswerTask` with two tokenizers.

    Args:
        task: the examples.
        sender_tokenizer, receiver_tokenizer: of the two models.
        max_length: tokens of a text; longer ones are cut.
        target: ``answer``, or ``question_answer``: the receiver generates the text first.
        eval_examples: number of validation examples to evaluate on, evenly spaced; None: all.
    """

    def __init__(
        self,
        task: AnswerTask,
        sender_tokenizer: Any,
        receiver_tokenizer: Any,
        max_length: int,
        target: str = "answer",
        eval_examples: int | None = None,
    ) -> None:
        self.task, self.target, self.pad_id = task, target, int(sender_tokenizer.pad_token_id)
        tokenizers = (sender_tokenizer, receiver_tokenizer)
        self.train = encode(task.train, *tokenizers, max_length, target)
        validation = encode(task.validation, *tokenizers, max_length, target)
        step = max(1, -(-len(validation) // eval_examples)) if eval_examples else 1
        self.validation = validation[::step]
        self.classes = len(task.labels or ())
        self.layer: int | None = None  # whose states are kept
        self.longest = max(len(example.target_ids) for example in self.train) + 1

    @property
    def fingerprint(self) -> str:
        """Identifies the examples."""
        return self.task.fingerprint

    def lengths(self) -> list[int]:
        """Returns the number of tokens of each training example."""
        return [len(example.input_ids) for example in self.train]

    def keep_states(self, encode: Callable[[Tensor, Tensor], Tensor], layer: int) -> None:
        """Computes the frozen sender's states of every text once, as a run reads each text many times.

        Args:
            encode: from input_ids and attention_mask ``[B, T]`` to states ``[B, T, d]``.
            layer: of the sender, so that runs that share these data ask once as long as they read the same layer.
        """
        if self.layer != layer:
            self.train, self.validation = (_with_states(self, part, encode) for part in (self.train, self.validation))
            self.layer = layer

    def collate(self, examples: Sequence[Spoken]) -> dict[str, Tensor]:
        """Returns input_ids and attention_mask ``[B, T]``; target_ids, answer_ids, question_ids, each padded with −100;
        example ``[B]``: numbers in the task's split; states ``[B, T, d]`` if they are kept, padded with 0."""
        states = [example.states for example in examples if example.states is not None]
        kept = {"states": torch.nn.utils.rnn.pad_sequence(states, batch_first=True)} if states else {}
        return kept | {
            "input_ids": _padded([e.input_ids for e in examples], self.pad_id),
            "attention_mask": _padded([[1] * len(e.input_ids) for e in examples], 0),
            "target_ids": _padded([e.target_ids for e in examples], IGNORED),
            "answer_ids": _padded([e.answer_ids for e in examples], IGNORED),
            "question_ids": _padded([e.question_ids for e in examples], IGNORED),
            "example": torch.tensor([e.number for e in examples]),
        }

    def score(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """Returns per example ``[B, 5 + 2 C + BUCKETS]``: right, without an answer, loss of the batch, entities found
        and there to be found; per class right and there; which of `BUCKETS` the generated text hashes to."""
        rows = torch.zeros(len(output.generated), 5 + 2 * self.classes + BUCKETS, dtype=torch.float64)
        loss = float(output.parts.get("lm", output.loss))
        for row, text, number in zip(rows, output.generated, batch["example"].tolist(), strict=True):
            example = self.task.validation[number]
            said = self.said(text)
            right = self.task.is_correct(said, example.answer)
            found, there = count_entities(text, example.text)
            row[:5] = torch.tensor([right, self.task.parse(said) is None, loss, found, there])
            if self.task.labels is not None:
                label = self.task.labels.index(example.answer)
                row[5 + label], row[5 + self.classes + label] = right, 1
            row[5 + 2 * self.classes + zlib.crc32(text.encode()) % BUCKETS] = 1
        return rows.to(output.loss.device)

    def summarize(self, sums: Tensor) -> dict[str, Any]:
        """Returns the metrics from the sum of `score`. ``diversity``: different texts per example (by their hashes)."""
        total = round(float(sums[5 + 2 * self.classes :].sum()))
        correct, invalid, loss, found, there = sums[:5].tolist()
        metrics: dict[str, Any] = {
            "accuracy": correct / total,
            "invalid": invalid / total,
            "loss": loss / total,
            "diversity": int((sums[5 + 2 * self.classes :] > 0).sum()) / total,
            "correct": int(correct),
            "total": total,
        }
        if there and self.task.labels is None:
            metrics["entity_transfer"] = found / there
        if self.task.labels is not None:
            rights, totals = sums[5 : 5 + 2 * self.classes].int().reshape(2, -1).tolist()
            metrics["per_class"] = {
                label: [rights[index], totals[index]] for index, label in enumerate(self.task.labels)
            }
        return metrics

    def said(self, text: str) -> str:
        """Returns the answer's part of a generated text: with ``question_answer`` the text after the mark."""
        return text.rpartition(ANSWER_MARK)[2] if self.target == "question_answer" else text


def encode(examples: Sequence[AnswerExample], sender: Any, receiver: Any, max_length: int, target: str) -> list[Spoken]:
    """Tokenizes texts and answers; the sender reads its first token and then the text."""
    texts = [example.text for example in examples]
    cut = {"add_special_tokens": False, "truncation": True}
    read = sender(texts, max_length=max_length - 1, **cut)["input_ids"]
    questions = receiver(texts, max_length=max_length, **cut)["input_ids"]
    answers = receiver([example.answer for example in examples], add_special_tokens=False)["input_ids"]
    mark = receiver(f"\n{ANSWER_MARK} ", add_special_tokens=False)["input_ids"]
    return [
        Spoken(
            number,
            [sender.bos_token_id, *ids],
            questions[number] or [receiver.eos_token_id],
            answers[number],
            answers[number] if target == "answer" else [*questions[number], *mark, *answers[number]],
        )
        for number, ids in enumerate(read)
    ]


def _with_states(
    data: TelepathyData, examples: list[Spoken], encode: Callable[[Tensor, Tensor], Tensor]
) -> list[Spoken]:
    found: dict[int, Spoken] = {}
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    for start in range(0, len(order), STATES_BATCH):
        chosen = order[start : start + STATES_BATCH]
        batch = data.collate([dataclasses.replace(examples[index], states=None) for index in chosen])
        states = encode(batch["input_ids"], batch["attention_mask"]).cpu()
        for index, row in zip(chosen, states, strict=True):
            example = examples[index]
            found[index] = dataclasses.replace(example, states=row[: len(example.input_ids)].clone())
    return [found[index] for index in range(len(examples))]


def _padded(rows: Sequence[list[int]], fill: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])
