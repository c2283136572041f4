"""One run from its description to its report: `RunSpec` → `train_run`, and `evaluate_run` for a finished one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from xlayer_systems.errors import UserError
from xlayer_systems.registry import Recipe, get_recipe
from xlayer_systems.training.directory import Record, RunDirectory, disk_errors, environment
from xlayer_systems.training.options import apply_overrides, check_seed, split_overrides
from xlayer_systems.training.trainer import Trainer, evaluate, make_accelerator, seed_everything


@dataclass(frozen=True)
class RunSpec:
    """Everything that defines a run.

    ``config`` is the system's own dataclass, or None for a backbone alone; ``options`` are the `LoopOptions` of its
    kind of training.
    """

    system: str
    preset: str
    dataset: str
    backbone: str
    seed: int
    config: Any
    options: Any

    @property
    def recipe(self) -> Recipe:
        """The recipe of the system."""
        return get_recipe(self.system)

    def to_dict(self) -> Record:
        """JSON-able; `from_dict` is the inverse."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        config = None if self.config is None else dataclasses.asdict(self.config)
        weights = self.recipe.fingerprint(self.backbone)
        return {**fields, "config": config, "options": dataclasses.asdict(self.options), "backbone_weights": weights}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> RunSpec:
        """From a run directory's config.json."""
        try:
            kept = {field.name: stored[field.name] for field in dataclasses.fields(cls)}
            recipe, preset, backbone = get_recipe(stored["system"]), stored["preset"], stored["backbone"]
            base = recipe.config(preset, backbone)
            config = None if stored["config"] is None else dataclasses.replace(base, **stored["config"])
            options = recipe.options(preset, stored["dataset"], backbone, quick=False)
            return cls(**{**kept, "config": config, "options": dataclasses.replace(options, **stored["options"])})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this run's config.json does not fit this version of xlayer: {error}") from error


def make_spec(
    system: str,
    preset: str | None = None,
    *,
    dataset: str | None = None,
    backbone: str | None = None,
    seed: int = 0,
    quick: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> RunSpec:
    """Defaults of system, preset, data set and backbone, changed by ``overrides`` of options and system config."""
    recipe = get_recipe(system)
    for name, value in (("preset", preset), ("dataset", dataset), ("backbone", backbone)):
        if value is not None and not value.strip():
            raise UserError(f"{name} must be a name, got {value!r}")
    check_seed(seed)
    preset, dataset = preset or recipe.default_preset, dataset or recipe.default_dataset
    backbone = backbone or recipe.default_backbone
    config = recipe.config(preset, backbone)
    options = recipe.options(preset, dataset, backbone, quick)
    for_options, for_config = split_overrides(overrides or {}, options, config)
    options = apply_overrides(options, for_options)
    if config is not None:
        config = apply_overrides(config, for_config)
    return RunSpec(system, preset, dataset, backbone, seed, config, options)


def train_run(spec: RunSpec, path: Path, resume: bool = False) -> Record:
    """Train ``spec`` in the run directory ``path`` and return its result.json.

    With ``resume`` an interrupted run goes on from its checkpoint, a finished one only returns its result, and one that
    does not exist yet starts.
    """
    started = time.perf_counter()
    with disk_errors(path):
        if path.exists() and not resume:
            raise UserError(f"run directory {path} exists; choose another --run-dir, or continue it with --resume")
        stages = getattr(spec.recipe, "stages", None)  # of systems whose runs have parts, each a run of its own
        if stages is not None and getattr(spec.config, "stage", "both") == "both":
            return stages(spec, path, resume)
        accelerator = make_accelerator(spec.options)
        with RunDirectory(path, accelerator.is_main_process) as run:
            return _train(spec, accelerator, run, resume and path.exists(), started)


def _train(spec: RunSpec, accelerator: Any, run: RunDirectory, resume: bool, started: float) -> Record:
    accelerator.wait_for_everyone()
    data = spec.recipe.objective.prepare(spec)
    description, surroundings = spec.to_dict(), environment(data.fingerprint)
    if resume:
        finished = run.hold(description, surroundings)
        if finished is not None:
            return finished
    model = build_model(spec, data)
    groups = spec.recipe.parameter_groups(model, spec.options)
    parameters = sum(p.numel() for p in model.parameters())
    name = f"{spec.preset} seed {spec.seed}"
    trainer = Trainer(accelerator, model, groups, data, spec.options, run, spec.seed, name)
    if resume:
        trainer.resume()
    else:
        run.create(description, surroundings)
    accelerator.wait_for_everyone()
    last = trainer.train()
    _save_model(spec, data, trainer, run.path / "model")
    result = _result(spec, data, last, parameters, time.perf_counter() - started)
    examine = getattr(spec.recipe.objective, "examine", None)
    if accelerator.is_main_process:
        if examine is not None:
            result |= examine(spec, data, accelerator.unwrap_model(trainer.model))
        _write_plots_and_report(spec, data, run, result)
    run.write_json("result.json", result)
    accelerator.wait_for_everyone()
    return result


def evaluate_run(path: Path) -> Record:
    """Evaluate the saved model of a finished run on the whole validation set."""
    spec = finished_spec(path)
    data = spec.recipe.objective.prepare(spec, whole=True)
    if data.fingerprint != RunDirectory(path).read_config()["environment"]["data_hash"]:
        raise UserError(f"{path} was trained on other data: {spec.dataset} has another corpus hash on this machine")
    accelerator = make_accelerator(spec.options)
    model = accelerator.prepare(load_model(spec, path))
    metrics = evaluate(accelerator, model, data, spec.options.eval_batch_size)
    parameters = sum(p.numel() for p in model.parameters())
    return _result(spec, data, {**metrics, "epoch": spec.options.epochs}, parameters, 0.0)


def complete_text(
    path: Path, prompt: str, *, tokens: int = 128, temperature: float = 0.0, top_k: int | None = None, seed: int = 0
) -> str:
    """``prompt`` and what the language model of a finished run goes on with."""
    check_seed(seed)
    spec = finished_spec(path)
    complete = getattr(spec.recipe.objective, "complete", None)
    if complete is None:
        raise UserError(f"{path} is a run of {spec.system}, which makes no text; expected a run of a language model")
    text: str = complete(load_model(spec, path), path / "model", prompt, tokens, temperature, top_k, seed)
    return text


def finished_spec(path: Path) -> RunSpec:
    """What was run in ``path``; an unfinished run is refused."""
    run = RunDirectory(path)
    spec = RunSpec.from_dict(run.read_config()["run"])
    if run.result() is None:
        raise UserError(f"{path} is not finished; continue it with `xlayer train ... --run-dir {path} --resume`")
    return spec


def load_model(spec: RunSpec, path: Path) -> nn.Module:
    """The trained model of a finished run; files that are missing, damaged or no data raise `UserError`."""
    backbone, folder = spec.recipe.load_backbone(spec.backbone), path / "model"
    try:
        return spec.recipe.load(folder, backbone)
    except Exception as error:  # whatever a broken file makes its reader raise
        if isinstance(error, UserError) and str(folder) in str(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load the model in {folder}: {reason}") from error


def format_result(result: Mapping[str, Any]) -> str:
    """The table of one run."""
    try:
        return get_recipe(result["system"]).objective.format(result)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"this result does not fit this version of xlayer: {type(error).__name__} {error}") from error


def build_model(spec: RunSpec, data: Any) -> nn.Module:
    """The model of a run before its first step."""
    seed_everything(spec.seed)
    backbone = spec.recipe.load_backbone(spec.backbone)
    # Again, so that the new parameters do not depend on what loading drew.
    seed_everything(spec.seed)
    return spec.recipe.build(backbone, spec.config, data, spec.options)


def _save_model(spec: RunSpec, data: Any, trainer: Trainer, folder: Path) -> None:
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    if getattr(accelerator, "is_fsdp2", False) or accelerator.distributed_type.value == "FSDP":
        state = accelerator.get_state_dict(trainer.model)  # gathered from all processes
        if accelerator.is_main_process:
            model = build_model(spec, data)
            model.load_state_dict(state)
    if accelerator.is_main_process:
        spec.recipe.save(model, data, folder)


def _result(spec: RunSpec, data: Any, last: Mapping[str, Any], parameters: int, seconds: float) -> Record:
    return {
        "system": spec.system,
        "preset": spec.preset,
        "dataset": spec.dataset,
        "backbone": spec.backbone,
        "seed": spec.seed,
        **spec.recipe.objective.result(spec, data, last),
        "epochs": last["epoch"],
        "parameters": parameters,
        "seconds": round(seconds, 1),
    }


def _write_plots_and_report(spec: RunSpec, data: Any, run: RunDirectory, result: Record) -> None:
    records, plots = run.metrics(), run.path / "plots"
    lines = [f"# {spec.system} {spec.preset} on {spec.dataset}", ""]
    lines += spec.recipe.objective.report(spec, data, result, records, plots)
    if spec.recipe.plot([r for r in records if r["event"] == "eval"], plots / "usage.png"):
        lines += ["", f"![{spec.recipe.usage_title}](plots/usage.png)"]
    run.write_text("report.md", "\n".join(lines) + "\n")
