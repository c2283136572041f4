"""Carries out runs: `train_run` from a description to its report, and `evaluate_run` for a finished one."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlayer_systems.errors import UserError
from xlayer_systems.reporting.tables import evaluations_of
from xlayer_systems.runs import run_file
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import Part, System
from xlayer_systems.training.directory import Record, RunDirectory, disk_errors, environment
from xlayer_systems.training.model import TrainingModel
from xlayer_systems.training.options import check_seed
from xlayer_systems.training.trainer import Trainer, evaluate, make_accelerator, seed_everything

LOG = logging.getLogger(__name__)


def train_run(system: System, spec: RunSpec, path: Path, resume: bool = False, name: str | None = None) -> Record:
    """Trains ``spec`` and its parts in the run directory ``path`` and returns its result.json.

    With ``resume`` an interrupted run goes on from its checkpoint, a finished one only returns its result, and one that
    does not exist yet starts. Every part of a composite run is a run of its own in a folder of ``path``, so an
    interrupted one continues inside the part that it was in. ``name`` stands in announcements; None: the preset.

    Raises:
        UserError: the directory exists, or what is in it cannot be resumed; data or model cannot be made.
        InterruptionError: after SIGINT or SIGTERM and a checkpoint.
        DivergenceError: a loss, metric or parameter is not finite.
    """
    started = time.perf_counter()
    with disk_errors(path):
        if path.exists() and not resume:
            system.check_backbone(spec.backbone)  # first, as another directory would not help there
            raise UserError(f"run directory {path} exists; choose another --run-dir, or continue it with --resume")
        accelerator = make_accelerator(spec.options)
        with RunDirectory(path, accelerator.is_main_process) as run:
            label = f"{name or spec.preset} seed {spec.seed}"
            return _train(system, spec, accelerator, run, resume and path.exists(), started, label)


def _train(
    system: System,
    spec: RunSpec,
    accelerator: Any,
    run: RunDirectory,
    resume: bool,
    started: float,
    label: str,
) -> Record:
    accelerator.wait_for_everyone()
    data = system.prepare(spec)
    description, recorded = spec.to_dict(), environment(data.fingerprint)
    if resume:
        finished = run.hold(description, recorded, lambda stored: system.translate(stored, spec.config, spec.options))
        if finished is not None:
            return finished
    names = ("system", "preset", "dataset", "backbone", "seed")
    result: Record = {name: description[name] for name in names}
    trainer: Trainer | None = None
    if system.has_own_training(spec):
        model = build_model(system, spec, data)
        groups = system.parameter_groups(model, spec.options)
        parameters = sum(p.numel() for p in model.parameters())
        trainer = Trainer(accelerator, model, groups, data, spec.options, run, spec.seed, label)
    if not resume:
        run.create(description, recorded, {run_file.NAME: run_file.write_run_file(spec)})
    elif trainer is not None:
        trainer.resume()
    accelerator.wait_for_everyone()
    if trainer is not None:
        LOG.info(
            "training %s: %d steps, %d training and %d validation examples",
            trainer.name, trainer.total_steps, len(data.train), len(data.validation),
        )  # fmt: skip
        last = trainer.train()
        _save_model(system, spec, data, trainer, run.path / system.model_folder)
        result |= _result(system, spec, data, last, parameters, time.perf_counter() - started)
    specs = system.parts(spec, run.path)
    parts = {}
    for number, (name, part) in enumerate(specs.items(), 1):
        LOG.info("part %d/%d: %s", number, len(specs), name)
        parts[name] = Part(part, run.path / name, train_run(system, part, run.path / name, resume=True, name=name))
    if parts:
        accelerator = make_accelerator(spec.options)  # the parts' runs have replaced this process's accelerator
    if accelerator.is_main_process:
        if trainer is not None:
            result |= system.post_train(spec, data, accelerator.unwrap_model(trainer.model))
        result |= system.combine(spec, data, parts, run, accelerator.device)
        if trainer is None:
            result["seconds"] = round(time.perf_counter() - started, 1)
        for text in system.warnings(result):
            LOG.warning("%s", text)
        LOG.info("report and plots of %s", run.path)
        _write_report(system, spec, data, run, result)
        result["total_seconds"] = round(time.perf_counter() - started, 1)
        run.write_json("result.json", result)
    accelerator.wait_for_everyone()
    return result if accelerator.is_main_process else run.result() or result


def evaluate_run(system: System, spec: RunSpec, path: Path, limit: int | None = None) -> Record:
    """Evaluates the saved model of the finished run of ``spec`` in ``path``.

    Args:
        limit: number of validation examples, evenly spaced; None: all.
    """
    started = time.perf_counter()
    _check_finished(path)
    data = system.prepare(spec, whole=True)
    if data.fingerprint != RunDirectory(path).read_config()["environment"]["data_hash"]:
        raise UserError(f"{path} was trained on other data: {spec.dataset} has another corpus hash on this machine")
    whole = len(data.validation)
    if limit is not None and limit < whole:
        data = copy.copy(data)  # the original is cached
        data.validation = [data.validation[index * whole // limit] for index in range(limit)]
    LOG.info("evaluating on %d of %d validation examples", len(data.validation), whole)
    accelerator = make_accelerator(spec.options)
    model = accelerator.prepare(system.load_trained(spec, path))
    metrics = evaluate(accelerator, model, data, spec.options.eval_batch_size)
    parameters = sum(p.numel() for p in model.parameters())
    names = ("system", "preset", "dataset", "backbone", "seed")
    result = {name: getattr(spec, name) for name in names}
    seconds = time.perf_counter() - started
    return result | _result(system, spec, data, {**metrics, "epoch": spec.options.epochs}, parameters, seconds)


def complete_text(
    system: System,
    spec: RunSpec,
    path: Path,
    prompt: str,
    *,
    tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """Returns ``prompt`` with its continuation by the language model of the finished run in ``path``."""
    check_seed(seed)
    _check_finished(path)
    model = system.load_trained(spec, path)
    return system.complete(model, path / system.model_folder, prompt, tokens, temperature, top_k, seed)


def format_result(system: System, result: Mapping[str, Any]) -> str:
    """Formats the table of one run."""
    try:
        return system.format(result)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"this result does not fit this version of xlayer: {type(error).__name__} {error}") from error


def build_model(system: System, spec: RunSpec, data: Any) -> TrainingModel:
    """Makes the model of a run before its first step."""
    seed_everything(spec.seed)
    backbone = system.load_backbone(spec.backbone)
    # Again, so that the new parameters do not depend on what loading drew.
    seed_everything(spec.seed)
    try:
        return system.build(backbone, spec.config, data, spec.options)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_finished(path: Path) -> None:
    if RunDirectory(path).result() is None:
        raise UserError(f"{path} is not finished; continue it with `xlayer train ... --run-dir {path} --resume`")


def _save_model(system: System, spec: RunSpec, data: Any, trainer: Trainer, folder: Path) -> None:
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    if accelerator.distributed_type.value == "FSDP":
        state = accelerator.get_state_dict(trainer.model)  # gathered from all processes
        if accelerator.is_main_process:
            model = build_model(system, spec, data)
            model.load_state_dict(state)
    if accelerator.is_main_process:
        system.save(model, data, folder)


def _result(
    system: System, spec: RunSpec, data: Any, last: Mapping[str, Any], parameters: int, seconds: float
) -> Record:
    measured = system.result(spec, data, last)
    return {**measured, "epochs": last["epoch"], "parameters": parameters, "seconds": round(seconds, 1)}


def _write_report(system: System, spec: RunSpec, data: Any, run: RunDirectory, result: Record) -> None:
    lines = [f"# {spec.system} {spec.preset} on {spec.dataset}", ""]
    lines += system.report(spec, data, result, run)
    evaluations = evaluations_of(run.metrics())
    if system.plot_usage(evaluations, run.path / "plots" / "usage.png"):
        lines += ["", f"![{system.usage_title}](plots/usage.png)"]
    run.write_text("report.md", "\n".join(lines) + "\n")
