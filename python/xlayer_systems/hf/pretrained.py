"""Attaches to Hugging Face models: the form of ``attach()``, saved files, and the fingerprint of the base model.

A system saves its own parameters alone, as safetensors beside a JSON file with its config and a description of the
model that it was attached to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xlayer_systems.training.options import with_current_names

Config = TypeVar("Config")
DESCRIBED = ("model_type", "hidden_size", "num_hidden_layers")


class Attachment(nn.Module):
    """Is the base class of what an ``attach(model, config, **options)`` returns: the modules added to a model.

    Attributes:
        config: what was asked for.
        part: what messages call the modules.
    """

    config: Any
    part: ClassVar[str]
    _model: tuple[Any, ...] = ()  # the one attached to; in a tuple, so that it does not become a submodule

    @abstractmethod
    def remove(self) -> Any:
        """Detaches the modules: the model then computes what it did before."""

    @abstractmethod
    def save_pretrained(self, directory: str | Path) -> None:
        """Writes what was attached into ``directory``, made if missing: weights (safetensors), configuration (JSON)."""

    @classmethod
    @abstractmethod
    def load(cls, model: Any, folder: str | Path) -> Attachment:
        """Attaches what `save` wrote to ``model``; `load` of the system, as a function, is the same."""

    def save(self, folder: str | Path, *, include_model: bool = False) -> None:
        """Writes what was attached into ``folder``; ``load(model, folder)`` of the same system attaches it again.

        Args:
            folder: made if missing.
            include_model: also write the model into the folder, as its own ``save_pretrained`` does, so that
                ``from_pretrained(folder)`` and then ``load(model, folder)`` restore all.
        """
        self.save_pretrained(folder)
        if not include_model:
            return
        for model in self._model:
            own = self._names_inside(model)
            # Else from_pretrained would report the attached tensors as unexpected.
            state = {name: tensor for name, tensor in model.state_dict().items() if name not in own} if own else None
            type(model).save_pretrained(model, folder, **({} if state is None else {"state_dict": state}))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Counts the trainable parameters and all of them, of the model and of what was attached, each once."""
        parts = (self, *self._model)
        found = {id(parameter): parameter for part in parts for parameter in part.parameters()}
        trainable = sum(parameter.numel() for parameter in found.values() if parameter.requires_grad)
        return trainable, sum(parameter.numel() for parameter in found.values())

    def print_trainable_parameters(self) -> None:
        """Prints what `get_nb_trainable_parameters` counts, in one line, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def _names_inside(self, model: Any) -> set[str]:
        """Returns the names of what was attached in the model's own state dict."""
        return set()

    def _join(self, model: Any) -> None:
        """Keeps the model; its ``save_pretrained`` warns from now on that it is not all."""
        self._model = (model,)
        for saved in _saved_alone(model):
            saved.__dict__.setdefault(_PARTS, []).append(self.part)
            # A bound method, unlike a closure, is copied with the model and then saves the copy.
            saved.save_pretrained = types.MethodType(_save_and_warn, saved)

    def _leave(self) -> None:
        """Undoes `_join`."""
        for model in self._model:
            for saved in _saved_alone(model):
                parts = saved.__dict__.get(_PARTS, [])
                if self.part in parts:
                    parts.remove(self.part)
                if not parts:
                    saved.__dict__.pop(_PARTS, None)
                    saved.__dict__.pop("save_pretrained", None)


_PARTS = "_xlayer_parts"  # on a model: what is attached to it


def _saved_alone(model: Any) -> list[Any]:
    """Returns the model and its part without a head, of which either may be saved."""
    found = {id(one): one for one in (model, getattr(model, "base_model", model))}
    return [one for one in found.values() if hasattr(type(one), "save_pretrained")]


def _save_and_warn(model: Any, *args: Any, **options: Any) -> Any:
    """Saves a model that something is attached to, and warns that ``from_pretrained`` will not restore that."""
    parts = " and ".join(model.__dict__.get(_PARTS, []))
    warnings.warn(
        f"{type(model).__name__}.from_pretrained will not restore the {parts} attached to this model: save all with "
        "save(folder, include_model=True) of what attach() returned, and restore with load(model, folder)",
        stacklevel=2,
    )
    return type(model).save_pretrained(model, *args, **options)


_save_and_warn.__name__ = "save_pretrained"  # by which pickle finds a bound method


def resolve_config(
    kind: type[Config],
    config: Config | str | None,
    options: Mapping[str, Any],
    preset: Callable[[str], Config] | None = None,
) -> Config:
    """Returns the config that the arguments of an ``attach()`` ask for.

    Args:
        kind: the config dataclass.
        config: a config, the name of a preset, or None for the defaults.
        options: fields that differ from it.
        preset: finds a config by name.

    Raises:
        ValueError: an option or a preset is unknown, or a value is out of range.
    """
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"attach has no option {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    if isinstance(config, str):
        if preset is None:
            raise ValueError(f"config must be a {kind.__name__}, got {config!r}")
        config = preset(config)
    return dataclasses.replace(kind() if config is None else config, **options)  # type: ignore[type-var]


def read_config(kind: type[Config], values: Mapping[str, Any], folder: Path) -> Config:
    """Makes a config dataclass from a file in ``folder``.

    Raises:
        ValueError: the file has options that this version does not know, or one by two names, or values out of range.
    """
    try:
        values = with_current_names(kind, values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder} has a damaged configuration: {error}") from error
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(kind)})  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{folder} has options that this version does not know: {', '.join(unknown)}")
    return kind(**values)


def describe_model(model: Any, names: Iterable[str] = DESCRIBED) -> dict[str, Any]:
    """Returns the kind and the sizes of a Hugging Face model, to be saved beside what was attached to it."""
    return {name: getattr(model.config, name, None) for name in names}


def check_model(saved: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """Checks that what was saved in ``folder`` was made for the model described by ``found``.

    Raises:
        ValueError: it was made for another one.
    """
    for name, value in found.items():
        if saved.get(name) != value:
            raise ValueError(f"{folder} was made for a model with {name} {saved.get(name)!r}, got {value!r}")


def save_own(folder: Path, state: Mapping[str, Tensor], weights: str, settings: Mapping[str, Any], config: str) -> None:
    """Writes tensors to the file ``weights`` and settings to the file ``config`` in ``folder``, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / weights)
    (folder / config).write_text(json.dumps(settings, indent=2) + "\n")


def read_own(folder: Path, what: str, weights: str, config: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `save_own` wrote.

    Returns:
        The settings and the tensors.

    Raises:
        ValueError: files are missing or damaged.
    """
    missing = [name for name in (config, weights) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"no {what} in {folder}: {', '.join(missing)} missing")
    try:
        settings = json.loads((folder / config).read_text())
        state = load_file(folder / weights)
    except Exception as error:  # a reader may raise anything for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the files in {folder} are damaged: {reason}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"the files in {folder} are damaged: {config} holds no JSON object")
    return settings, state


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path) -> None:
    """Checks names and shapes of the tensors from ``folder``.

    Raises:
        ValueError: one is missing, unknown or of another shape.
    """
    wrong = sorted(set(state) ^ set(expected))
    wrong += [name for name in state if name in expected and state[name].shape != expected[name].shape]
    if wrong:
        raise ValueError(f"the weights in {folder} do not fit their configuration: {wrong[0]} is missing or wrong")


def load_attached(attached: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """Loads tensors from ``folder`` into what was just attached to a model, or takes it off again.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the model is then as it was.
    """
    try:
        check_state(state, attached.state_dict(), folder)
    except ValueError:
        attached.remove()
        raise
    attached.load_state_dict(state)


def weights_fingerprint(
    parameters: Iterable[tuple[str, Tensor]], sample: int, shape_as: Callable[[torch.Size], object] = tuple
) -> str:
    """Identifies weights by the first elements of every parameter, in bfloat16.

    The fingerprint is the same for a model that was loaded in float32 and in bfloat16.

    Args:
        sample: elements of each parameter that count.
        shape_as: how shapes were written when the fingerprints that this one is compared with were taken.
    """
    digest = hashlib.sha256()
    for name, parameter in parameters:
        elements = parameter.detach().flatten()[:sample].to("cpu", torch.bfloat16)
        digest.update(f"{name}{shape_as(parameter.shape)}".encode() + elements.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_hash(folder: Path) -> str:
    """Identifies a saved model by the hash of its weight files."""
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    return _hash_of(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=16)
def _hash_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:16]
