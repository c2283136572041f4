"""Stage 2: the projectors learn a task behind the frozen encoder; and the adapter that they are compared with."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from xlayer_systems.bypass.config import AdapterConfig
from xlayer_systems.bypass.model import Bypass
from xlayer_systems.bypass.reconstruction import BATCH, FrozenModel
from xlayer_systems.data.blocks import IGNORED, LanguageModelingData
from xlayer_systems.hf.causal_lm import DecoderModel, DecoderOutput
from xlayer_systems.hf.layers import layers_of, stack_of
from xlayer_systems.hf.pretrained import check_state
from xlayer_systems.reporting.stats import student_interval
from xlayer_systems.training.directory import Record

ADAPTER_FILE, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class BypassLanguageModel(FrozenModel):
    """Is the training form of a causal language model with a bypass."""

    def __init__(self, decoder: Any, bypass: Bypass) -> None:
        super().__init__(DecoderModel(decoder), bypass)

    def forward(self, input_ids: Tensor, labels: Tensor) -> DecoderOutput:
        """Computes the loss per token of the model with biases; ``input_ids`` and ``labels`` are ``[B, S]``."""
        output: DecoderOutput = self.frozen[0](input_ids, labels)
        return output

    def usage(self, reset: bool = True) -> Record:
        """Returns the root mean square of each projector's elements, per layer with a bias."""
        rms = self.bypass.projectors.detach().float().square().mean((1, 2)).sqrt().tolist()
        return {"projectors": dict(zip(map(str, self.bypass.targets), rms, strict=True))}


def build_adapter(decoder: Any, config: AdapterConfig) -> Any:
    """Adds LoRA to every linear layer of ``decoder`` but the head, by ``peft``."""
    rank = config.rank or matching_rank(decoder, config.latent)
    return _add_lora(decoder, rank, 2 * rank)


def load_adapter(decoder: Any, folder: Path) -> Any:
    """Loads what `build_adapter` made and ``save_pretrained`` wrote: tensors and the two numbers of the config alone.

    ``peft`` would follow more of the config, such as the names of modules to import.
    """
    settings = json.loads((folder / ADAPTER_FILE).read_text())
    try:
        rank, alpha = int(settings["r"]), int(settings["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / ADAPTER_FILE} is no config of a LoRA: expected numbers r and lora_alpha"
        ) from error
    model = _add_lora(decoder, rank, alpha)
    state = load_file(folder / ADAPTER_WEIGHTS)
    check_state(state, _peft().get_peft_model_state_dict(model), folder)
    _peft().set_peft_model_state_dict(model, state)
    return model.requires_grad_(False)


def _add_lora(decoder: Any, rank: int, alpha: int) -> Any:
    peft = _peft()
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear")
    with warnings.catch_warnings():  # peft reads an attribute of transformers under a deprecated name
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(decoder, settings)


def matching_rank(decoder: Any, latent: int) -> int:
    """Returns the rank of an adapter as large, to the nearest, as the projectors of a bypass on all layers."""
    from transformers.pytorch_utils import Conv1D

    layers = layers_of(stack_of(decoder))
    shapes = [m.weight.shape for layer in layers for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
    per_rank = sum(sum(shape) for shape in shapes)
    return max(1, round(len(layers) * latent * decoder.config.hidden_size / per_rank))


@torch.no_grad()
def block_losses(model: nn.Module, data: LanguageModelingData, device: Any) -> list[float]:
    """Returns the loss in nats per token of each validation block."""
    model.to(device).eval()
    losses: list[float] = []
    for start in range(0, len(data.validation), BATCH):
        batch = {
            key: value.to(device) for key, value in data.collate(list(data.validation[start : start + BATCH])).items()
        }
        counts = (batch["labels"] != IGNORED).sum(1)
        losses += (model(**batch).token_loss.double().sum(1) / counts).tolist()
    return losses


def compare(losses: Mapping[str, Sequence[float]], base: str) -> Record:
    """Returns by name the mean loss over blocks and its paired ``difference`` from ``base``, each with its interval.

    95 % intervals, Student's t over blocks. Another pair's difference is under ``between``.
    """

    def interval(values: Sequence[float]) -> Record:
        if len(values) < 2:
            return {"mean": fmean(values), "low": math.nan, "high": math.nan}
        return {**vars(student_interval(values))}

    rows: dict[str, Record] = {}
    for name, values in losses.items():
        rows[name] = {"loss": interval(values)}
        if name != base:
            rows[name]["difference"] = interval([a - b for a, b in zip(values, losses[base], strict=True)])
    others = [name for name in losses if name != base]
    if len(others) == 2:
        pairs = zip(losses[others[0]], losses[others[1]], strict=True)
        return {"rows": rows, "between": {"names": others, **interval([a - b for a, b in pairs])}}
    return {"rows": rows}


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("LoRA needs the package peft; install it, or train with --set compare=false") from error
    return peft
