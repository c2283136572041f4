"""Every baseline of the telepathy system, on the examples that the bridge is scored on.

====================  =================================================================================================
``majority``          training's commonest answer, always
``random``            an answer drawn uniformly from the labels (open answers: from training's), by the seed
``sender_text``       the sender reads the text and answers; ``sender_text_5shot``: behind five solved examples
``receiver_text``     the receiver does; ``receiver_text_5shot`` too
``text_relay``        the sender summarizes in words, the receiver answers from those; ``text_relay_5shot``: behind
                      five solved examples, whose texts are summaries of the sender's as well
``…_ranked``          the most likely label, nothing generated, for the three 0-shot ones; closed answers only
``prompt_tuning``     learned soft tokens, as many as the bridge's and trained as long, the same for every text
``prompt_tuning_text``  the same before the text itself
``linear_probe``      logistic regression on the sender's states at the bridge's layer; closed answers only
``noise``             the bridge's soft tokens replaced by Gaussian noise of the same root mean square
====================  =================================================================================================

A model whose tokenizer has a chat template reads text as messages. Its answer is the label that it begins with, else
the first that it contains, else the most likely one; the row counts them under ``found``.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xlayer_systems.data.answers import AnswerExample, AnswerTask
from xlayer_systems.telepathy import receiver as receiving
from xlayer_systems.telepathy.config import TelepathyConfig, TelepathyOptions
from xlayer_systems.telepathy.evaluation import score
from xlayer_systems.telepathy.model import TelepathyModel
from xlayer_systems.telepathy.probe import Pooled, fit_probe, pool
from xlayer_systems.telepathy.prompt_tuning import Schedule, tune_prompt
from xlayer_systems.telepathy.prompting import (
    answer_prompts,
    answer_tokens,
    complete,
    encode,
    few_shots,
    find_label,
    is_chat,
    rank_labels,
    summary_prompts,
)

LOG = logging.getLogger(__name__)
SHOTS = 5
SUMMARY_TOKENS = 32
BATCH = 64
READING = 400  # validation examples of the baselines that read text: long prompts, token by token
TEXT = ("sender_text", "sender_text_5shot", "receiver_text", "receiver_text_5shot", "text_relay", "text_relay_5shot")
RANKED = ("sender_text_ranked", "receiver_text_ranked", "text_relay_ranked")


def run_baselines(
    task: AnswerTask,
    config: TelepathyConfig,
    options: TelepathyOptions,
    bridge_model: TelepathyModel,
    seed: int,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs the baselines that ``options`` name; the seed and the models determine all but the times.

    Args:
        config: of the bridge: soft tokens, primer and source layer.
        options: of its training: length of texts, batch, steps and rate.
        bridge_model: the pair and the trained bridge.
        limit: score on so many validation examples, drawn by the seed; None: on all, those in `TEXT` and `RANKED` on
            `READING`.

    Returns:
        Name of each baseline to its `score`, ``seconds``, and for the trained ones what they chose or their last loss.
    """
    run = _Run(task, config, options, bridge_model, seed, limit)
    bridge_model.eval()
    rows: dict[str, dict[str, Any]] = {}
    known, named = run.all(), options.baseline_names()
    wanted = {name: baseline for name, baseline in known.items() if name in named}
    left_out = [name for name in named if name not in known]
    if left_out:
        LOG.info("baselines left out, since the answers are open: %s", ", ".join(left_out))
    for number, (name, baseline) in enumerate(wanted.items(), 1):
        started = time.perf_counter()
        examples = run.read if name in TEXT + RANKED else run.examples
        LOG.info("baseline %d/%d: %s on %d examples", number, len(wanted), name, len(examples))
        generated, notes = baseline()
        rows[name] = {**score(task, generated, examples), **notes}
        rows[name]["seconds"] = time.perf_counter() - started
    return rows


Result = tuple[Sequence[str], dict[str, Any]]  # a text per example, and notes for the row


class _Run:
    """Runs the baselines of one task and pair; shared parts are computed once."""

    def __init__(
        self,
        task: AnswerTask,
        config: TelepathyConfig,
        options: TelepathyOptions,
        model: TelepathyModel,
        seed: int,
        limit: int | None,
    ) -> None:
        self.task, self.config, self.options, self.model, self.seed = task, config, options, model, seed
        self.sender = (model.sender, model.pair.sender_tokenizer)
        self.receiver = (model.receiver, model.pair.receiver_tokenizer)
        self.examples = _drawn(task.validation, limit, seed)
        self.read = _drawn(self.examples, READING, seed)
        self.texts = [example.text for example in self.examples]
        self.read_texts = [example.text for example in self.read]
        self.shots = few_shots(task, SHOTS, seed)
        self._summaries: tuple[list[str], list[str]] | None = None

    def all(self) -> dict[str, Callable[[], Result]]:
        """Returns the baselines by name, in the order of the report."""
        baselines: dict[str, Callable[[], Result]] = {
            "majority": self.majority,
            "random": self.random,
            "sender_text": lambda: self.text(self.sender, self.read_texts, []),
            "sender_text_5shot": lambda: self.text(self.sender, self.read_texts, self.shots),
            "receiver_text": lambda: self.text(self.receiver, self.read_texts, []),
            "receiver_text_5shot": lambda: self.text(self.receiver, self.read_texts, self.shots),
            "text_relay": lambda: self.relay(shots=False),
            "text_relay_5shot": lambda: self.relay(shots=True),
            "sender_text_ranked": lambda: self.ranked(self.sender, self.read_texts),
            "receiver_text_ranked": lambda: self.ranked(self.receiver, self.read_texts),
            "text_relay_ranked": lambda: self.ranked(self.receiver, self.summaries()[0]),
            "prompt_tuning": lambda: self.prompt_tuning(with_text=False),
            "prompt_tuning_text": lambda: self.prompt_tuning(with_text=True),
            "linear_probe": self.linear_probe,
            "noise": self.noise,
        }
        if self.task.labels is None:
            for name in ("linear_probe", *RANKED):
                del baselines[name]
        return baselines

    def majority(self) -> Result:
        answer = Counter(example.answer for example in self.task.train).most_common(1)[0][0]
        return [answer] * len(self.examples), {}

    def random(self) -> Result:
        answers = self.task.labels or sorted({example.answer for example in self.task.train})
        draw = random.Random(f"random/{self.seed}")
        return [draw.choice(answers) for _ in self.examples], {}

    def text(self, reader: tuple[Any, Any], texts: Sequence[str], shots: Sequence[AnswerExample]) -> Result:
        model, tokenizer = reader
        prompts = answer_prompts(self.task, tokenizer, texts, shots, self.options.max_length)
        said = complete(model, tokenizer, prompts, answer_tokens(self.task, tokenizer), BATCH)
        if not is_chat(tokenizer) or self.task.labels is None:
            return said, {}
        found = [find_label(self.task, text) for text in said]
        labels = [label for label, _ in found]
        silent = [index for index, label in enumerate(labels) if label is None]
        ranked = rank_labels(model, tokenizer, [prompts[index] for index in silent], self.task.labels, BATCH)
        for index, label in zip(silent, ranked, strict=True):
            labels[index] = label
        ways = Counter("ranked" if label is None else way for label, way in found)
        return [str(label) for label in labels], {"found": dict(ways)}

    def ranked(self, reader: tuple[Any, Any], texts: Sequence[str]) -> Result:
        assert self.task.labels is not None
        prompts = answer_prompts(self.task, reader[1], texts, [], self.options.max_length)
        return rank_labels(*reader, prompts, self.task.labels, BATCH), {}

    def summaries(self) -> tuple[list[str], list[str]]:
        """Returns the sender's summaries of the texts that are read and of the solved examples."""
        if self._summaries is None:
            texts = [*self.read_texts, *(shot.text for shot in self.shots)]
            prompts = summary_prompts(self.sender[1], texts, self.options.max_length)
            said = complete(*self.sender, prompts, SUMMARY_TOKENS, BATCH)
            self._summaries = said[: len(self.read)], said[len(self.read) :]
        return self._summaries

    def relay(self, *, shots: bool) -> Result:
        summaries, of_shots = self.summaries()
        solved = [AnswerExample(text, shot.answer) for text, shot in zip(of_shots, self.shots, strict=True)]
        return self.text(self.receiver, summaries, solved if shots else [])

    def prompt_tuning(self, *, with_text: bool) -> Result:
        model, tokenizer = self.receiver
        losses: list[float] = []
        soft = tune_prompt(
            model,
            tokenizer,
            self.config.soft_tokens,
            self.config.primer,
            [encode(tokenizer, example.answer) for example in self.task.train],
            self._read([example.text for example in self.task.train]) if with_text else None,
            _schedule(self.options, len(self.task.train)),
            self.seed,
            lambda _, loss: losses.append(loss),
        )
        notes = {"loss": sum(losses[-20:]) / len(losses[-20:])} if losses else {}
        if with_text:
            return self._answers(lambda count: soft.expand(count, -1, -1), self._read(self.texts)), notes
        # Without a text all inputs are the same.
        said = receiving.generate_answers(model, tokenizer, self._input(soft[None], None), self.model.max_new_tokens)
        return said * len(self.examples), notes

    def linear_probe(self) -> Result:
        assert self.task.labels is not None
        numbers = {label: index for index, label in enumerate(self.task.labels)}
        train = self.task.train
        count = min(self.options.probe_examples or len(train), len(train))
        train = tuple(train[index * len(train) // count] for index in range(count))
        pooled = self._pooled([example.text for example in train])
        labels = [numbers[example.answer] for example in train]
        probe = fit_probe(pooled, labels, len(numbers), self.seed)
        said = [self.task.labels[i] for i in probe.predict(self._pooled(self.texts))]
        return said, {"features": probe.features, "penalty": probe.penalty, "held_out": probe.held_out}

    def noise(self) -> Result:
        ids, mask = self.sender_batch(self.texts[:BATCH])
        with torch.no_grad():
            soft = self.model.encode_message(ids, mask).soft
        rms = soft.double().square().mean().sqrt().item()
        generator = torch.Generator().manual_seed(self.seed)

        def draw(count: int) -> Tensor:
            return (rms * torch.randn(count, *soft.shape[1:], generator=generator)).to(soft)

        return self._answers(draw, None), {"rms": rms}

    def sender_batch(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encodes texts as the bridge's sender gets them, its first token, then the text: ids and mask ``[B, T]``."""
        model, tokenizer = self.sender
        rows = [[tokenizer.bos_token_id, *encode(tokenizer, text, self.options.max_length - 1)] for text in texts]
        width = max(map(len, rows))
        ids = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)

    def _pooled(self, texts: Sequence[str]) -> Pooled:
        parts = []
        for first in range(0, len(texts), BATCH):
            ids, mask = self.sender_batch(texts[first : first + BATCH])
            parts.append(pool(self.model.encode(ids, mask), mask.bool()))
        return Pooled(torch.cat([part.mean for part in parts]), torch.cat([part.last for part in parts]))

    def _read(self, texts: Sequence[str]) -> list[list[int]]:
        return [encode(self.receiver[1], text, self.options.max_length) for text in texts]

    def _input(self, soft: Tensor, prompts: Sequence[Sequence[int]] | None) -> receiving.ReceiverInput:
        model, tokenizer = self.receiver
        return receiving.receiver_input(
            model, tokenizer, soft, primer=self.config.primer, answers=None, prompts=prompts
        )

    def _answers(self, soft: Callable[[int], Tensor], prompts: Sequence[Sequence[int]] | None) -> list[str]:
        """Generates the receiver's answers to ``soft(rows)``, batch by batch."""
        said: list[str] = []
        for first in range(0, len(self.examples), BATCH):
            count = min(BATCH, len(self.examples) - first)
            given = self._input(soft(count), prompts and prompts[first : first + count])
            said += receiving.generate_answers(*self.receiver, given, self.model.max_new_tokens)
        return said


def _drawn(examples: Sequence[AnswerExample], limit: int | None, seed: int) -> Sequence[AnswerExample]:
    """Draws ``limit`` of the examples, in their order; all where there are no more."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = random.Random(f"validation/{seed}").sample(range(len(examples)), limit)
    return [examples[i] for i in sorted(chosen)]


def _schedule(options: TelepathyOptions, examples: int) -> Schedule:
    steps = options.epochs * math.ceil(examples / options.batch_size)
    if options.max_steps is not None:
        steps = min(steps, options.max_steps)
    return Schedule(
        max(1, steps), min(options.batch_size, examples), options.learning_rate, options.warmup, options.clip
    )
