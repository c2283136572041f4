"""Trains an encoder with cross-layer routing bridges to classify."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from xlayer_systems.data import load_task
from xlayer_systems.data.batches import ClassificationData
from xlayer_systems.errors import UserError
from xlayer_systems.hf import encoders
from xlayer_systems.reporting.tables import Records
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import PLAIN
from xlayer_systems.training.model import TrainingModel
from xlayer_systems.training.options import TrainOptions
from xlayer_systems.xlrb.classifier import XLRBClassifier
from xlayer_systems.xlrb.presets import PRESETS, PUBLISHED_ACCURACY
from xlayer_systems.xlrb.report import ClassificationReport
from xlayer_systems.xlrb.usage import plot_usage


class XLRBSystem(ClassificationReport):
    """Trains cross-layer routing bridges on an encoder, for classification."""

    name = "xlrb"
    summary = "routing bridges in an encoder"
    preset_help = "plain (the backbone alone), H1 to H30, A1 to A20"
    dataset_help = "stdlib-topics, stdlib-pairs, glue/rte or another hub name, or a local folder"
    backbone_help = "small (shipped), small-scratch, a Hugging Face name such as roberta-large, or a folder"
    default_preset = "H9"
    default_dataset = "stdlib-topics"
    default_backbone = encoders.SMALL
    usage_title = "gates, messages and routing"
    published_on = "RoBERTa-large on GLUE RTE, the best epoch of one seed (plain about 86.6 %, majority 52.7 %)"

    def published(self, preset: str) -> float | None:
        return PUBLISHED_ACCURACY.get(preset)

    def presets(self) -> Sequence[str]:
        return (PLAIN, *PRESETS)

    def config(self, preset: str, backbone: str) -> Any:
        if preset != PLAIN and preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}; expected {PLAIN}, H1 to H30 or A1 to A20")
        return None if preset == PLAIN else PRESETS[preset]

    def options(self, preset: str, dataset: str, backbone: str, quick: bool) -> TrainOptions:
        # As published; the stop rule is about RTE.
        is_hybrid = preset.startswith("A")
        options = TrainOptions(epochs=5 if is_hybrid else 3)
        if is_hybrid and dataset == "glue/rte":
            options = dataclasses.replace(options, stop_below=0.70)
        if encoders.is_small(backbone) or quick:
            # The published rates are for 355 M pretrained parameters.
            options = dataclasses.replace(options, batch_size=32, encoder_lr=5e-4, head_lr=1e-3, stop_below=None)
        if backbone == encoders.SMALL_SCRATCH:
            options = dataclasses.replace(options, encoder_lr=1e-3)
        if quick:
            options = dataclasses.replace(options, epochs=3, max_length=64)
        return options

    def check_backbone(self, backbone: str) -> None:
        encoders.load_tokenizer(backbone)

    def fingerprint(self, backbone: str) -> str:
        return encoders.fingerprint(backbone)

    def prepare(self, spec: RunSpec, whole: bool = False) -> ClassificationData:
        data = _prepare(spec.dataset, spec.backbone, spec.options.max_length)
        if spec.config is not None and spec.config.needs_pairs and not data.task.has_pairs:
            raise UserError(
                f"preset {spec.preset} reads sentence pairs, and {spec.dataset} has single texts; "
                "expected a data set such as stdlib-pairs or glue/rte"
            )
        return data

    def load_backbone(self, backbone: str) -> Any:
        return encoders.load_backbone(backbone)

    def build(self, backbone: Any, config: Any, data: Any, options: TrainOptions) -> TrainingModel:
        labels = len(data.task.labels)
        return XLRBClassifier(
            backbone, config, labels, label_smoothing=options.label_smoothing, dropout=options.head_dropout
        )

    def parameter_groups(self, model: Any, options: TrainOptions) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = model.parameter_groups(
            options.encoder_lr, options.head_lr, options.bridge_lr, options.weight_decay
        )
        return groups

    def save(self, model: Any, data: Any, folder: Path) -> None:
        model.save_pretrained(folder, include_encoder=True)

    def load(self, folder: Path, backbone: Any) -> nn.Module:
        return XLRBClassifier.from_pretrained(folder, backbone)

    def plot_usage(self, evaluations: Records, path: Path) -> bool:
        history = [record["usage"] for record in evaluations if record.get("usage", {}).get("layers")]
        if history:
            plot_usage(history, path)
        return bool(history)


@lru_cache(maxsize=2)
def _prepare(dataset: str, backbone: str, max_length: int) -> ClassificationData:
    task = load_task(dataset)
    tokenizer = encoders.load_tokenizer(backbone)
    return ClassificationData(task, tokenizer, min(max_length, tokenizer.model_max_length))
