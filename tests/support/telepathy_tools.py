"""Two tiny decoders with different tokenizers and widths, saved to disk, and a task that they can learn."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xlayer_ext.functional.losses import language_modeling_loss
from xlayer_systems.data.answers import AnswerExample, AnswerTask
from xlayer_systems.hf.tokenizer import train_tokenizer
from xlayer_systems.telepathy import Pair, TelepathyConfig, TelepathyModel, receiver_input, receiver_logits
from xlayer_systems.telepathy.data import TelepathyData

WORDS = {"fruit": ("apple", "pear", "plum", "fig"), "animal": ("cat", "dog", "cow", "hen"), "color": ("red", "blue")}
FILLERS = ("the", "old", "one", "near", "house", "Tom", "saw", "42", "there")
SMALL = TelepathyConfig(
    soft_tokens=3, num_layers=1, num_heads=2, calibration_examples=20, codebook_size=16, dit_steps=2
)


def toy_examples(count: int, seed: int) -> tuple[AnswerExample, ...]:
    """Makes texts in which one word determines the answer."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(list(WORDS))
        text = [draw.choice(FILLERS) for _ in range(draw.randrange(2, 7))]
        text.insert(draw.randrange(len(text)), draw.choice(WORDS[label]))
        rows.append(AnswerExample(" ".join(text), label))
    return tuple(rows)


def toy_task(name: str = "toy", train: int = 96, validation: int = 23) -> AnswerTask:
    """Makes a task of three answers."""
    return AnswerTask(
        name, toy_examples(train, 0), toy_examples(validation, 1), tuple(WORDS), "What is in it?", f"toy-{train}"
    )


def teach(model: LlamaForCausalLM, tokenizer: Any, steps: int = 80) -> None:
    """Trains a model to answer about texts that it reads, since a random one answers nothing whatever the message."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        examples = toy_examples(16, 100 + step)
        prompts, answers = (
            tokenizer([getattr(e, part) for e in examples], add_special_tokens=False)["input_ids"]
            for part in ("text", "answer")
        )
        given = receiver_input(model, tokenizer, None, primer="Answer: ", answers=answers, prompts=prompts)
        loss = language_modeling_loss(receiver_logits(model, given), given.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@functools.lru_cache
def save_pair(folder: Path) -> tuple[str, str]:
    """Saves decoders of two layers as ``save_pretrained`` writes them: a random sender, and a receiver that can answer.

    Made once per folder: of several processes that ask for them, none may write what another reads.
    """
    if (folder / "receiver" / "tokenizer.json").exists():
        return str(folder / "sender"), str(folder / "receiver")
    texts = [example.text for example in toy_examples(300, 2)] + [*WORDS, "Answer: "] * 20
    names = []
    for role, vocabulary, width, seed in (("sender", 300, 24, 0), ("receiver", 320, 16, 1)):
        tokenizer = train_tokenizer(texts[seed * 50 :], vocabulary=vocabulary, max_length=128, keep_text=True)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config)
        if role == "receiver":
            teach(model, tokenizer)
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        names.append(str(folder / role))
    return names[0], names[1]


def load_pair(folder: Path) -> Pair:
    """Loads the saved pair, frozen."""
    return Pair.load(*save_pair(folder))


def make_data(pair: Pair, task: AnswerTask | None = None, target: str = "answer") -> TelepathyData:
    """Encodes the toy task with the pair's tokenizers."""
    return TelepathyData(task or toy_task(), pair.sender_tokenizer, pair.receiver_tokenizer, 32, target)


def make_model(pair: Pair, config: TelepathyConfig = SMALL, data: TelepathyData | None = None) -> TelepathyModel:
    """Makes a calibrated bridge with the parameters of seed 0."""
    torch.manual_seed(0)
    model = TelepathyModel.build(pair, config)
    batch = (data or make_data(pair)).collate((data or make_data(pair)).train[:20])
    states = model.encode(batch["input_ids"], batch["attention_mask"])
    embeddings = model.receiver.get_input_embeddings().weight
    model.bridge.calibrate([(states, batch["attention_mask"].bool())], embeddings)
    return model


def use_toy_task(patch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Makes the command find the toy task under the name ``toy``."""
    from xlayer_systems.telepathy import system

    def load(name: str) -> Any:
        return toy_task(name, **sizes)

    system._prepare.cache_clear()
    patch.setattr(system, "load_answer_task", load)
