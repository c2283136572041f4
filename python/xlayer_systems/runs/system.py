"""The interface of a trainable system: `System`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import nn

from xlayer_systems.errors import UserError
from xlayer_systems.reporting.tables import Records
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.training.directory import Record, RunDirectory
from xlayer_systems.training.model import TrainingModel
from xlayer_systems.training.options import (
    MAX_SEED,
    LoopOptions,
    apply_overrides,
    check_seed,
    current_overrides,
    json_schema,
    plain,
    split_overrides,
)
from xlayer_systems.training.trainer import TrainingData

SEED_HELP = "Initial parameters, order of the examples, dropout."
QUICK_HELP = "Settings that train in a minute or two on two CPU cores."
ALL_OR_NONE = {"all": "true", "none": "false"}  # words for an option that is true or false
PLAIN = "plain"  # the preset without what the system adds


class RunData(TrainingData, Protocol):
    """Is the interface of the data of a run."""

    @property
    def fingerprint(self) -> str:
        """Identifies the examples, so that no run is resumed on others."""


class Part(NamedTuple):
    """Holds a finished part of a composite run."""

    spec: RunSpec
    path: Path
    result: Record


class System(ABC):
    """Defines one trainable system for the shared loop: its presets, options, data, model and report.

    To add a system, write a package with four modules:

    * ``config.py``: a frozen dataclass of what defines the model, and a subclass of `LoopOptions` of how it is trained;
      every field is made by `xlayer_systems.training.options.option`, which holds its help and its bounds;
    * ``model.py``: the model, whose training form derives from `xlayer_systems.training.model.TrainingModel`;
    * ``report.py``: a subclass of `System` with the methods under *reports* below;
    * ``system.py``: a subclass of that one with the rest;

    and name the class in ``registry.py``. No other file knows the system. Of the methods, `presets`, `config`,
    `options`, `prepare`, `build`, `parameter_groups`, `save`, `load`, `result`, `format` and `report` must be written;
    all others have a default. `xlayer_systems.hyper_lm` is a short example, `xlayer_systems.bypass` one with parts.

    A **composite run** consists of other runs of the same system: `parts` names them, each in a folder of its own
    inside the run directory, and `combine` makes the result of theirs. A run may have parts beside its own training,
    which come after it, or consist of parts alone (`has_own_training`).

    Attributes:
        name: its name in the registry and on the command line.
        summary: a line about it, for the command line.
        preset_help, dataset_help, backbone_help: what the command line says about the three names of a run.
        default_preset, default_dataset, default_backbone: what a run has where nothing else is asked for.
        flags: options that have a flag of their own on the command line, by the flag's name (``soft-tokens``).
        flag_words: by flag, words in place of values of its option.
        swept_flags: those of them that take several values in a sweep, separated by commas.
        usage_title: caption of what `plot_usage` draws.
        sweep_defaults: overrides that a sweep begins with.
        model_folder: where in the run directory the trained model is kept.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    preset_help: ClassVar[str]
    dataset_help: ClassVar[str]
    backbone_help: ClassVar[str]
    default_preset: ClassVar[str]
    default_dataset: ClassVar[str]
    default_backbone: ClassVar[str]
    flags: ClassVar[Mapping[str, str]] = {}
    flag_words: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    swept_flags: ClassVar[Sequence[str]] = ()
    usage_title: ClassVar[str] = ""
    sweep_defaults: ClassVar[Mapping[str, str]] = {}
    model_folder: ClassVar[str] = "model"

    # ---- what a run is -----------------------------------------------------------------------------------------------

    @abstractmethod
    def presets(self) -> Sequence[str]:
        """Returns the names of the presets; `PLAIN` among them where the backbone alone can be trained."""

    @abstractmethod
    def config(self, preset: str, backbone: str) -> Any:
        """Returns the system's config dataclass for a preset, or None for a backbone alone.

        Raises:
            UserError, ValueError: the preset is unknown.
        """

    @abstractmethod
    def options(self, preset: str, dataset: str, backbone: str, quick: bool) -> LoopOptions:
        """Returns the default training options."""

    def check_backbone(self, backbone: str) -> None:
        """Checks, at little cost, that there is such a backbone.

        Raises:
            UserError: there is none.
        """
        self.defaults(backbone=backbone)

    def fingerprint(self, backbone: str) -> str:
        """Identifies the weights that a run starts from."""
        return backbone

    def make_spec(
        self,
        preset: str | None = None,
        *,
        dataset: str | None = None,
        backbone: str | None = None,
        seed: int = 0,
        quick: bool = False,
        overrides: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
        config: Mapping[str, str] | None = None,
        bounded: bool = True,
    ) -> RunSpec:
        """Fills in a run from the defaults of system, preset, data set and backbone.

        A bound on steps or validation examples among ``overrides`` holds for every part of the run, see
        `LoopOptions.bounded`.

        Args:
            overrides: changes, as text, of training options and of the config, whichever has the name.
            options, config: changes of the one or the other alone; they win over ``overrides``.
            bounded: apply `LoopOptions.bounded`; versions before it did not.

        Raises:
            UserError: a name is unknown, or a value is out of range.
        """
        for name, value in (("preset", preset), ("dataset", dataset), ("backbone", backbone)):
            if value is not None and not value.strip():
                raise UserError(f"{name} must be a name, got {value!r}")
        check_seed(seed)
        preset, dataset = preset or self.default_preset, dataset or self.default_dataset
        backbone = backbone or self.default_backbone
        made_config, made_options = self.defaults(preset, dataset, backbone, quick)
        for_options, for_config = split_overrides(overrides or {}, made_options, made_config)
        asked = set(for_options)
        for_options |= split_overrides(options or {}, made_options)[0]
        for_config |= split_overrides(config or {}, made_config)[0]
        # A run file's section of all options reproduces a run as it was: it asks for no bound.
        made_options = apply_overrides(made_options, for_options)
        if bounded:
            made_options = made_options.bounded(asked, for_options.keys())
        if made_config is not None:
            made_config = apply_overrides(made_config, for_config)
        weights = self.fingerprint(backbone)
        return RunSpec(self.name, preset, dataset, backbone, seed, made_config, made_options, weights)

    def defaults(
        self, preset: str | None = None, dataset: str | None = None, backbone: str | None = None, quick: bool = False
    ) -> tuple[Any, LoopOptions]:
        """Returns the config and the training options of these names; None stands for the system's default name.

        Raises:
            UserError: a name is unknown.
        """
        preset, dataset = preset or self.default_preset, dataset or self.default_dataset
        backbone = backbone or self.default_backbone
        try:
            return self.config(preset, backbone), self.options(preset, dataset, backbone, quick)
        except ValueError as error:
            raise UserError(str(error)) from error

    def read_spec(self, stored: Mapping[str, Any]) -> RunSpec:
        """Reads a run from ``run`` of a run directory's config.json, also one that an earlier version wrote.

        Raises:
            UserError: names or values in it are not of this version.
        """
        try:
            stored = self.upgrade(stored)
            preset, backbone = stored["preset"], stored["backbone"]
            base = self.config(preset, backbone)
            options = self.options(preset, stored["dataset"], backbone, quick=False)
            stored = self.translate(stored, base, options)
            config = None if stored["config"] is None else dataclasses.replace(base, **stored["config"])
            kept = {field.name: stored[field.name] for field in dataclasses.fields(RunSpec)}
            return RunSpec(**{**kept, "config": config, "options": dataclasses.replace(options, **stored["options"])})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this run's config.json does not fit this version of xlayer: {error}") from error

    def upgrade(self, stored: Mapping[str, Any]) -> Mapping[str, Any]:
        """Translates a run's description that an earlier version wrote; the default returns it as it is."""
        return stored

    def translate(self, stored: Mapping[str, Any], config: Any, options: LoopOptions) -> dict[str, Any]:
        """Translates a run's description that an earlier version wrote: its form by `upgrade`, then the names in it.

        Args:
            config, options: dataclasses of the kinds that the run has; their values do not matter.

        Raises:
            UserError: a field is given by its earlier and by its present name.
        """
        translated = dict(self.upgrade(stored))
        for name, kind in (("config", config), ("options", options)):
            if isinstance(translated.get(name), Mapping):
                translated[name] = current_overrides(translated[name], kind)
        return translated

    def schema(self, preset: str | None = None, quick: bool = False) -> dict[str, Any]:
        """Returns the JSON schema of everything that `make_spec` takes, made of the fields of the dataclasses.

        Defaults are those of the given preset, on the default data set and backbone. Beside the schema proper,
        ``presets`` says what each preset changes of them, and ``quick`` what quick settings change.
        """
        preset = preset or self.default_preset
        defaults = config, options = self.defaults(preset, quick=quick)
        names = {
            "preset": {"enum": list(self.presets()), "default": preset, "description": self.preset_help},
            "dataset": {"type": "string", "default": self.default_dataset, "description": self.dataset_help},
            "backbone": {"type": "string", "default": self.default_backbone, "description": self.backbone_help},
        }
        seed = {"type": "integer", "minimum": 0, "maximum": MAX_SEED, "default": 0, "description": SEED_HELP}
        short = {"type": "boolean", "default": quick, "description": QUICK_HELP}
        parts = {"options": json_schema(options), "config": {"type": "null"} if config is None else json_schema(config)}
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": self.name,
            "description": self.summary,
            "type": "object",
            "additionalProperties": False,
            "properties": {**names, "seed": seed, "quick": short, **parts},
            "presets": {name: self._changes(defaults, self.defaults(name, quick=quick)) for name in self.presets()},
            "quick": self._changes(self.defaults(preset), self.defaults(preset, quick=True)),
        }

    def _changes(self, base: tuple[Any, LoopOptions], other: tuple[Any, LoopOptions]) -> Record:
        """Returns the fields of config and options in which ``other`` differs; a config of another kind is whole."""
        changes: Record = {}
        for name, mine, theirs in zip(("config", "options"), base, other, strict=True):
            if theirs is None or type(mine) is not type(theirs):
                if mine is not theirs:
                    changes[name] = None if theirs is None else plain(theirs)
                continue
            before, after = plain(mine), plain(theirs)
            changed = {key: value for key, value in after.items() if value != before[key]}
            if changed:
                changes[name] = changed
        return changes

    # ---- composite runs ----------------------------------------------------------------------------------------------

    def parts(self, spec: RunSpec, path: Path) -> dict[str, RunSpec]:
        """Returns the runs that the run of ``spec`` in ``path`` consists of, by folder and in their order."""
        return {}

    def has_own_training(self, spec: RunSpec) -> bool:
        """Tells whether the run trains a model itself, beside its parts."""
        return True

    def combine(self, spec: RunSpec, data: Any, parts: Mapping[str, Part], run: RunDirectory, device: Any) -> Record:
        """Returns the entries of result.json about the parts. Runs on the main process, after all of them."""
        return {}

    def profiled(self, spec: RunSpec) -> RunSpec:
        """Returns the run with training of its own that a profile of ``spec`` measures."""
        return spec

    # ---- training ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, spec: RunSpec, whole: bool = False) -> Any:
        """Returns the `RunData` of a run, cached, because the runs of a sweep share them.

        Args:
            whole: with all validation data, not only what evaluations during training use.
        """

    def load_backbone(self, backbone: str) -> Any:
        """Loads what `build` starts from."""
        return None

    @abstractmethod
    def build(self, backbone: Any, config: Any, data: Any, options: Any) -> TrainingModel:
        """Makes the model to train.

        Raises:
            ValueError: the config does not fit backbone or data; the message is shown in one line.
        """

    @abstractmethod
    def parameter_groups(self, model: Any, options: Any) -> list[dict[str, Any]]:
        """Returns the parameter groups for AdamW."""

    @abstractmethod
    def save(self, model: Any, data: Any, folder: Path) -> None:
        """Writes everything that `load` needs beside the backbone."""

    @abstractmethod
    def load(self, folder: Path, backbone: Any) -> nn.Module:
        """Loads what `save` wrote."""

    def load_trained(self, spec: RunSpec, path: Path) -> nn.Module:
        """Loads the model of the finished run of ``spec`` in ``path``.

        Raises:
            UserError: files are missing, damaged or no data.
        """
        backbone, folder = self.load_backbone(spec.backbone), path / self.model_folder
        try:
            return self.load(folder, backbone)
        except Exception as error:  # a reader may raise anything for a broken file
            if isinstance(error, UserError | ValueError) and str(folder) in str(error):
                raise UserError(str(error)) from error
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot load the model in {folder}: {reason}") from error

    def post_train(self, spec: RunSpec, data: Any, model: Any) -> Record:
        """Measures, on the main process, entries of result.json beside the last evaluation, such as baselines."""
        return {}

    def complete(
        self, model: Any, folder: Path, prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int
    ) -> str:
        """Continues ``prompt`` with the trained model that was saved in ``folder``.

        Raises:
            UserError: the system is no language model.
        """
        raise UserError(f"{folder.parent} is a run of {self.name}, which makes no text; expected a language model")

    # ---- reports -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def result(self, spec: RunSpec, data: Any, metrics: Mapping[str, Any]) -> Record:
        """Returns the entries of result.json about the last evaluation's ``metrics``."""

    @abstractmethod
    def format(self, result: Mapping[str, Any]) -> str:
        """Formats a result as a short table in plain text."""

    @abstractmethod
    def report(self, spec: RunSpec, data: Any, result: Mapping[str, Any], run: RunDirectory) -> list[str]:
        """Draws the plots of a run into its folder plots and returns the lines of its report below the title."""

    def warnings(self, result: Mapping[str, Any]) -> list[str]:
        """Returns sentences about a result that its reader must not miss, such as a model worse than its baseline."""
        return []

    def plot_usage(self, evaluations: Records, path: Path) -> bool:
        """Draws the usage of the added modules in each evaluation; returns False where there is none."""
        return False

    def summarize(self, results: Mapping[str, list[Record]], records: Mapping[str, Sequence[Records]]) -> Record:
        """Summarizes a sweep as ``title`` and ``rows``.

        Args:
            results: per variant the result of each seed.
            records: per variant and seed the lines of metrics.jsonl.

        Raises:
            UserError: the system has no sweeps.
        """
        raise UserError(f"{self.name} cannot be swept; train it once")

    def format_sweep(self, summary: Mapping[str, Any]) -> str:
        """Formats a sweep's table in plain text."""
        return str(summary["title"])

    def plot_sweep(self, summary: Mapping[str, Any], records: Mapping[str, Sequence[Records]], out: Path) -> list[str]:
        """Draws a sweep's curves into ``out`` and returns the lines of its report that show them."""
        return []
