"""How a bypass is trained by the shared loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from xlayer_systems.bypass.config import BypassOptions
from xlayer_systems.bypass.plots import plot_projectors
from xlayer_systems.bypass.report import PLAIN, BypassObjective
from xlayer_systems.data.text import STDLIB
from xlayer_systems.errors import UserError
from xlayer_systems.hf.decoders import SENDER, fingerprint_decoder, load_decoder
from xlayer_systems.runs.system import Objective

if TYPE_CHECKING:
    from xlayer_systems.runs.execute import RunSpec
    from xlayer_systems.training.directory import Record

SENDER_LATENT = 80  # half its width
VARIANTS = ("full", "offset")
LORA = "lora"


class BypassRecipe:
    """A bypass on a frozen causal language model, beside the model alone and a LoRA of the same size."""

    objective: Objective = BypassObjective()
    default_preset = "full"
    default_dataset = STDLIB
    default_backbone = SENDER
    usage_title = "the projectors of the layers"
    sweep_defaults: Mapping[str, str] = {"compare": "false"}

    def presets(self) -> Sequence[str]:
        return (PLAIN, LORA, *VARIANTS)

    def config(self, preset: str, backbone: str) -> Any:
        from xlayer_systems.bypass.config import AdapterConfig, BypassConfig

        if preset not in self.presets():
            raise UserError(f"unknown preset {preset!r}; expected one of {', '.join(self.presets())}")
        if preset == PLAIN:
            return None
        made: Any = (
            AdapterConfig() if preset == LORA else BypassConfig(variant="full" if preset == "full" else "offset")
        )
        latent = SENDER_LATENT if backbone == SENDER else made.latent
        return dataclasses.replace(made, model=backbone, latent=latent)

    def options(self, preset: str, dataset: str, backbone: str, quick: bool) -> BypassOptions:
        options = BypassOptions()
        if backbone == SENDER or quick:
            # It is a tenth as wide as the models that the other rates are for.
            options = dataclasses.replace(options, reconstruct_rate=1e-2, lora_rate=5e-3, max_length=128)
        if quick:
            options = dataclasses.replace(
                options, max_steps=200, reconstruct_steps=250, eval_every=50, eval_blocks=64, compare_blocks=256
            )
        return options

    def fingerprint(self, backbone: str) -> str:
        return fingerprint_decoder(backbone)

    def load_backbone(self, backbone: str) -> Any:
        return load_decoder(backbone)[0]

    def stages(self, spec: RunSpec, path: Path, resume: bool) -> Record:
        """Train what a spec of both stages says, one run directory for each in ``path``."""
        from xlayer_systems.bypass.stages import train_stages

        return train_stages(spec, path, resume)

    def build(self, backbone: Any, config: Any, data: Any, options: BypassOptions) -> nn.Module:
        from xlayer_systems.bypass.config import AdapterConfig
        from xlayer_systems.bypass.model import attach
        from xlayer_systems.bypass.reconstruction import Reconstruction, inputs_of, spread
        from xlayer_systems.bypass.task import BypassLanguageModel, build_adapter
        from xlayer_systems.pretraining.decoder import DecoderModel

        if isinstance(config, AdapterConfig):
            return DecoderModel(build_adapter(backbone, config))
        bypass = attach(backbone, config)
        text = getattr(data, "text", data)
        if config.encoder is None:
            bypass.calibrate(inputs_of(text, spread(list(text.train), options.calibration_tokens), bypass.mean.device))
        return Reconstruction(backbone, bypass) if not bypass.injects else BypassLanguageModel(backbone, bypass)

    def parameter_groups(self, model: Any, options: BypassOptions) -> list[dict[str, Any]]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return [{"params": trained, "lr": options.learning_rate, "weight_decay": options.weight_decay}]

    def save(self, model: Any, data: Any, folder: Path) -> None:
        (model.bypass if hasattr(model, "bypass") else model.decoder).save_pretrained(str(folder))

    def load(self, folder: Path, backbone: Any) -> nn.Module:
        from xlayer_systems.bypass.model import CONFIG_FILE, Bypass
        from xlayer_systems.bypass.reconstruction import Reconstruction
        from xlayer_systems.bypass.task import ADAPTER_FILE, BypassLanguageModel, load_adapter
        from xlayer_systems.pretraining.decoder import DecoderModel

        if (folder / CONFIG_FILE).exists():
            bypass = Bypass.from_pretrained(backbone, folder)
            return BypassLanguageModel(backbone, bypass) if bypass.injects else Reconstruction(backbone, bypass)
        return DecoderModel(load_adapter(backbone, folder) if (folder / ADAPTER_FILE).exists() else backbone)

    def plot(self, records: Sequence[Mapping[str, Any]], path: Path) -> bool:
        return plot_projectors(records, path)
