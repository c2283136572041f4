"""Tiny random models of three architectures, bypasses that hide nothing, and a decoder saved to disk."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hyper_lm_tools import save_text
from xlayer_systems.bypass import Bypass, BypassConfig, attach
from xlayer_systems.hf.tokenizer import train_tokenizer

VOCABULARY, WIDTH, LAYERS, PAD = 60, 32, 3, 0
DECODERS, ENCODER = ("llama", "gpt2"), "bert"


def make_model(kind: str, seed: int = 0, width: int = WIDTH) -> Any:
    """Makes a random model whose logits differ from token to token, in evaluation mode."""
    torch.manual_seed(seed)
    wide: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "pad_token_id": PAD}
    if kind == "gpt2":
        ends = {"bos_token_id": 1, "eos_token_id": None}
        return GPT2LMHeadModel(
            GPT2Config(n_embd=width, n_layer=LAYERS, n_head=4, n_positions=64, **ends, **wide)
        ).eval()
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64}
    if kind == ENCODER:
        return BertModel(BertConfig(**sizes, **wide)).eval()
    ends = {"bos_token_id": 1, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ends, **wide)).eval()


def make_ids(batch: int = 2, tokens: int = 10, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def make_bypass(model: Any, *, scale: float = 1.0, **settings: Any) -> Bypass:
    """Makes a bypass with random projectors and statistics."""
    bypass = attach(model, BypassConfig(latent=6), **settings)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        bypass.projectors.copy_(scale * torch.randn(bypass.projectors.shape, generator=draw))
        bypass.mean.copy_(torch.randn(bypass.mean.shape, generator=draw))
        for scale in (bypass.scale, bypass.input_scale):
            scale.copy_(torch.rand(scale.shape, generator=draw) + 0.5)
    return bypass


def output(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Returns the logits, or the states of a model without a head."""
    made = model(input_ids=ids, **inputs)
    found: Tensor = made.logits if hasattr(made, "logits") else made.last_hidden_state
    return found


@functools.lru_cache
def save_decoder(folder: Path) -> tuple[str, str]:
    """Saves a random decoder of three layers with its tokenizer, and a folder of text for it; returns both paths."""
    text = save_text(folder / "text")
    tokenizer = train_tokenizer([(text / "train.txt").read_text()], vocabulary=320, max_length=64, keep_text=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    return str(folder / "decoder"), str(text)
