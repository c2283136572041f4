"""How telepathy is trained by the shared loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xlayer_systems.errors import UserError
from xlayer_systems.hf.decoders import RECEIVER, SENDER, fingerprint_decoder
from xlayer_systems.runs.system import Objective
from xlayer_systems.telepathy.config import TelepathyOptions
from xlayer_systems.telepathy.plots import plot_bridges
from xlayer_systems.telepathy.report import Telepathy, evaluations

CALIBRATION_BATCH = 50


class TelepathyRecipe:
    """A bridge between two frozen language models; a backbone is their names, ``SENDER,RECEIVER``."""

    objective: Objective = Telepathy()
    default_preset = "classification"
    default_dataset = "stdlib-topics"
    default_backbone = f"{SENDER},{RECEIVER}"
    usage_title = "accuracy, likeness of the messages and codes in use"
    sweep_defaults: Mapping[str, str] = {"baselines": "false"}

    def presets(self) -> Sequence[str]:
        from xlayer_systems.telepathy.presets import PRESETS

        return tuple(PRESETS)

    def config(self, preset: str, backbone: str) -> Any:
        from xlayer_systems.telepathy.presets import preset as find

        sender, receiver = split_pair(backbone)
        return dataclasses.replace(find(preset), sender=sender, receiver=receiver)

    def options(self, preset: str, dataset: str, backbone: str, quick: bool) -> TelepathyOptions:
        options = TelepathyOptions()
        if backbone == self.default_backbone:
            # The report's rate is for bridges thirty times as wide.
            options = dataclasses.replace(options, learning_rate=2e-3, batch_size=32, max_length=64)
        if quick:
            options = dataclasses.replace(
                options, batch_size=32, max_length=64, max_steps=600, eval_every=None, keep_states=True
            )
        return options

    def fingerprint(self, backbone: str) -> str:
        return ",".join(fingerprint_decoder(name) for name in split_pair(backbone))

    def load_backbone(self, backbone: str) -> Any:
        from xlayer_systems.telepathy.model import Pair

        return Pair.load(*split_pair(backbone))

    def build(self, backbone: Any, config: Any, data: Any, options: TelepathyOptions) -> nn.Module:
        from xlayer_systems.telepathy.model import TelepathyModel

        longest = data.longest if options.max_new_tokens is None else options.max_new_tokens
        model = TelepathyModel.build(backbone, config, longest)
        if options.keep_states:
            device = next(model.sender.parameters()).device
            data.keep_states(lambda ids, mask: model.encode(ids.to(device), mask.to(device)), model.layer)
        # Evenly spaced, so that the statistics do not depend on the seed.
        step = max(1, len(data.train) // config.calibration_examples)
        chosen = data.train[::step][: config.calibration_examples]
        model.bridge.calibrate(_states(model, data, chosen), model.receiver.get_input_embeddings().weight)
        return model

    def parameter_groups(self, model: Any, options: TelepathyOptions) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim > 1 and "codebook" not in name]
        others = [p for name, p in named if p.ndim <= 1 or "codebook" in name]
        groups = [
            {"params": matrices, "lr": options.learning_rate, "weight_decay": options.weight_decay},
            {"params": others, "lr": options.learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def save(self, model: Any, data: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, folder: Path, backbone: Any) -> nn.Module:
        from xlayer_systems.telepathy.model import TelepathyModel

        return TelepathyModel.from_pretrained(folder, backbone)

    def plot(self, records: Sequence[Mapping[str, Any]], path: Path) -> bool:
        return plot_bridges({"": [evaluations(records)]}, path)


def split_pair(backbone: str) -> tuple[str, str]:
    """``"SENDER,RECEIVER"`` as two names."""
    names = [name.strip() for name in backbone.split(",")]
    if len(names) != 2 or not all(names):
        raise UserError(f"telepathy needs two models, SENDER,RECEIVER; got {backbone!r}")
    return names[0], names[1]


def _states(model: Any, data: Any, examples: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.sender.parameters()).device
    for start in range(0, len(examples), CALIBRATION_BATCH):
        batch = data.collate(examples[start : start + CALIBRATION_BATCH])
        mask = batch["attention_mask"].to(device)
        with torch.no_grad():
            yield model.encode(batch["input_ids"].to(device), mask), mask.bool()
