"""A run of both stages: a run directory for each of its parts inside one that has the comparison.

::

    reconstruction/   stage 1
    task/             stage 2, of a bypass or of the LoRA alone
    lora/             the LoRA of the same size that a bypass is compared with
    metrics.jsonl     the records of all parts, each with its ``stage``
    model/            of the task

Every part is a run of the shared loop, so an interrupted run goes on inside the part that it was in.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from xlayer_systems.bypass.config import AdapterConfig, BypassConfig
from xlayer_systems.bypass.plots import plot_projectors
from xlayer_systems.bypass.report import PLAIN, RECONSTRUCTION, TASK, format_compared, format_reconstruction
from xlayer_systems.bypass.task import block_losses, compare
from xlayer_systems.data.blocks import IGNORED
from xlayer_systems.reporting.plots import plot_losses
from xlayer_systems.runs.execute import RunSpec, load_model, train_run
from xlayer_systems.training.directory import Record, RunDirectory, environment
from xlayer_systems.training.trainer import make_accelerator

LORA = "lora"
BASE = "model alone"


def train_stages(spec: RunSpec, path: Path, resume: bool) -> Record:
    """As `xlayer_systems.jobs.train_run`, for a spec of both stages; ``path`` was checked there."""
    started = time.perf_counter()
    data = spec.recipe.objective.prepare(spec)
    accelerator = make_accelerator(spec.options)
    with RunDirectory(path, accelerator.is_main_process) as run:
        return _train_parts(spec, accelerator, data, run, resume, started)


def _train_parts(spec: RunSpec, accelerator: Any, data: Any, run: RunDirectory, resume: bool, started: float) -> Record:
    path = run.path
    description, surroundings = spec.to_dict(), environment(data.fingerprint)
    exists = path.exists()
    accelerator.wait_for_everyone()
    if resume and exists:
        finished = run.hold(description, surroundings)
        if finished is not None:
            return finished
    else:
        run.create(description, surroundings)
    accelerator.wait_for_everyone()
    parts = parts_of(spec, path)
    results = {name: train_run(part, path / name, resume=True) for name, part in parts.items()}
    accelerator = make_accelerator(spec.options)  # the parts have made their own
    result: Record = {}
    if accelerator.is_main_process:
        result = _compare(spec, parts, results, path, accelerator.device)
        result["seconds"] = round(time.perf_counter() - started, 1)
        _join(spec, parts, run)
        run.write_text("report.md", _report(spec, parts, result, run))
        run.write_json("result.json", result)
    accelerator.wait_for_everyone()
    return result or run.result() or {}


def parts_of(spec: RunSpec, path: Path) -> dict[str, RunSpec]:
    """The runs that ``spec`` is made of, by the name of their folder, in their order."""
    config, options, parts = spec.config, spec.options, {}
    as_lora = dataclasses.replace(options, learning_rate=options.lora_rate)
    if isinstance(config, AdapterConfig):
        parts[TASK] = dataclasses.replace(spec, config=dataclasses.replace(config, stage="task"), options=as_lora)
    if isinstance(config, BypassConfig):
        encoder = config.encoder
        if encoder is None:
            encoder = str(path / RECONSTRUCTION / "model")
            steps, rate = options.reconstruct_steps, options.reconstruct_rate
            parts[RECONSTRUCTION] = dataclasses.replace(
                spec,
                config=dataclasses.replace(config, stage="reconstruct"),
                options=dataclasses.replace(options, max_steps=steps, learning_rate=rate),
            )
        parts[TASK] = dataclasses.replace(spec, config=dataclasses.replace(config, stage="task", encoder=encoder))
        if options.compare:
            adapter = AdapterConfig(config.model, config.latent, stage="task")
            parts[LORA] = dataclasses.replace(spec, preset=LORA, config=adapter, options=as_lora)
    return parts


def _compare(spec: RunSpec, parts: dict[str, RunSpec], results: dict[str, Record], path: Path, device: Any) -> Record:
    """Every model's loss on the same blocks, and what is known of stage 1."""
    options = dataclasses.replace(spec.options, eval_blocks=spec.options.compare_blocks)
    data = spec.recipe.objective.prepare(dataclasses.replace(spec, options=options))
    base = spec.recipe.load(path / "nothing", spec.recipe.load_backbone(spec.backbone))
    losses = {BASE: block_losses(base, data, device)}
    trained = {}
    for name, part in parts.items():
        if name != RECONSTRUCTION:
            label = part.preset
            model = load_model(part, path / name)
            trained[label] = _trained(part, model)
            losses[label] = block_losses(model, data, device)
    compared = compare(losses, BASE)
    compared |= {"blocks": len(data.validation), "base_parameters": sum(p.numel() for p in base.parameters())}
    for label, count in trained.items():
        compared["rows"][label]["parameters"] = count
    mine = fmean(losses[BASE if spec.preset == PLAIN else spec.preset])
    result: Record = {
        "system": spec.system,
        "preset": spec.preset,
        "dataset": spec.dataset,
        "backbone": spec.backbone,
        "seed": spec.seed,
        "loss": mine,
        "perplexity": math.exp(min(mine, 700.0)),
        "validation_tokens": int((torch.stack(list(data.validation))[:, 1:] != IGNORED).sum()),
        "tokens_per_step": spec.options.batch_size * spec.options.max_length,
        "compared": compared,
        "parameters": trained.get(spec.preset, 0),
    }
    if RECONSTRUCTION in results:
        names = ("r2", "r2_mean", "pca", "latent", "parameters")
        result[RECONSTRUCTION] = {name: results[RECONSTRUCTION][name] for name in names}
    return result


def _trained(part: RunSpec, model: Any) -> int:
    """Parameters that the part trained, of its loaded and frozen model."""
    if isinstance(part.config, BypassConfig):
        return int(model.bypass.projectors.numel())
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def _join(spec: RunSpec, parts: dict[str, RunSpec], run: RunDirectory) -> None:
    """The records of the parts as one file, the model of the task as the run's."""
    (run.path / "metrics.jsonl").unlink(missing_ok=True)
    for name in parts:
        for record in RunDirectory(run.path / name).metrics():
            run.log({**record, "stage": name})
    model = run.path / "model"
    shutil.rmtree(model, ignore_errors=True)
    if TASK in parts:
        shutil.copytree(run.path / TASK / "model", model)
    else:
        model.mkdir()


def _report(spec: RunSpec, parts: dict[str, RunSpec], result: Record, run: RunDirectory) -> str:
    compared = result["compared"]
    base, plots = compared["base_parameters"], run.path / "plots"
    lines = [f"# {spec.system} {spec.preset} on {spec.dataset}", "", f"On `{spec.backbone}`, seed {spec.seed}.", ""]
    if RECONSTRUCTION in result:
        stage = result[RECONSTRUCTION]
        lines += ["## Stage 1: reconstruction of every layer's hidden states", ""]
        lines += [f"{stage['parameters']:,} trained parameters, {100 * stage['parameters'] / base:.2f} % of the model."]
        lines += ["", "```", *format_reconstruction(stage), "```", ""]
        lines += [f"![R² per layer, and over the steps]({RECONSTRUCTION}/plots/reconstruction.png)", ""]
    lines += ["## Stage 2: the task", "", "```", *format_compared(compared), "```"]
    curves = {}
    for name, part in parts.items():
        evaluations = [r for r in RunDirectory(run.path / name).metrics() if r["event"] == "eval"]
        if name != RECONSTRUCTION:
            curves[part.preset] = [[(r["step"] * result["tokens_per_step"], r["loss"]) for r in evaluations]]
        if name == TASK and plot_projectors(evaluations, plots / "usage.png"):
            lines += ["", f"![{spec.recipe.usage_title}](plots/usage.png)"]
    if curves:
        plot_losses(curves, plots / "curves.png")
        lines += ["", "![validation loss](plots/curves.png)"]
    return "\n".join(lines) + "\n"
