"""What a bypass has to know of a Hugging Face model: its layers, whether it looks ahead, and which one it is."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

_SAMPLE = 64  # elements of every parameter that the fingerprint sees


def stack_of(model: Any) -> Any:
    """The innermost Hugging Face model whose forward runs the layers: heads may call it past those around it."""
    from transformers import PreTrainedModel

    base = getattr(model, "base_model", model)
    name = _list_of_layers(base)
    owners = [part for path, part in base.named_modules() if isinstance(part, PreTrainedModel) and _holds(path, name)]
    return owners[-1] if owners else base


def layers_of(stack: Any) -> list[nn.Module]:
    """The layers, first to last."""
    return list(stack.get_submodule(_list_of_layers(stack)))


def _list_of_layers(base: Any) -> str:
    """Name of the one list of modules that is as long as the config says and not part of another."""
    settings = getattr(base, "config", None)
    depth = getattr(settings, "num_hidden_layers", None)
    if depth is None or getattr(settings, "is_encoder_decoder", False):
        raise ValueError(f"a bypass attaches to an encoder or a decoder of Hugging Face; got {type(base).__name__}")
    found: list[str] = []
    for name, module in base.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == depth
        if is_list and not any(_holds(other, name) for other in found):
            found.append(name)
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise ValueError(f"a bypass needs one list of {depth} layers in {type(base).__name__}; found {names}")
    return found[0]


def _holds(outer: str, inner: str) -> bool:
    """Whether the module named ``outer`` has the one named ``inner`` in it."""
    return not outer or inner.startswith(f"{outer}.")


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
