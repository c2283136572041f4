"""The baseline without a side path: ``head_only`` with as many parameters, trained on the same batches as the run."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from xlayer_systems.data.batches import epoch_batches
from xlayer_systems.lformer.data import ToolData
from xlayer_systems.lformer.path import count
from xlayer_systems.lformer.training_model import Trainee
from xlayer_systems.training.directory import Record
from xlayer_systems.training.optim import linear_schedule
from xlayer_systems.training.trainer import evaluate, seed_everything

if TYPE_CHECKING:
    from xlayer_systems.runs.execute import RunSpec


def run_baseline(spec: RunSpec, data: ToolData, device: torch.device) -> Record:
    """Train ``head_only`` in place of the run's aggregator: the same batches, steps, rates and phases, on one device.

    Returns:
        Its metrics, those at the end of ``phase_a`` where there is one, ``path_parameters``, ``seconds``, and
        ``base_lm_loss``: that of the base before any training.
    """
    started = time.perf_counter()
    config = dataclasses.replace(
        spec.config, aggregator="head_only", equal_to=spec.config.aggregator, tree_checkpoint=0, gate_l1=0.0,
        gate_l2=0.0, blend_into_lm=False, sequence_wise=spec.config.is_sequence_wise,
    )  # fmt: skip
    seed_everything(spec.seed)
    backbone = spec.recipe.load_backbone(spec.backbone)
    seed_everything(spec.seed)
    trainee: Any = spec.recipe.build(backbone, config, data, spec.options).to(device)
    base_lm_loss = _evaluate(trainee, data, spec.options.eval_batch_size)["lm_loss"]
    seed_everything(spec.seed * 1000)  # as the loop does: dropout
    phase_a = _train(trainee, data, spec, device)
    metrics = _evaluate(trainee, data, spec.options.eval_batch_size)
    return {
        **metrics,
        "phase_a": phase_a,
        "path_parameters": count(trainee.model.path),
        "seconds": round(time.perf_counter() - started, 1),
        "base_lm_loss": base_lm_loss,
    }


def _train(trainee: Trainee, data: ToolData, spec: RunSpec, device: torch.device) -> dict[str, Any] | None:
    """The shared loop without its files and processes; returns the metrics at the end of phase A."""
    options = spec.options
    lengths = data.lengths()
    total = min(options.epochs * (len(lengths) // options.batch_size), options.max_steps or 10**9)
    optimizer = torch.optim.AdamW(spec.recipe.parameter_groups(trainee, options), betas=(0.9, 0.999), eps=1e-8)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = linear_schedule(optimizer, total, options.warmup)
    size, step, epoch = options.micro_batch(1), 0, 0
    phase_a: dict[str, Any] | None = None
    trainee.train()
    while step < total:
        for batch in epoch_batches(lengths, options.batch_size, spec.seed, epoch)[: total - step]:
            trainee.begin_step(step)
            for start in range(0, options.batch_size, size):
                examples = [data.train[index] for index in batch[start : start + size]]
                inputs = {key: value.to(device) for key, value in data.collate(examples).items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype != "float32"):
                    loss = trainee(**inputs).loss
                (loss / options.accumulate).backward()
            torch.nn.utils.clip_grad_norm_(parameters, options.clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step == options.phase_a_steps:
                phase_a = _evaluate(trainee, data, options.eval_batch_size)
        epoch += 1
    return phase_a


def _evaluate(trainee: Trainee, data: ToolData, batch_size: int) -> dict[str, Any]:
    device = next(trainee.parameters()).device
    alone = SimpleNamespace(num_processes=1, process_index=0, device=device, reduce=lambda sums, how: sums)
    return evaluate(alone, trainee, data, batch_size)
