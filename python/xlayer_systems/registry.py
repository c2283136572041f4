"""What distinguishes the systems for the shared loop: presets, defaults, model and plots. One recipe per system."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from xlayer_systems.bypass.system import BypassRecipe
from xlayer_systems.data.text import STDLIB
from xlayer_systems.errors import UserError
from xlayer_systems.hf import encoders
from xlayer_systems.hyper_lm.report import LanguageModeling
from xlayer_systems.lformer.system import LFormerRecipe
from xlayer_systems.runs.system import Objective
from xlayer_systems.telepathy.system import TelepathyRecipe
from xlayer_systems.training.options import LanguageModelOptions, TrainOptions
from xlayer_systems.xlrb.report import Classification

PLAIN = "plain"


class Recipe(Protocol):
    """A trainable system: how it is trained (its `Objective`), from what, and its defaults."""

    objective: Objective
    default_preset: str
    default_dataset: str
    default_backbone: str
    usage_title: str  # of what `plot` draws
    sweep_defaults: Mapping[str, str]  # overrides that a sweep begins with

    def presets(self) -> Sequence[str]:
        """Ids of the presets, `PLAIN` (without what the system adds) among them."""

    def config(self, preset: str, backbone: str) -> Any:
        """The system's config dataclass for a preset; None for a backbone alone."""

    def options(self, preset: str, dataset: str, backbone: str, quick: bool) -> Any:
        """Default training options, a `LoopOptions`."""

    def fingerprint(self, backbone: str) -> str:
        """Identifies the weights that a run starts from."""

    def load_backbone(self, backbone: str) -> Any:
        """What `build` starts from."""

    def build(self, backbone: Any, config: Any, data: Any, options: Any) -> nn.Module:
        """The model to train."""

    def parameter_groups(self, model: Any, options: Any) -> list[dict[str, Any]]:
        """Groups for AdamW."""

    def save(self, model: Any, data: Any, folder: Path) -> None:
        """Write everything that `load` needs beside the backbone's architecture."""

    def load(self, folder: Path, backbone: Any) -> nn.Module:
        """The inverse of `save`."""

    def plot(self, records: Sequence[Mapping[str, Any]], path: Path) -> bool:
        """Draw the usage metrics in ``records`` (one per evaluation); False when there are none."""


class XLRBRecipe:
    """Cross-layer routing bridges on an encoder, for classification."""

    objective: Objective = Classification()
    default_preset = "H9"
    default_dataset = "stdlib-topics"
    default_backbone = encoders.SMALL
    usage_title = "gates, messages and routing"
    sweep_defaults: Mapping[str, str] = {}

    def presets(self) -> Sequence[str]:
        from xlayer_systems.xlrb import PRESETS

        return (PLAIN, *PRESETS)

    def config(self, preset: str, backbone: str) -> Any:
        from xlayer_systems.xlrb import PRESETS

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

    def fingerprint(self, backbone: str) -> str:
        return encoders.fingerprint(backbone)

    def load_backbone(self, backbone: str) -> Any:
        return encoders.load_backbone(backbone)

    def build(self, backbone: Any, config: Any, data: Any, options: TrainOptions) -> nn.Module:
        from xlayer_systems.xlrb import XLRBClassifier

        labels = len(data.task.labels)
        try:
            return XLRBClassifier(
                backbone, config, labels, label_smoothing=options.label_smoothing, dropout=options.head_dropout
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    def parameter_groups(self, model: Any, options: TrainOptions) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = model.parameter_groups(
            options.encoder_lr, options.head_lr, options.bridge_lr, options.weight_decay
        )
        return groups

    def save(self, model: Any, data: Any, folder: Path) -> None:
        model.save_pretrained(folder, include_encoder=True)

    def load(self, folder: Path, backbone: Any) -> nn.Module:
        from xlayer_systems.xlrb import XLRBClassifier

        try:
            return XLRBClassifier.from_pretrained(folder, backbone)
        except ValueError as error:
            raise UserError(str(error)) from error

    def plot(self, records: Sequence[Mapping[str, Any]], path: Path) -> bool:
        from xlayer_systems.xlrb import plot_usage

        history = [record["usage"] for record in records if record.get("usage", {}).get("layers")]
        if history:
            plot_usage(history, path)
        return bool(history)


class HyperLMRecipe:
    """Language models with residual or hyper-connections, from random parameters; a backbone is a size by name."""

    objective: Objective = LanguageModeling()
    default_preset = "dhc"
    default_dataset = STDLIB
    default_backbone = "tiny"
    usage_title = "gradients and inputs of the layers"
    sweep_defaults: Mapping[str, str] = {}

    def presets(self) -> Sequence[str]:
        from xlayer_systems.hyper_lm import RESIDUALS

        return RESIDUALS

    def config(self, preset: str, backbone: str) -> Any:
        from xlayer_systems.hyper_lm import RESIDUALS, SIZES, sized

        if preset not in RESIDUALS:
            raise UserError(f"unknown residual kind {preset!r}; expected one of {', '.join(RESIDUALS)}")
        if backbone not in SIZES:
            raise UserError(f"unknown size {backbone!r}; expected one of {', '.join(SIZES)}")
        return sized(backbone, residual=preset)

    def options(self, preset: str, dataset: str, backbone: str, quick: bool) -> LanguageModelOptions:
        options = LanguageModelOptions()
        if backbone == "tiny":
            options = dataclasses.replace(options, learning_rate=4e-3, max_length=128)
        if quick:
            options = dataclasses.replace(
                options, batch_size=8, max_length=128, max_steps=600, eval_every=30, eval_blocks=128
            )
        return options

    def fingerprint(self, backbone: str) -> str:
        return backbone

    def load_backbone(self, backbone: str) -> Any:
        return None

    def build(self, backbone: Any, config: Any, data: Any, options: LanguageModelOptions) -> nn.Module:
        from xlayer_systems.hyper_lm import HyperTransformer, LanguageModel

        return LanguageModel(HyperTransformer.from_config(dataclasses.replace(config, vocab_size=len(data.tokenizer))))

    def parameter_groups(self, model: Any, options: LanguageModelOptions) -> list[dict[str, Any]]:
        groups = model.model.parameter_groups(options.learning_rate, options.weight_decay)
        return [{**group, "betas": (0.9, options.beta2)} for group in groups]

    def save(self, model: Any, data: Any, folder: Path) -> None:
        model.model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)

    def load(self, folder: Path, backbone: Any) -> nn.Module:
        from xlayer_systems.hyper_lm import HyperTransformer, LanguageModel

        try:
            return LanguageModel(HyperTransformer.from_pretrained(folder))
        except ValueError as error:
            raise UserError(str(error)) from error

    def plot(self, records: Sequence[Mapping[str, Any]], path: Path) -> bool:
        from xlayer_systems.hyper_lm import plot_layers

        history = [record for record in records if "gradient_norms" in record]
        if history:
            plot_layers(history, path)
        return bool(history)


RECIPES: dict[str, Recipe] = {
    "xlrb": XLRBRecipe(),
    "hyper_lm": HyperLMRecipe(),
    "telepathy": TelepathyRecipe(),
    "bypass": BypassRecipe(),
    "lformer": LFormerRecipe(),
}


def get_recipe(system: str) -> Recipe:
    """The recipe of a system; an unknown name raises `UserError`."""
    if system not in RECIPES:
        raise UserError(f"unknown system {system!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[system]
