"""An L-Former on disk: its own parameters (safetensors) and what they belong to (JSON)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xlayer_systems.lformer.config import ModelConfig

if TYPE_CHECKING:
    from xlayer_systems.lformer.model import LFormer

CONFIG_FILE = "lformer_config.json"
WEIGHTS_FILE = "lformer.safetensors"
SAMPLE = 1024  # numbers of each frozen parameter that tell one base from another


def own_state(model: LFormer) -> dict[str, Tensor]:
    """Side path, heads and the base's layers that phase B trains; everything where the base was made here."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.owns_base:
        return _without_ties(model, state)
    trained = {id(parameter) for parameter in model.unfrozen()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in trained}
    return {name: tensor for name, tensor in state.items() if not name.startswith("base.") or name in names}


def save_pretrained(model: LFormer, directory: str | Path) -> None:
    """Writes the own parameters and the configuration into ``directory``, made if missing.

    Of an attached base only the layers that phase B trains are written, and what tells it from another one.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(own_state(model), directory / WEIGHTS_FILE)
    settings = {"config": asdict(model.config), "base": None if model.owns_base else describe_base(model)}
    (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def load_pretrained(cls: type[LFormer], directory: str | Path, base: Any = None) -> LFormer:
    """What `save_pretrained` wrote, attached to ``base``, the same model as then, where the base was not made here.

    Raises:
        ValueError: files are missing or do not fit each other, or ``base`` is another model; it is then as it was.
    """
    directory = Path(directory)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"no L-Former in {directory}: {', '.join(missing)} missing")
    try:
        saved = json.loads((directory / CONFIG_FILE).read_text())
        config, state = ModelConfig(**saved["config"]), load_file(directory / WEIGHTS_FILE)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"the files in {directory} do not fit this version: {error}") from error
    if (base is None) != (saved["base"] is None):
        wanted = "needs the base that it was attached to" if base is None else "brings its own base, and takes no other"
        raise ValueError(f"the L-Former in {directory} {wanted}")
    model = cls(config, base)
    try:
        _check_base(model, saved["base"], directory)
        _take(model, state, directory)
    except ValueError:
        model.remove()
        raise
    return model


def describe_base(model: LFormer) -> dict[str, Any]:
    """What tells an attached base from another: kind, sizes, and a hash over samples of its frozen parameters."""
    settings = model.base.config.get_text_config()
    sizes = {name: getattr(settings, name) for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}
    trained = {id(parameter) for parameter in model.unfrozen()}
    digest = hashlib.sha256()
    for name, parameter in model.base.named_parameters():
        if id(parameter) not in trained:
            # In bfloat16, so that a base loaded in it is the same base.
            sample = parameter.detach().flatten()[:SAMPLE].to("cpu", torch.bfloat16).view(torch.int16)
            digest.update(f"{name}{list(parameter.shape)}".encode() + sample.numpy().tobytes())
    return {**sizes, "weights": digest.hexdigest()[:16]}


def _check_base(model: LFormer, saved: dict[str, Any] | None, directory: Path) -> None:
    if saved is None:
        return
    for name, found in describe_base(model).items():
        if saved.get(name) != found:
            raise ValueError(f"{directory} was made for a base with {name} {saved.get(name)!r}, got {found!r}")


def _take(model: LFormer, state: dict[str, Tensor], directory: Path) -> None:
    expected = {name: tensor.shape for name, tensor in own_state(model).items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        raise ValueError(f"the weights in {directory} do not fit their configuration")
    model.load_state_dict(state, strict=False)


def _without_ties(model: LFormer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once: a tied head has the embedding's."""
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in state.items() if name in names}
