"""What distinguishes the systems for the shared loop: presets, defaults, model and plots. One recipe per system."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from xlayer_systems import backbones
from xlayer_systems.errors import UserError
from xlayer_systems.options import TrainOptions

PLAIN = "plain"


class Recipe(Protocol):
    """A trainable system."""

    def presets(self) -> Sequence[str]:
        """Ids of the presets, `PLAIN` (the backbone alone) among them."""

    def config(self, preset: str) -> Any:
        """The system's config dataclass for a preset; None for `PLAIN`."""

    def options(self, preset: str, dataset: str, backbone: str, quick: bool) -> TrainOptions:
        """Default training options."""

    def build(self, backbone: nn.Module, config: Any, labels: int, options: TrainOptions) -> nn.Module:
        """The model to train."""

    def parameter_groups(self, model: Any, options: TrainOptions) -> list[dict[str, Any]]:
        """Groups for AdamW."""

    def save(self, model: Any, folder: Path) -> None:
        """Write everything that `load` needs beside the backbone's architecture."""

    def load(self, folder: Path, backbone: nn.Module) -> nn.Module:
        """The inverse of `save`."""

    def plot(self, records: Sequence[Mapping[str, Any]], path: Path) -> bool:
        """Draw the usage metrics in ``records`` (one per epoch); False when there are none."""


class XLRBRecipe:
    """Cross-layer routing bridges on an encoder, for classification."""

    def presets(self) -> Sequence[str]:
        from xlayer_systems.xlrb import PRESETS

        return (PLAIN, *PRESETS)

    def config(self, preset: str) -> Any:
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
        if backbones.is_small(backbone) or quick:
            # The published rates are for 355 M pretrained parameters.
            options = dataclasses.replace(options, batch_size=32, encoder_lr=5e-4, head_lr=1e-3, stop_below=None)
        if backbone == backbones.SMALL_SCRATCH:
            options = dataclasses.replace(options, encoder_lr=1e-3)
        if quick:
            options = dataclasses.replace(options, epochs=3, max_length=64)
        return options

    def build(self, backbone: nn.Module, config: Any, labels: int, options: TrainOptions) -> nn.Module:
        from xlayer_systems.xlrb import XLRBClassifier

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

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder, include_encoder=True)

    def load(self, folder: Path, backbone: nn.Module) -> nn.Module:
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


RECIPES: dict[str, Recipe] = {"xlrb": XLRBRecipe()}


def get_recipe(system: str) -> Recipe:
    """The recipe of a system; an unknown name raises `UserError`."""
    if system not in RECIPES:
        raise UserError(f"unknown system {system!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[system]
