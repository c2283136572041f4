"""Trains a language model with residual or hyper-connections from random parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from xlayer_systems.data.blocks import LanguageModelingData
from xlayer_systems.data.text import STDLIB, load_text
from xlayer_systems.errors import UserError
from xlayer_systems.hf.tokenizer import SPECIAL_TOKENS, train_tokenizer
from xlayer_systems.hyper_lm.config import RESIDUALS, SIZES, sized
from xlayer_systems.hyper_lm.model import HyperTransformer
from xlayer_systems.hyper_lm.plots import plot_layers
from xlayer_systems.hyper_lm.report import LanguageModelReport
from xlayer_systems.hyper_lm.training_model import LanguageModel
from xlayer_systems.reporting.tables import Records
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.training.model import TrainingModel
from xlayer_systems.training.options import LanguageModelOptions

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


class HyperLMSystem(LanguageModelReport):
    """Trains language models with residual or hyper-connections; a backbone is a size by name."""

    name = "hyper_lm"
    summary = "a hyper-connected language model"
    preset_help = "plain, shc, dhc or mhc"
    dataset_help = (
        "stdlib-lm, wikitext/wikitext-2-raw-v1 or another hub name, a folder of .txt files, or one with a train and a "
        "validation file"
    )
    backbone_help = "the size of the model: tiny, small, base or large"
    default_preset = "dhc"
    default_dataset = STDLIB
    default_backbone = "tiny"
    flags: ClassVar[Mapping[str, str]] = {"streams": "expansion_rate"}
    usage_title = "gradients and inputs of the layers"

    def presets(self) -> Sequence[str]:
        return RESIDUALS

    def config(self, preset: str, backbone: str) -> Any:
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

    def prepare(self, spec: RunSpec, whole: bool = False) -> LanguageModelingData:
        vocabulary, options = spec.config.vocab_size, spec.options
        if vocabulary < SMALLEST_VOCABULARY:
            raise UserError(f"vocab_size must be at least {SMALLEST_VOCABULARY} (every byte), got {vocabulary}")
        return _prepare(spec.dataset, vocabulary, options.max_length, None if whole else options.eval_blocks)

    def build(self, backbone: Any, config: Any, data: Any, options: LanguageModelOptions) -> TrainingModel:
        return LanguageModel(HyperTransformer.from_config(dataclasses.replace(config, vocab_size=len(data.tokenizer))))

    def parameter_groups(self, model: Any, options: LanguageModelOptions) -> list[dict[str, Any]]:
        groups = model.model.parameter_groups(options.learning_rate, options.weight_decay)
        return [{**group, "betas": (0.9, options.beta2)} for group in groups]

    def save(self, model: Any, data: Any, folder: Path) -> None:
        model.model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)

    def load(self, folder: Path, backbone: Any) -> nn.Module:
        return LanguageModel(HyperTransformer.from_pretrained(folder))

    def plot_usage(self, evaluations: Records, path: Path) -> bool:
        history = [record for record in evaluations if "gradient_norms" in record]
        if history:
            plot_layers(history, path)
        return bool(history)


@lru_cache(maxsize=2)
def _prepare(dataset: str, vocabulary: int, length: int, eval_blocks: int | None) -> LanguageModelingData:
    corpus = load_text(dataset)
    tokenizer = train_tokenizer(corpus.train, vocabulary, length, keep_text=True)
    return LanguageModelingData(corpus, tokenizer, length, eval_blocks)
