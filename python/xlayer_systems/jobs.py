"""One run from its description to its report: `RunSpec` → `train_run`, and `evaluate_run` for a finished one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from xlayer_systems import backbones
from xlayer_systems.data import TextTask, load_task
from xlayer_systems.data.batches import ClassificationData
from xlayer_systems.errors import UserError
from xlayer_systems.options import TrainOptions, apply_overrides, split_overrides
from xlayer_systems.plots import plot_curves
from xlayer_systems.recipes import Recipe, get_recipe
from xlayer_systems.runs import Record, RunDirectory, environment
from xlayer_systems.stats import wilson_interval
from xlayer_systems.training import Trainer, evaluate, make_accelerator, seed_everything


@dataclass(frozen=True)
class RunSpec:
    """Everything that defines a run; ``config`` is the system's own dataclass or None for the plain backbone."""

    system: str
    preset: str
    dataset: str
    backbone: str
    seed: int
    config: Any
    options: TrainOptions

    @property
    def recipe(self) -> Recipe:
        """The recipe of the system."""
        return get_recipe(self.system)

    def to_dict(self) -> Record:
        """JSON-able; `from_dict` is the inverse."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        config = None if self.config is None else dataclasses.asdict(self.config)
        weights = backbones.fingerprint(self.backbone)
        return {**fields, "config": config, "options": dataclasses.asdict(self.options), "backbone_weights": weights}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> RunSpec:
        """From a run directory's config.json."""
        try:
            kept = {field.name: stored[field.name] for field in dataclasses.fields(cls)}
            base = get_recipe(stored["system"]).config(stored["preset"])
            config = None if stored["config"] is None else dataclasses.replace(base, **stored["config"])
            return cls(**{**kept, "config": config, "options": TrainOptions(**stored["options"])})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this run's config.json does not fit this version of xlayer: {error}") from error


def make_spec(
    system: str,
    preset: str,
    *,
    dataset: str = "stdlib-topics",
    backbone: str = backbones.SMALL,
    seed: int = 0,
    quick: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> RunSpec:
    """Defaults of system, preset, data set and backbone, changed by ``overrides`` of options and system config."""
    recipe = get_recipe(system)
    config = recipe.config(preset)
    options = recipe.options(preset, dataset, backbone, quick)
    for_options, for_config = split_overrides(overrides or {}, options, config)
    options = apply_overrides(options, for_options)
    if config is not None:
        config = apply_overrides(config, for_config)
    return RunSpec(system, preset, dataset, backbone, seed, config, options)


@lru_cache(maxsize=2)
def prepare_data(dataset: str, backbone: str, max_length: int) -> ClassificationData:
    """The tokenized task; cached, because the runs of a sweep share it."""
    task = load_task(dataset)
    tokenizer = backbones.load_tokenizer(backbone)
    longest = min(max_length, tokenizer.model_max_length)
    return ClassificationData(task, tokenizer, longest)


def train_run(spec: RunSpec, path: Path, resume: bool = False) -> Record:
    """Train ``spec`` in the run directory ``path`` and return its result.json.

    With ``resume`` an interrupted run goes on from its checkpoint, a finished one only returns its result, and one that
    does not exist yet starts.
    """
    started = time.perf_counter()
    if path.exists() and not resume:
        raise UserError(f"run directory {path} exists; choose another --run-dir, or continue it with --resume")
    accelerator = make_accelerator(spec.options)
    run = RunDirectory(path, accelerator.is_main_process)
    resume = resume and path.exists()
    accelerator.wait_for_everyone()
    data = prepare_data(spec.dataset, spec.backbone, spec.options.max_length)
    if getattr(spec.config, "needs_pairs", False) and not data.task.has_pairs:
        raise UserError(
            f"preset {spec.preset} reads sentence pairs, and {spec.dataset} has single texts; "
            "expected a data set such as stdlib-pairs or glue/rte"
        )
    description, surroundings = spec.to_dict(), environment(data.task.fingerprint)
    if resume:
        run.check_resumable(description, surroundings)
        finished = run.result()
        if finished is not None:
            return finished
    model = _build(spec, data.task)
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
    _save_model(spec, data.task, trainer, path / "model")
    result = _result(spec, data.task, last, parameters, time.perf_counter() - started)
    if accelerator.is_main_process:
        _write_plots_and_report(spec, data.task, run, result)
    run.write_json("result.json", result)
    accelerator.wait_for_everyone()
    return result


def evaluate_run(path: Path) -> Record:
    """Evaluate the saved model of a finished run on the whole validation set."""
    run = RunDirectory(path)
    spec = RunSpec.from_dict(run.read_config()["run"])
    if run.result() is None:
        raise UserError(f"{path} is not finished; continue it with `xlayer train ... --run-dir {path} --resume`")
    data = prepare_data(spec.dataset, spec.backbone, spec.options.max_length)
    if data.task.fingerprint != run.read_config()["environment"]["data_hash"]:
        raise UserError(f"{path} was trained on other data: {spec.dataset} has another corpus hash on this machine")
    accelerator = make_accelerator(spec.options)
    model = accelerator.prepare(spec.recipe.load(path / "model", backbones.load_backbone(spec.backbone)))
    metrics = evaluate(accelerator, model, data, spec.options.eval_batch_size)
    parameters = sum(p.numel() for p in model.parameters())
    return _result(spec, data.task, {**metrics, "epoch": spec.options.epochs}, parameters, 0.0)


def format_result(result: Mapping[str, Any]) -> str:
    """The table of one run: baselines and the trained model, on the whole validation set."""
    rows = [("majority", result["majority"])]
    if result["lexical"] is not None:
        rows.append(("lexical overlap", result["lexical"]))
    rows.append((f"{result['system']} {result['preset']}", result["accuracy"]))
    total = result["accuracy"]["total"]
    lines = [f"{result['dataset']}: accuracy on all {total} validation examples (Wilson 95 % interval)"]
    lines += [f"  {name:<18} {_percent(row)}" for name, row in rows]
    return "\n".join(lines)


def _percent(row: Mapping[str, Any]) -> str:
    return f"{100 * row['mean']:5.1f} %  [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _build(spec: RunSpec, task: TextTask) -> nn.Module:
    seed_everything(spec.seed)
    backbone = backbones.load_backbone(spec.backbone)
    # Again, so that the new parameters do not depend on what loading drew.
    seed_everything(spec.seed)
    return spec.recipe.build(backbone, spec.config, len(task.labels), spec.options)


def _save_model(spec: RunSpec, task: TextTask, trainer: Trainer, folder: Path) -> None:
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    if getattr(accelerator, "is_fsdp2", False) or accelerator.distributed_type.value == "FSDP":
        state = accelerator.get_state_dict(trainer.model)  # gathered from all processes
        if accelerator.is_main_process:
            model = _build(spec, task)
            model.load_state_dict(state)
    if accelerator.is_main_process:
        spec.recipe.save(model, folder)


def _result(spec: RunSpec, task: TextTask, last: Mapping[str, Any], parameters: int, seconds: float) -> Record:
    lexical = task.lexical()
    return {
        "system": spec.system,
        "preset": spec.preset,
        "dataset": spec.dataset,
        "backbone": spec.backbone,
        "seed": spec.seed,
        "majority": _counted(*task.majority()),
        "lexical": None if lexical is None else _counted(*lexical),
        "accuracy": _counted(last["correct"], last["total"]),
        "macro_f1": last["macro_f1"],
        "loss": last["loss"],
        "epochs": last["epoch"],
        "parameters": parameters,
        "seconds": round(seconds, 1),
    }


def _counted(correct: int, total: int) -> Record:
    return {**dataclasses.asdict(wilson_interval(correct, total)), "correct": correct, "total": total}


def _write_plots_and_report(spec: RunSpec, task: TextTask, run: RunDirectory, result: Record) -> None:
    records = run.metrics()
    plot_curves({spec.preset: [records]}, run.path / "plots" / "curves.png", result["majority"]["mean"])
    has_usage = spec.recipe.plot([r for r in records if r["event"] == "eval"], run.path / "plots" / "usage.png")
    epochs = [r for r in records if r["event"] == "eval"]
    lines = [
        f"# {spec.system} {spec.preset} on {spec.dataset}",
        "",
        f"Backbone `{spec.backbone}`, seed {spec.seed}, {result['parameters']:,} parameters, "
        f"{len(task.train)} training and {len(task.validation)} validation examples.",
        "",
        "```",
        format_result(result),
        "```",
        "",
        "| epoch | training loss | validation loss | accuracy | macro F1 |",
        "|---|---|---|---|---|",
    ]
    for r in epochs:
        lines.append(
            f"| {r['epoch']} | {r.get('train_loss', float('nan')):.4f} | {r['loss']:.4f} | {r['accuracy']:.4f} "
            f"| {r['macro_f1']:.4f} |"
        )
    if any(record["event"] == "stopped" for record in records):
        lines += ["", f"Stopped after epoch 1: its accuracy was below {spec.options.stop_below}."]
    lines += ["", "![curves](plots/curves.png)"]
    if has_usage:
        lines += ["", "![gates, messages and routing](plots/usage.png)"]
    run.write_text("report.md", "\n".join(lines) + "\n")
