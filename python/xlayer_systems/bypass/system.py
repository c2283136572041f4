"""Trains a bypass on a frozen causal language model, in two stages.

A run of both stages is a composite one, with a run directory for each of its parts inside::

    reconstruction/   stage 1
    task/             stage 2, of a bypass or of the LoRA alone
    lora/             the LoRA of the same size that a bypass is compared with
    metrics.jsonl     the records of all parts, each with its ``stage``
    model/            of the task
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import nn

from xlayer_systems.bypass.config import AdapterConfig, BypassConfig, BypassOptions
from xlayer_systems.bypass.model import CONFIG_FILE, Bypass, attach
from xlayer_systems.bypass.plots import plot_projectors
from xlayer_systems.bypass.reconstruction import (
    FrozenModel,
    Reconstruction,
    ReconstructionData,
    inputs_of,
    principal_r2,
    spread,
)
from xlayer_systems.bypass.report import RECONSTRUCTION, TASK, BypassReport, stage_of
from xlayer_systems.bypass.task import (
    ADAPTER_FILE,
    BypassLanguageModel,
    block_losses,
    build_adapter,
    compare,
    load_adapter,
)
from xlayer_systems.data.blocks import IGNORED, DecoderData, LanguageModelingData
from xlayer_systems.data.text import STDLIB, load_text
from xlayer_systems.errors import UserError
from xlayer_systems.hf.causal_lm import DecoderModel
from xlayer_systems.hf.decoders import SENDER, fingerprint_decoder, load_decoder, load_tokenizer
from xlayer_systems.reporting.tables import Records
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import ALL_OR_NONE, PLAIN, Part
from xlayer_systems.training.directory import Record, RunDirectory
from xlayer_systems.training.model import TrainingModel

LOG = logging.getLogger(__name__)
SENDER_LATENT = 80  # half its width
VARIANTS = ("full", "offset")
LORA = "lora"
BASE = "model alone"


class BypassSystem(BypassReport):
    """Trains a bypass beside the frozen model alone and a LoRA of the same size."""

    name = "bypass"
    summary = "hidden states of all layers come back as biases of a frozen language model"
    preset_help = "plain, lora, full or offset"
    dataset_help = "stdlib-lm, a hub name or a folder, as for hyper_lm"
    backbone_help = "a causal language model, a name or a folder"
    default_preset = "full"
    default_dataset = STDLIB
    default_backbone = SENDER
    usage_title = "the projectors of the layers"
    flags: ClassVar[Mapping[str, str]] = {"baselines": "compare"}
    flag_words: ClassVar[Mapping[str, Mapping[str, str]]] = {"baselines": ALL_OR_NONE}
    sweep_defaults: ClassVar[Mapping[str, str]] = {"compare": "false"}

    def presets(self) -> Sequence[str]:
        return (PLAIN, LORA, *VARIANTS)

    def config(self, preset: str, backbone: str) -> BypassConfig | AdapterConfig | None:
        if preset not in self.presets():
            raise UserError(f"unknown preset {preset!r}; expected one of {', '.join(self.presets())}")
        if preset == PLAIN:
            return None
        made: BypassConfig | AdapterConfig = (
            AdapterConfig() if preset == LORA else BypassConfig(variant="full" if preset == "full" else "offset")
        )
        latent = SENDER_LATENT if backbone == SENDER else made.latent
        return dataclasses.replace(made, model=backbone, latent=latent)

    def options(self, preset: str, dataset: str, backbone: str, quick: bool) -> BypassOptions:
        options = BypassOptions()
        if backbone == SENDER:
            # The default rates are for models of thirty layers, with thirty times the inputs to the encoder.
            options = dataclasses.replace(options, learning_rate=1e-3, reconstruct_rate=1e-2, lora_rate=5e-3)
        if backbone == SENDER or quick:
            options = dataclasses.replace(options, max_length=128)
        if quick:
            options = dataclasses.replace(
                options, max_steps=200, reconstruct_steps=250, eval_every=50, eval_blocks=64, compare_blocks=256
            )
        return options

    def check_backbone(self, backbone: str) -> None:
        load_tokenizer(backbone)

    def fingerprint(self, backbone: str) -> str:
        return fingerprint_decoder(backbone)

    def prepare(self, spec: RunSpec, whole: bool = False) -> LanguageModelingData | ReconstructionData:
        text = self._text(spec, whole)
        if stage_of(spec) != "reconstruct":
            return text
        return ReconstructionData(text, _layers(spec.backbone))

    def _text(self, spec: RunSpec, whole: bool = False) -> LanguageModelingData:
        options = spec.options
        if spec.config is not None and spec.config.model != spec.backbone:
            raise UserError(f"the model is named by --backbone, got {spec.backbone!r} there and {spec.config.model!r}")
        return _prepare(spec.dataset, spec.backbone, options.max_length, None if whole else options.eval_blocks)

    def load_backbone(self, backbone: str) -> Any:
        return load_decoder(backbone)[0]

    def build(self, backbone: Any, config: Any, data: Any, options: BypassOptions) -> TrainingModel:
        if isinstance(config, AdapterConfig):
            return DecoderModel(build_adapter(backbone, config))
        bypass = attach(backbone, config)
        if config.encoder is None:
            text = data.text if isinstance(data, ReconstructionData) else data
            blocks = spread(list(text.train), options.calibration_tokens)
            LOG.info("statistics of %d tokens", len(blocks) * text.length)
            bypass.calibrate(inputs_of(text, blocks, bypass.mean.device))
        return Reconstruction(backbone, bypass) if not bypass.injects else BypassLanguageModel(backbone, bypass)

    def parameter_groups(self, model: Any, options: BypassOptions) -> list[dict[str, Any]]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return [{"params": trained, "lr": options.learning_rate, "weight_decay": options.weight_decay}]

    def save(self, model: Any, data: Any, folder: Path) -> None:
        (model.bypass if isinstance(model, FrozenModel) else model.decoder).save_pretrained(str(folder))

    def load(self, folder: Path, backbone: Any) -> nn.Module:
        if (folder / CONFIG_FILE).exists():
            bypass = Bypass.from_pretrained(backbone, folder)
            return BypassLanguageModel(backbone, bypass) if bypass.injects else Reconstruction(backbone, bypass)
        return DecoderModel(load_adapter(backbone, folder) if (folder / ADAPTER_FILE).exists() else backbone)

    def plot_usage(self, evaluations: Records, path: Path) -> bool:
        return plot_projectors(evaluations, path)

    def post_train(self, spec: RunSpec, data: Any, model: Any) -> Record:
        """Measures, after stage 1, the principal components that it is compared with."""
        if stage_of(spec) != "reconstruct":
            return {}
        return {"pca": principal_r2(model.bypass, data.text, spec.options.pca_tokens), "latent": spec.config.latent}

    def has_own_training(self, spec: RunSpec) -> bool:
        return stage_of(spec) != "both"

    def parts(self, spec: RunSpec, path: Path) -> dict[str, RunSpec]:
        config, options, parts = spec.config, spec.options, {}
        if stage_of(spec) != "both":
            return {}
        as_lora = dataclasses.replace(options, learning_rate=options.lora_rate)
        if isinstance(config, AdapterConfig):
            parts[TASK] = dataclasses.replace(spec, config=dataclasses.replace(config, stage="task"), options=as_lora)
        if isinstance(config, BypassConfig):
            encoder = config.encoder
            if encoder is None:
                encoder = str(path / RECONSTRUCTION / "model")
                steps, rate = options.reconstruct_steps, options.reconstruct_rate
                parts[RECONSTRUCTION] = dataclasses.replace(
                    spec,
                    config=dataclasses.replace(config, stage="reconstruct"),
                    options=dataclasses.replace(options, max_steps=steps, learning_rate=rate),
                )
            parts[TASK] = dataclasses.replace(spec, config=dataclasses.replace(config, stage="task", encoder=encoder))
            if options.compare:
                adapter = AdapterConfig(config.model, config.latent, stage="task")
                parts[LORA] = dataclasses.replace(spec, preset=LORA, config=adapter, options=as_lora)
        return parts

    def profiled(self, spec: RunSpec) -> RunSpec:
        """Returns the task of a run of both stages."""
        if self.has_own_training(spec):
            return spec
        if spec.config is None:
            raise UserError(f"{spec.system} {spec.preset} trains nothing; choose another --preset")
        return dataclasses.replace(spec, config=dataclasses.replace(spec.config, stage="task"))

    def combine(self, spec: RunSpec, data: Any, parts: Mapping[str, Part], run: RunDirectory, device: Any) -> Record:
        """Compares every model's loss on the same blocks, and joins records and model of the parts in the run's."""
        if self.has_own_training(spec):
            return {}
        result = self._compare(spec, parts, device)
        _join(parts, run)
        return result

    def _compare(self, spec: RunSpec, parts: Mapping[str, Part], device: Any) -> Record:
        options = dataclasses.replace(spec.options, eval_blocks=spec.options.compare_blocks)
        data = self._text(dataclasses.replace(spec, options=options))
        base = DecoderModel(self.load_backbone(spec.backbone))
        LOG.info("loss of the model alone on %d blocks", len(data.validation))
        losses = {BASE: block_losses(base, data, device)}
        trained = {}
        for name, part in parts.items():
            if name != RECONSTRUCTION:
                label = part.spec.preset
                model = self.load_trained(part.spec, part.path)
                trained[label] = _trained(part.spec, model)
                LOG.info("loss of %s on %d blocks", label, len(data.validation))
                losses[label] = block_losses(model, data, device)
        compared = compare(losses, BASE)
        compared |= {"blocks": len(data.validation), "base_parameters": sum(p.numel() for p in base.parameters())}
        for label, count in trained.items():
            compared["rows"][label]["parameters"] = count
        mine = fmean(losses[BASE if spec.preset == PLAIN else spec.preset])
        result: Record = {
            "loss": mine,
            "perplexity": math.exp(min(mine, 700.0)),
            "validation_tokens": int((torch.stack(list(data.validation))[:, 1:] != IGNORED).sum()),
            "tokens_per_step": spec.options.batch_size * spec.options.max_length,
            "compared": compared,
            "parameters": trained.get(spec.preset, 0),
        }
        if RECONSTRUCTION in parts:
            names = ("r2", "r2_mean", "pca", "latent", "parameters")
            result[RECONSTRUCTION] = {name: parts[RECONSTRUCTION].result[name] for name in names}
        return result


def _trained(part: RunSpec, model: Any) -> int:
    """Counts the parameters that the part trained, of its loaded and frozen model."""
    if isinstance(part.config, BypassConfig):
        return int(model.bypass.projectors.numel())
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def _join(parts: Mapping[str, Part], run: RunDirectory) -> None:
    """Writes the records of the parts as one file, and the model of the task as the run's."""
    (run.path / "metrics.jsonl").unlink(missing_ok=True)
    for name, part in parts.items():
        for record in RunDirectory(part.path).metrics():
            run.log({**record, "stage": name})
    model = run.path / "model"
    shutil.rmtree(model, ignore_errors=True)
    if TASK in parts:
        shutil.copytree(parts[TASK].path / "model", model)
    else:
        model.mkdir()


@lru_cache(maxsize=2)
def _prepare(dataset: str, model: str, length: int, eval_blocks: int | None) -> LanguageModelingData:
    return DecoderData(load_text(dataset), load_decoder(model)[1], length, eval_blocks)


@lru_cache(maxsize=2)
def _layers(model: str) -> int:
    return int(load_decoder(model)[0].config.num_hidden_layers)
