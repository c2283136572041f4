"""Tiny encoders and sentence-pair batches for the XLRB tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from xlayer_systems.xlrb import PRESETS, XLRBClassifier, XLRBConfig

VOCABULARY, HIDDEN, LAYERS, HEADS, TOKENS = 50, 32, 8, 4, 10
LAST = LAYERS - 1
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}


def make_encoder(kind: str = "roberta", dropout: float = 0.0, seed: int = 0, **changes: int) -> nn.Module:
    """Makes a random RoBERTa or BERT whose layers differ enough for routing to matter."""
    torch.manual_seed(seed)
    options = SIZES | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout} | changes
    encoder = RobertaModel(RobertaConfig(**options)) if kind == "roberta" else BertModel(BertConfig(**options))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.0 if "embeddings" in name else HIDDEN**-0.5)
    return encoder


def make_classifier(config: XLRBConfig | None, *, seed: int = 0, dropout: float = 0.0, **options) -> XLRBClassifier:
    """Makes a classifier with two labels on a fresh RoBERTa, without dropout outside the bridge unless asked for."""
    encoder = make_encoder(dropout=dropout, seed=seed)
    torch.manual_seed(seed + 1)
    return XLRBClassifier(encoder, config, 2, dropout=dropout, **options)


def make_batch(size: int = 6, tokens: int = TOKENS, seed: int = 3) -> dict[str, Tensor]:
    """Draws sentence pairs `<s> a a </s> b … </s>` (pad id 1), of two lengths; the first sentence has two or three
    tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (size, tokens), generator=generator)
    segments = torch.full((size, tokens), -1)
    mask = torch.ones(size, tokens, dtype=torch.long)
    for row in range(size):
        end, split = (tokens, 3) if row % 2 else (tokens - 2, 4)
        segments[row, 1:split], segments[row, split + 1 : end - 1] = 0, 1
        mask[row, end:], ids[row, end:] = 0, 1
    labels = torch.randint(0, 2, (size,), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "segment_ids": segments,
        "special_tokens_mask": (segments < 0).long(),
        "labels": labels,
    }


def gradients(model: nn.Module, batch: dict[str, Tensor], seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes loss and gradients of one step from a fixed random state; every parameter must get one."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}: DDP would stop"
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread: for tiny tensors, waking a second one costs more than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def config_without_dropout(id: str, **changes) -> XLRBConfig:
    return replace(PRESETS[id], dropout=0.0, **changes)


def watch(model: XLRBClassifier, batch: dict[str, Tensor], layer: int = LAST) -> dict[str, Any]:
    """Runs `model` and returns the outputs of all layers, and of `layer`'s attention before and after the message."""
    seen: dict[str, Any] = {"layers": []}
    encoder = model.encoder
    attention = encoder.encoder.layer[layer].attention
    handles = [
        module.register_forward_hook(lambda _, args, output: seen["layers"].append(output))
        for module in encoder.encoder.layer
    ]
    handles.append(attention.output.register_forward_hook(lambda _, args, output: seen.update(before=output)))
    handles.append(attention.register_forward_hook(lambda _, args, output: seen.update(after=output[0])))
    seen["logits"] = model(**batch).logits
    for handle in handles:
        handle.remove()
    return seen
