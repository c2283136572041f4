"""Trains a bridge between two frozen language models."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xlayer_systems.data.answers import load_answer_task
from xlayer_systems.errors import UserError
from xlayer_systems.hf.decoders import RECEIVER, SENDER, fingerprint_decoder, load_decoder, load_tokenizer
from xlayer_systems.reporting.stats import counted
from xlayer_systems.reporting.tables import Records
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.telepathy.baselines import run_baselines
from xlayer_systems.telepathy.config import TelepathyOptions
from xlayer_systems.telepathy.data import TelepathyData
from xlayer_systems.telepathy.latency import measure_latency
from xlayer_systems.telepathy.model import Pair, TelepathyModel
from xlayer_systems.telepathy.plots import plot_bridges
from xlayer_systems.telepathy.presets import PRESETS
from xlayer_systems.telepathy.presets import preset as find_preset
from xlayer_systems.telepathy.report import TelepathyReport
from xlayer_systems.training.directory import Record
from xlayer_systems.training.model import TrainingModel
from xlayer_systems.training.optim import decay_groups, is_matrix

LOG = logging.getLogger(__name__)
MAX_TIMED = 32  # examples that latencies are the medians of
CALIBRATION_BATCH = 50


class TelepathySystem(TelepathyReport):
    """Trains a bridge between two frozen language models; a backbone is ``SENDER,RECEIVER``."""

    name = "telepathy"
    summary = "a frozen language model speaks to another"
    preset_help = "classification, or a phase of the report, v1 to v15"
    dataset_help = (
        "stdlib-topics, passkey, arithmetic, glue/sst2, ag_news, trec, banking77, gsm8k, boolq, piqa, commonsense_qa "
        "or another classification data set"
    )
    backbone_help = "SENDER,RECEIVER: two causal language models, names or folders"
    default_preset = "classification"
    default_dataset = "stdlib-topics"
    default_backbone = f"{SENDER},{RECEIVER}"
    flags: ClassVar[Mapping[str, str]] = {
        "bridge": "bridge",
        "soft-tokens": "soft_tokens",
        "baselines": "baselines",
    }
    swept_flags = ("bridge", "soft-tokens")
    usage_title = "accuracy, likeness of the messages and codes in use"
    sweep_defaults: ClassVar[Mapping[str, str]] = {"baselines": "none"}

    def presets(self) -> Sequence[str]:
        return tuple(PRESETS)

    def config(self, preset: str, backbone: str) -> Any:
        sender, receiver = split_pair(backbone)
        return dataclasses.replace(find_preset(preset), sender=sender, receiver=receiver)

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

    def check_backbone(self, backbone: str) -> None:
        for name in split_pair(backbone):
            load_tokenizer(name)

    def fingerprint(self, backbone: str) -> str:
        return ",".join(fingerprint_decoder(name) for name in split_pair(backbone))

    def prepare(self, spec: RunSpec, whole: bool = False) -> TelepathyData:
        options, config = spec.options, spec.config
        limit = None if whole else options.eval_examples
        return _prepare(spec.dataset, config.sender, config.receiver, options.max_length, config.target, limit)

    def upgrade(self, stored: Mapping[str, Any]) -> Mapping[str, Any]:
        """Translates the option ``baselines``, which was true or false."""
        options = stored.get("options")
        if isinstance(options, Mapping) and isinstance(options.get("baselines"), bool):
            named = "all" if options["baselines"] else "none"
            stored = {**stored, "options": {**options, "baselines": named}}
        return stored

    def load_backbone(self, backbone: str) -> Any:
        return Pair.load(*split_pair(backbone))

    def build(self, backbone: Any, config: Any, data: Any, options: TelepathyOptions) -> TrainingModel:
        longest = data.longest if options.max_new_tokens is None else options.max_new_tokens
        model = TelepathyModel.build(backbone, config, longest)
        # Texts that are read at most once are not worth keeping.
        read = len(data.train) * options.epochs if options.max_steps is None else options.max_steps * options.batch_size
        if options.keep_states and read >= len(data.train):
            LOG.info("states of %d texts", len(data.train) + len(data.validation))
            device = next(model.sender.parameters()).device
            data.keep_states(lambda ids, mask: model.encode(ids.to(device), mask.to(device)), model.layer)
        # Evenly spaced, so that the statistics do not depend on the seed.
        count = max(1, min(config.calibration_examples, read))
        step = max(1, len(data.train) // count)
        chosen = data.train[::step][:count]
        LOG.info("statistics of %d texts", len(chosen))
        model.bridge.calibrate(_states(model, data, chosen), model.receiver.get_input_embeddings().weight)
        return model

    def parameter_groups(self, model: Any, options: TelepathyOptions) -> list[dict[str, Any]]:
        return decay_groups(
            model.named_parameters(),
            options.learning_rate,
            options.weight_decay,
            lambda name, parameter: is_matrix(name, parameter) and "codebook" not in name,
        )

    def save(self, model: Any, data: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, folder: Path, backbone: Any) -> nn.Module:
        return TelepathyModel.from_pretrained(folder, backbone)

    def plot_usage(self, evaluations: Records, path: Path) -> bool:
        return plot_bridges({"": [evaluations]}, path)

    def post_train(self, spec: RunSpec, data: TelepathyData, model: TelepathyModel) -> Record:
        """Runs the baselines that the options ask for on the same task, and measures latencies."""
        if not spec.options.baseline_names():
            return {}
        model.eval()
        task = data.task
        if len(data.validation) < len(task.validation):  # by eval_examples: the baselines answer the same ones
            kept = tuple(task.validation[example.number] for example in data.validation)
            task = dataclasses.replace(task, validation=kept)
        rows = run_baselines(task, spec.config, spec.options, model, spec.seed)
        timed = min(MAX_TIMED, len(task.validation))
        LOG.info("latency of the bridge, of a summary in words and of the text itself on %d examples", timed)
        baselines = {
            name: {**row, **counted(row["correct"], row["total"])} if "correct" in row else row
            for name, row in rows.items()
        }
        return {
            "baselines": baselines,
            "latency": measure_latency(model, task, timed, max_length=spec.options.max_length),
        }


@lru_cache(maxsize=2)
def _prepare(
    dataset: str, sender: str, receiver: str, max_length: int, target: str, eval_examples: int | None
) -> TelepathyData:
    tokenizers = load_decoder(sender)[1], load_decoder(receiver)[1]
    return TelepathyData(load_answer_task(dataset), *tokenizers, max_length, target, eval_examples)


def split_pair(backbone: str) -> tuple[str, str]:
    """Splits ``"SENDER,RECEIVER"`` into two names."""
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
