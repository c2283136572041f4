"""Trains a side path over the layers of a causal language model to use tools."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from xlayer_systems.data.text import load_text
from xlayer_systems.data.tools import NAME, load_tool_task
from xlayer_systems.errors import UserError
from xlayer_systems.hf.decoders import SENDER, fingerprint_decoder, load_decoder, load_tokenizer
from xlayer_systems.lformer.config import PRESETS, LFormerOptions, ModelConfig
from xlayer_systems.lformer.data import ToolData
from xlayer_systems.lformer.model import LFormer
from xlayer_systems.lformer.path import count
from xlayer_systems.lformer.plots import plot_paths
from xlayer_systems.lformer.report import KEPT, ToolUseReport, measured
from xlayer_systems.lformer.training_model import LFormerForTraining
from xlayer_systems.reporting.tables import Records, evaluations_of
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import ALL_OR_NONE, Part
from xlayer_systems.training.directory import Record, RunDirectory
from xlayer_systems.training.model import TrainingModel
from xlayer_systems.training.optim import decay_groups
from xlayer_systems.training.trainer import evaluate_alone

LOG = logging.getLogger(__name__)
HEAD_ONLY = "head_only"  # the preset without a side path, and the folder of its run
BASELINE_KEYS = {"accuracy", "plan", *KEPT, "path_parameters", "seconds"} - {"usage"}


class LFormerSystem(ToolUseReport):
    """Trains a side path over a causal language model that learns to use tools."""

    name = "lformer"
    summary = "a side path over a language model's layers learns to use tools"
    preset_help = "ema, gru, attn, or head_only, the baseline without a side path"
    dataset_help = "tools, or a folder or hub name with columns text and tool, and perhaps value and plan"
    backbone_help = "a causal language model, a name or a folder"
    default_preset = "ema"
    default_dataset = NAME
    default_backbone = SENDER
    usage_title = "accuracy, gates, and where the state moves"
    flags: ClassVar[Mapping[str, str]] = {"baselines": "baseline"}
    flag_words: ClassVar[Mapping[str, Mapping[str, str]]] = {"baselines": ALL_OR_NONE}
    sweep_defaults: ClassVar[Mapping[str, str]] = {"baseline": "false"}

    def presets(self) -> Sequence[str]:
        return PRESETS

    def config(self, preset: str, backbone: str) -> ModelConfig:
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}; expected one of {', '.join(PRESETS)}")
        width = 64 if backbone == SENDER else 128
        return ModelConfig(
            aggregator=preset, side_size=width, pooling="attention", plan_decoder=True, last_k_unfreeze=2
        )

    def options(self, preset: str, dataset: str, backbone: str, quick: bool) -> LFormerOptions:
        options = LFormerOptions()
        if backbone == SENDER:
            options = dataclasses.replace(options, learning_rate=3e-3, base_lr=1e-3, max_length=64, lm_length=128)
        if quick:
            options = dataclasses.replace(options, max_steps=900, phase_a_steps=500, eval_every=125, eval_batch_size=80)
        return options

    def check_backbone(self, backbone: str) -> None:
        load_tokenizer(backbone)

    def fingerprint(self, backbone: str) -> str:
        return fingerprint_decoder(backbone)

    def prepare(self, spec: RunSpec, whole: bool = False) -> ToolData:
        options = spec.options
        limit = None if whole else options.eval_examples
        return _prepare(spec.dataset, options.lm_dataset, spec.backbone, options.max_length, options.lm_length, limit)

    def load_backbone(self, backbone: str) -> Any:
        return load_decoder(backbone)[0]

    def build(self, backbone: Any, config: ModelConfig, data: Any, options: LFormerOptions) -> TrainingModel:
        task = data.task
        fitted = dataclasses.replace(
            config,
            num_tools=len(task.tools),
            num_steps=len(task.steps),
            plan_length=data.plan_length,
            plan_decoder=config.plan_decoder and data.has_plans,
            use_value_head=config.use_value_head and len(data.values) > 1,
            use_tool_head=True,
        )
        model = LFormer(fitted, backbone)
        if len(data.values) > 1:
            model.heads.calibrate(data.values)
        return LFormerForTraining(model, options.phase_a_steps)

    def parameter_groups(self, model: Any, options: LFormerOptions) -> list[dict[str, Any]]:
        unfrozen = model.model.unfrozen()
        kept = {id(parameter) for parameter in unfrozen}
        own = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
        base = [("", parameter) for parameter in unfrozen]
        groups = decay_groups(own, options.learning_rate, options.weight_decay)
        return [*groups, *decay_groups(base, options.base_lr, options.weight_decay)]

    def save(self, model: Any, data: Any, folder: Path) -> None:
        model.model.save_pretrained(folder)

    def load(self, folder: Path, backbone: Any) -> nn.Module:
        return LFormerForTraining(LFormer.from_pretrained(folder, backbone), 0)

    def plot_usage(self, evaluations: Records, path: Path) -> bool:
        return plot_paths({"": [evaluations]}, path)

    def post_train(self, spec: RunSpec, data: ToolData, model: LFormerForTraining) -> Record:
        return {"path_parameters": count(model.model.path)}

    def parts(self, spec: RunSpec, path: Path) -> dict[str, RunSpec]:
        """Returns the baseline of equal parameters, on the same batches, where the options ask for it."""
        config = spec.config
        if not spec.options.baseline or config.aggregator == HEAD_ONLY:
            return {}
        config = dataclasses.replace(
            config, aggregator=HEAD_ONLY, equal_to=config.aggregator, tree_checkpoint=0, gate_l1=0.0, gate_l2=0.0,
            blend_into_lm=False, sequence_wise=config.is_sequence_wise,
        )  # fmt: skip
        options = dataclasses.replace(spec.options, baseline=False)
        return {HEAD_ONLY: dataclasses.replace(spec, preset=HEAD_ONLY, config=config, options=options)}

    def combine(
        self, spec: RunSpec, data: ToolData, parts: Mapping[str, Part], run: RunDirectory, device: Any
    ) -> Record:
        """Returns the baseline's numbers, those at the end of phase A too, and the base's loss before any training."""
        if HEAD_ONLY not in parts:
            return {}
        part = parts[HEAD_ONLY]
        row = {key: part.result[key] for key in part.result if key in BASELINE_KEYS}
        records = RunDirectory(part.path).metrics()
        phase_a = [r for r in evaluations_of(records) if r["step"] == spec.options.phase_a_steps]
        if phase_a:
            row["phase_a"] = {key: value for key, value in measured(phase_a[-1]).items() if key in BASELINE_KEYS}
        LOG.info("loss of the base before training")
        base = self.build(self.load_backbone(spec.backbone), part.spec.config, data, spec.options).to(device)
        base_lm_loss = evaluate_alone(base, data, spec.options.eval_batch_size)["lm_loss"]
        return {"baseline": row, "base_lm_loss": base_lm_loss}


@lru_cache(maxsize=2)
def _prepare(
    dataset: str, corpus: str, backbone: str, max_length: int, lm_length: int, eval_examples: int | None
) -> ToolData:
    task, tokenizer = load_tool_task(dataset), load_decoder(backbone)[1]
    return ToolData(task, load_text(corpus), tokenizer, max_length, lm_length, eval_examples)
