"""Saves pretrained backbones: half precision, the tokenizer, and the recipe of the pretraining."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.training.directory import environment

RECIPE_FILE = "recipe.json"


def save_backbone(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a Hugging Face model in half precision, and its tokenizer, into ``folder``."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_recipe(spec: RunSpec, data: Any, result: Mapping[str, Any], folder: Path) -> None:
    """Writes beside a backbone what it was trained by, where, and what came of it."""
    recipe = {"run": spec.to_dict(), "environment": environment(data.fingerprint), "result": dict(result)}
    (folder / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")
