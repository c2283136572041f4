"""A sentence (pair) classifier on an encoder with, or without, cross-layer routing bridges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from xlayer_systems.hf.pretrained import check_model, check_state, describe_model, read_own, save_own
from xlayer_systems.training.model import TrainingModel
from xlayer_systems.training.optim import decay_groups

from .bridge import XLRBBridge, attach, check_masks
from .config import XLRBConfig

_CONFIG_FILE = "xlrb_config.json"
_WEIGHTS_FILE = "xlrb.safetensors"


@dataclass
class XLRBOutput(ModelOutput):
    """Holds the result: ``loss`` (scalar, None without labels) and ``logits`` `[B, num_labels]`."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class ClassifierHead(nn.Sequential):
    """Applies LayerNorm, Linear, ReLU, dropout and Linear to one vector per example, `[B, H]` → `[B, num_labels]`."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        width = max(128, hidden_size // 2)
        super().__init__(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, num_labels),
        )


class XLRBClassifier(TrainingModel):
    """Classifies with an encoder, optionally with an XLRB bridge, and a head on token 0.

    The loss is cross entropy with label smoothing, plus ``entropy_weight`` times the mean HDIM attention entropy,
    in training and in evaluation.

    Args:
        backbone: a Hugging Face encoder; of a model with a task head the base model is used. Its pooler is dropped.
        config: the bridge's options, or None for the plain encoder with the same head.
        num_labels: number of classes.
        label_smoothing: in [0, 1).
        dropout: of the head, in [0, 1).

    Raises:
        ValueError: for a backbone the bridge cannot attach to, or a number out of range.
    """

    def __init__(
        self,
        backbone: Any,
        config: XLRBConfig | None,
        num_labels: int,
        *,
        label_smoothing: float = 0.05,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}")
        for name, value in (("label_smoothing", label_smoothing), ("dropout", dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        self.config = config
        self.num_labels = num_labels
        self.label_smoothing = label_smoothing
        self.dropout = dropout
        self.encoder: Any = getattr(backbone, "base_model", backbone)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # unused parameters would stop DDP
        self.bridge: XLRBBridge | None = None if config is None else attach(self.encoder, config)
        self.head = ClassifierHead(self.encoder.config.hidden_size, num_labels, dropout)
        weight = next(self.encoder.parameters())
        self.head.to(device=weight.device, dtype=weight.dtype)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        segment_ids: Tensor | None = None,
        special_tokens_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> XLRBOutput:
        """Classifies a batch.

        Args:
            input_ids: token numbers `[B, S]`.
            attention_mask: `[B, S]`, non-zero at real tokens.
            segment_ids: `[B, S]`, 0 in the first sentence, 1 in the second, -1 at special tokens and padding. Needed
                by configurations with ``needs_pairs``; gives token types to backbones that have them.
            special_tokens_mask: `[B, S]`, 1 at special tokens.
            labels: class numbers `[B]`.

        Returns:
            ``XLRBOutput`` with the loss (None without labels) and logits `[B, num_labels]`.
        """
        masks = {
            "attention_mask": attention_mask,
            "segment_ids": segment_ids,
            "special_tokens_mask": special_tokens_mask,
        }
        check_masks(input_ids, **masks)
        inputs: dict[str, Tensor | None] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if segment_ids is not None and getattr(self.encoder.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = ((segment_ids == 1).cumsum(1) > 0).long() * (attention_mask != 0)
        if self.bridge is not None:
            inputs |= {"segment_ids": segment_ids, "special_tokens_mask": special_tokens_mask}
        hidden = self.encoder(**inputs).last_hidden_state
        logits = self.head(hidden[:, 0])
        entropy = None if self.bridge is None else self.bridge.take_entropy()
        if labels is None:
            return XLRBOutput(logits=logits)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        if entropy is not None and self.config is not None:
            loss = loss + self.config.entropy_weight * entropy
        return XLRBOutput(loss=loss, logits=logits)

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes each encoder layer, bridges included, in backward instead of keeping its activations."""
        enable = getattr(self.encoder, "activation_checkpointing_enable", self.encoder.gradient_checkpointing_enable)
        enable({"use_reentrant": False})

    def parameter_groups(
        self, encoder_lr: float, head_lr: float, bridge_lr: float | None = None, weight_decay: float = 0.01
    ) -> list[dict[str, Any]]:
        """Returns optimizer groups (name, params, lr, weight_decay), every trainable parameter in exactly one.

        Args:
            encoder_lr: learning rate of the encoder.
            head_lr: learning rate of the head.
            bridge_lr: learning rate of the bridge; None gives it the encoder's, as published.
            weight_decay: for everything but biases and LayerNorm weights, which have none.
        """
        rates = {"encoder": encoder_lr, "bridge": encoder_lr if bridge_lr is None else bridge_lr, "head": head_lr}
        groups = []
        for part, rate in rates.items():
            module = getattr(self, part)
            if module is not None:
                groups += _groups_of(module, rate, weight_decay, part)
        return groups

    def usage(self, reset: bool = True) -> dict[str, Any]:
        """Returns ``XLRBBridge.usage``; ``{"layers": {}}`` without a bridge."""
        return {"layers": {}} if self.bridge is None else self.bridge.usage(reset)

    def save_pretrained(
        self, directory: str | Path, *, include_encoder: bool = False, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Writes the bridge and the head (safetensors) and their configuration (JSON) into `directory`.

        Args:
            directory: made if missing.
            include_encoder: also write the encoder's weights. A fine-tuned encoder is part of the result: without
                them, ``from_pretrained`` needs a backbone with the same fine-tuned weights.
            state_dict: the whole weights, for a sharded model that had them gathered (``accelerator.get_state_dict``).
        """
        state = _own_state(self.state_dict() if state_dict is None else state_dict, include_encoder)
        settings = self._settings() | {"include_encoder": include_encoder}
        save_own(Path(directory), state, _WEIGHTS_FILE, settings, _CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, directory: str | Path, backbone: Any, config: XLRBConfig | None = None) -> XLRBClassifier:
        """Loads what ``save_pretrained`` wrote onto `backbone` (whose own weights are kept if none were saved).

        Args:
            directory: where it was saved.
            backbone: an encoder of the same kind and size.
            config: if given, the configuration that the checkpoint must have.

        Raises:
            ValueError: if the checkpoint is missing or of another configuration or backbone size.
        """
        directory = Path(directory)
        saved, state = read_own(directory, "XLRB checkpoint", _WEIGHTS_FILE, _CONFIG_FILE)
        saved_config = None if saved["config"] is None else XLRBConfig.from_dict(saved["config"])
        _check_same_config(saved_config, config)
        check_model(saved["backbone"], describe_model(getattr(backbone, "base_model", backbone)), directory)
        options = {"label_smoothing": saved["label_smoothing"], "dropout": saved["dropout"]}
        model = cls(backbone, saved_config, saved["num_labels"], **options)
        check_state(state, _own_state(model.state_dict(), saved["include_encoder"]), directory)
        model.load_state_dict(state, strict=False)
        return model

    def _settings(self) -> dict[str, Any]:
        return {
            "config": None if self.config is None else self.config.to_dict(),
            "num_labels": self.num_labels,
            "label_smoothing": self.label_smoothing,
            "dropout": self.dropout,
            "backbone": describe_model(self.encoder),
        }


def _own_state(state: dict[str, Tensor], include_encoder: bool) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if include_encoder or not name.startswith("encoder.")}


def _groups_of(module: nn.Module, learning_rate: float, weight_decay: float, part: str) -> list[dict[str, Any]]:
    """Returns groups of the trainable parameters; biases and LayerNorm weights have no weight decay."""
    owned = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    plain = {id(parameter) for owner, name, parameter in owned if isinstance(owner, nn.LayerNorm) or "bias" in name}
    named = [(name, parameter) for _, name, parameter in owned]
    return decay_groups(named, learning_rate, weight_decay, lambda _, parameter: id(parameter) not in plain, part)


def _check_same_config(saved: XLRBConfig | None, wanted: XLRBConfig | None) -> None:
    if wanted is None or wanted == saved:
        return
    if saved is None:
        raise ValueError("the checkpoint holds an encoder without an XLRB bridge; leave config out to load it")
    listed = ", ".join(f"{name}={old!r} (asked for {new!r})" for name, (old, new) in saved.differences(wanted).items())
    raise ValueError(f"the checkpoint has another XLRB config: {listed}")
