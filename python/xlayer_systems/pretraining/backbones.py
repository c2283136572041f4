"""Shared parts of pretraining: the systems' base class, and the backbone on disk with its tokenizer and recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlayer_systems.data.corpus import Corpus
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import System
from xlayer_systems.training.directory import environment

RECIPE_FILE = "recipe.json"


def save_backbone(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a Hugging Face model in half precision, and its tokenizer, into ``folder``."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_recipe(spec: RunSpec, data: Any, result: Mapping[str, Any], folder: Path) -> None:
    """Writes the run, the environment and the result of a pretraining beside its backbone."""
    recipe = {"run": spec.to_dict(), "environment": environment(data.fingerprint), "result": dict(result)}
    (folder / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")


class BackbonePretraining(System):
    """Holds the defaults of the systems that pretrain a small backbone on the embedded corpus.

    Args:
        corpus: the embedded one by default; only its training files reach tokenizer and parameters.
    """

    dataset_help = "stdlib, the embedded corpus"
    backbone_help = "scratch"
    default_dataset = "stdlib"
    default_backbone = "scratch"

    def __init__(self, corpus: Corpus | None = None) -> None:
        self.corpus = corpus

    def upgraded(self, stored: Mapping[str, Any], preset: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the description of a run that an earlier version stored, with its config as a run has it now."""
        names = {"preset": preset, "dataset": self.default_dataset, "backbone": self.default_backbone}
        kept = {name: stored[name] for name in ("system", "seed", "options")}
        return {**kept, **names, "config": config, "backbone_weights": self.default_backbone}
