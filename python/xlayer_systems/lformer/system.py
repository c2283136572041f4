"""How an L-Former is trained by the shared loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from xlayer_systems.data.tools import NAME
from xlayer_systems.errors import UserError
from xlayer_systems.hf.decoders import SENDER, fingerprint_decoder, load_decoder
from xlayer_systems.lformer.config import PRESETS, LFormerOptions, ModelConfig
from xlayer_systems.lformer.plots import plot_paths
from xlayer_systems.lformer.report import ToolUse
from xlayer_systems.runs.system import Objective


class LFormerRecipe:
    """A side path over the layers of a causal language model that learns to use tools; a backbone is its name."""

    objective: Objective = ToolUse()
    default_preset = "ema"
    default_dataset = NAME
    default_backbone = SENDER
    usage_title = "accuracy, gates, and where the state moves"
    sweep_defaults: Mapping[str, str] = {"baseline": "false"}

    def presets(self) -> Sequence[str]:
        return PRESETS

    def config(self, preset: str, backbone: str) -> ModelConfig:
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}; expected one of {', '.join(PRESETS)}")
        width = 64 if backbone == SENDER else 128
        return ModelConfig(aggregator=preset, d_side=width, pooling="attention", plan_decoder=True, last_k_unfreeze=2)

    def options(self, preset: str, dataset: str, backbone: str, quick: bool) -> LFormerOptions:
        options = LFormerOptions()
        if backbone == SENDER:
            options = dataclasses.replace(options, learning_rate=3e-3, base_lr=1e-3, max_length=64, lm_length=128)
        if quick:
            options = dataclasses.replace(options, max_steps=900, phase_a_steps=500, eval_every=125, eval_batch_size=80)
        return options

    def fingerprint(self, backbone: str) -> str:
        return fingerprint_decoder(backbone)

    def load_backbone(self, backbone: str) -> Any:
        return load_decoder(backbone)[0]

    def build(self, backbone: Any, config: ModelConfig, data: Any, options: LFormerOptions) -> nn.Module:
        from xlayer_systems.lformer.model import LFormer
        from xlayer_systems.lformer.training_model import Trainee

        task = data.task
        fitted = dataclasses.replace(
            config,
            n_tools=len(task.tools),
            n_steps=len(task.steps),
            plan_length=data.plan_length,
            plan_decoder=config.plan_decoder and data.has_plans,
            use_value_head=config.use_value_head and len(data.values) > 1,
            use_tool_head=True,
        )
        try:
            model = LFormer(fitted, backbone)
        except ValueError as error:
            raise UserError(str(error)) from error
        if len(data.values) > 1:
            model.heads.calibrate(data.values)
        return Trainee(model, options.phase_a_steps)

    def parameter_groups(self, model: Any, options: LFormerOptions) -> list[dict[str, Any]]:
        unfrozen = model.model.unfrozen()
        kept = {id(parameter) for parameter in unfrozen}
        own = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
        groups = []
        for parameters, rate in ((own, options.learning_rate), (unfrozen, options.base_lr)):
            for is_matrix, decay in ((True, options.weight_decay), (False, 0.0)):
                chosen = [p for p in parameters if (p.ndim > 1) == is_matrix]
                if chosen:
                    groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
        return groups

    def save(self, model: Any, data: Any, folder: Path) -> None:
        model.model.save_pretrained(folder)

    def load(self, folder: Path, backbone: Any) -> nn.Module:
        from xlayer_systems.lformer.model import LFormer
        from xlayer_systems.lformer.training_model import Trainee

        try:
            return Trainee(LFormer.from_pretrained(folder, backbone), 0)
        except ValueError as error:
            raise UserError(str(error)) from error

    def plot(self, records: Sequence[Mapping[str, Any]], path: Path) -> bool:
        return plot_paths({"": [records]}, path)
