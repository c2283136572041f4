"""What a bypass has to know of a Hugging Face model: its layers, whether it looks ahead, and which one it is."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from xlayer_systems.errors import UserError

_SAMPLE = 64  # elements of every parameter that the fingerprint sees


def stack_of(model: Any) -> Any:
    """The model without its head: the module whose forward runs the layers."""
    return getattr(model, "base_model", model)


def layers_of(stack: Any) -> list[nn.Module]:
    """The layers, first to last: the one list of modules as long as the config says that is not part of another."""
    settings = getattr(stack, "config", None)
    depth = getattr(settings, "num_hidden_layers", None)
    if depth is None or getattr(settings, "is_encoder_decoder", False):
        raise UserError(f"a bypass attaches to an encoder or a decoder of Hugging Face; got {type(stack).__name__}")
    found: dict[str, nn.ModuleList] = {}
    for name, module in stack.named_modules():
        is_part = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not is_part:
            found[name] = module
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise UserError(f"a bypass needs one list of {depth} layers in {type(stack).__name__}; found {names}")
    return list(next(iter(found.values())))


def is_causal(stack: Any) -> bool:
    """Whether tokens see only those before them: decoders, as against BERT and its kind."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = stack.config.model_type
    if getattr(stack.config, "is_decoder", False):
        return True
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def describe(stack: Any) -> dict[str, Any]:
    """Kind, size and fingerprint of a model."""
    settings = stack.config
    names = ("model_type", "hidden_size", "num_hidden_layers")
    return {**{name: getattr(settings, name, None) for name in names}, "fingerprint": fingerprint(stack)}


def fingerprint(stack: Any) -> str:
    """Identifies the weights by the first elements of every parameter, in bfloat16: the same for a model that was
    loaded in float32 and in bfloat16."""
    digest = hashlib.sha256()
    for name, parameter in stack.named_parameters():
        sample = parameter.detach().flatten()[:_SAMPLE].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
