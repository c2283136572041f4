"""Tiny bases of two architectures, a tool task that they can learn, and a corpus beside it."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from xlayer_systems.data.text import TextCorpus
from xlayer_systems.data.tools import ToolExample, ToolTask
from xlayer_systems.hf.tokenizer import train_tokenizer
from xlayer_systems.lformer import LFormer, ModelConfig, attach
from xlayer_systems.lformer.data import ToolData
from xlayer_systems.lformer.training_model import LFormerForTraining

VOCABULARY, LAYERS, WIDTH = 60, 4, 24
WORDS = {"look": ("see", "watch", "find"), "move": ("walk", "run", "drive"), "talk": ("say", "ask", "call")}
FILLERS = ("the", "old", "one", "near", "house", "Tom", "and", "42", "there")
STEPS = ("start", *WORDS, "end")
OPTIONS: dict[str, Any] = {"side_size": 8, "aggregator_heads": 2, "window": 2, "dropout": 0.0}


def make_base(kind: str = "llama", seed: int = 0, vocabulary: int = VOCABULARY, spread: float = 0.3) -> Any:
    """Makes a random causal language model of four layers in evaluation mode, without dropout.

    With little ``spread`` of its weights the words stay apart, with more every token matters to those behind it.
    """
    torch.manual_seed(seed)
    if kind == "gpt2":
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(
            vocab_size=vocabulary, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=128, initializer_range=spread,
            bos_token_id=0, eos_token_id=1, **rates,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    llama = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=LAYERS,
        num_attention_heads=2, max_position_embeddings=128, initializer_range=spread, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(llama).eval()


def make_model(kind: str = "llama", moved: bool = True, base: Any = None, **options: Any) -> LFormer:
    """Attaches an L-Former, in evaluation mode; with ``moved`` the gate of the blending is open."""
    base = make_base(kind) if base is None else base
    torch.manual_seed(1)
    model = attach(base, ModelConfig(**{**OPTIONS, **options})).eval()
    if moved and model.config.blend_into_lm:
        model.blend_gate.data.fill_(0.8)
    return model


def tokens(batch: int = 3, length: int = 10, seed: int = 2) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def toy_examples(count: int, seed: int) -> tuple[ToolExample, ...]:
    """Makes requests in which one word determines the tool; the value is 10 times its number, and the plan names it."""
    draw = random.Random(seed)
    made: dict[str, ToolExample] = {}
    while len(made) < count:
        tool = draw.randrange(len(WORDS))
        text = [draw.choice(FILLERS) for _ in range(draw.randrange(3, 8))]
        text.insert(draw.randrange(len(text)), draw.choice(list(WORDS.values())[tool]))
        made.setdefault(" ".join(text), ToolExample(" ".join(text), tool, 10.0 * tool, (0, 1 + tool, 4)))
    return tuple(made.values())


def toy_task(train: int = 96, validation: int = 23) -> ToolTask:
    examples = toy_examples(train + validation, 0)
    return ToolTask("toy", examples[:train], examples[train:], tuple(WORDS), STEPS, f"toy-{train}")


def toy_corpus() -> TextCorpus:
    draw = random.Random(1)
    texts = [" ".join(draw.choices(FILLERS, k=60)) for _ in range(24)]
    return TextCorpus("toy-text", tuple(texts[:16]), tuple(texts[16:]), "toy-text")


@functools.lru_cache
def toy_tokenizer() -> Any:
    texts = [example.text for example in toy_examples(200, 2)]
    return train_tokenizer(texts, vocabulary=300, max_length=128, keep_text=True)


def toy_data(**sizes: int) -> ToolData:
    return ToolData(toy_task(**sizes), toy_corpus(), toy_tokenizer(), 16, 12)


def make_trainee(data: ToolData, phase_a_steps: int = 1, **options: Any) -> LFormerForTraining:
    """Makes the toy task's L-Former on a Llama of its vocabulary."""
    given = {"num_tools": 3, "num_steps": len(STEPS), "plan_length": 3, "plan_decoder": True, "last_k_unfreeze": 1}
    base = make_base(vocabulary=len(data.tokenizer))
    model = make_model(base=base, **{**given, **options})
    model.heads.calibrate(data.values)
    return LFormerForTraining(model, phase_a_steps)


def toy_base(seed: int = 0) -> Any:
    """Makes a Llama that can learn the toy task."""
    return make_base(seed=seed, vocabulary=len(toy_tokenizer()), spread=0.05)


@functools.lru_cache
def save_base(folder: Path) -> str:
    """Saves `toy_base` and its tokenizer as ``save_pretrained`` writes them."""
    toy_base().save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


def use_toy_task(patch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Makes the command find the toy task under every name."""
    from xlayer_systems.lformer import system

    system._prepare.cache_clear()
    patch.setattr(system, "load_tool_task", lambda name: toy_task(**sizes))
    patch.setattr(system, "load_text", lambda name: toy_corpus())
