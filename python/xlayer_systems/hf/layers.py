"""Finds the layers of a Hugging Face model, and checks that its attention is causal."""

from __future__ import annotations

from typing import Any

from torch import nn


def stack_of(model: Any) -> Any:
    """Returns the innermost Hugging Face model whose forward runs the layers; heads may call it directly."""
    from transformers import PreTrainedModel

    base = getattr(model, "base_model", model)
    name = _list_of_layers(base)
    owners = [part for path, part in base.named_modules() if isinstance(part, PreTrainedModel) and _holds(path, name)]
    return owners[-1] if owners else base


def layers_of(stack: Any) -> nn.ModuleList:
    """Returns the layers of an encoder or decoder, first to last.

    Raises:
        ValueError: the model is no encoder or decoder of Hugging Face, or has not one list of layers.
    """
    layers: nn.ModuleList = stack.get_submodule(_list_of_layers(stack))
    return layers


def _list_of_layers(base: Any) -> str:
    """Returns the name of the one list of modules that is as long as the config says and not part of another."""
    settings: Any = getattr(base, "config", None)
    if hasattr(settings, "get_text_config"):
        settings = settings.get_text_config()
    depth = getattr(settings, "num_hidden_layers", None)
    if depth is None or getattr(settings, "is_encoder_decoder", False):
        raise ValueError(f"expected an encoder or a decoder of Hugging Face; got {type(base).__name__}")
    found: list[str] = []
    for name, module in base.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == depth
        if is_list and not any(_holds(other, name) for other in found):
            found.append(name)
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise ValueError(f"expected one list of {depth} layers in {type(base).__name__}; found {names}")
    return found[0]


def _holds(outer: str, inner: str) -> bool:
    """Tells whether the module named ``outer`` has the one named ``inner`` in it."""
    return not outer or inner.startswith(f"{outer}.")


def is_causal(stack: Any) -> bool:
    """Tells whether tokens attend only to those before them: in decoders, not in BERT and its kind."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = stack.config.model_type
    if getattr(stack.config, "is_decoder", False):
        return True
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
