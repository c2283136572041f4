"""Tiny hyper-connected language models with parameters that hide nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlayer_systems.hyper_lm import HyperTransformer, LanguageModel

VOCABULARY, HIDDEN, LAYERS, HEADS, STREAMS = 40, 16, 3, 2, 3
# Every kind of residual connection, and every option that changes what is computed.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"residual": "plain"},
    "shc": {"residual": "shc"},
    "dhc": {"residual": "dhc"},
    "dhc-rms-mean": {"residual": "dhc", "use_tanh": False, "norm": "rms", "reduce": "mean"},
    "mhc": {"residual": "mhc"},
    "mhc-per_stream": {"residual": "mhc", "coefficients": "per_stream"},
}


def make_model(kind: str, *, random: bool = True, seed: int = 0, **changes: Any) -> HyperTransformer:
    """Makes a model of one of `KINDS`; ``random``: every parameter is moved away from its initial value."""
    torch.manual_seed(seed)
    sizes = {"num_layers": LAYERS, "num_heads": HEADS, "expansion_rate": STREAMS}
    model = HyperTransformer(VOCABULARY, HIDDEN, **{**sizes, **KINDS[kind], **changes})
    if random:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def make_ids(batch: int = 2, tokens: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def make_batch(batch: int = 4, tokens: int = 9) -> dict[str, Tensor]:
    """Makes a batch as the training loop gives it to a `LanguageModel`."""
    ids = make_ids(batch, tokens + 1)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].contiguous()}


def gradients(model: HyperTransformer, batch: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    """Computes the gradients of one step; every parameter has one."""
    torch.manual_seed(seed)
    model.zero_grad()
    LanguageModel(model)(**batch).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def save_text(folder: Path, documents: int = 12) -> Path:
    """Saves a folder with train.txt and validation.txt, some code that repeats itself."""
    folder.mkdir(parents=True)
    for split, first in (("train", 0), ("validation", 100)):
        functions = [
            f"def function_{first + i}(Value, other={i}):\n    return Value * {i} + other_{i % 5}\n"
            for i in range(documents * (6 if split == "train" else 1))
        ]
        (folder / f"{split}.txt").write_text("\n".join(functions))
    return folder
