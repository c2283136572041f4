"""The training loop that every system shares, on Accelerate.

A system brings a `TrainingModel`, its parameter groups, and its data in the shape of `TrainingData`. Started through
``accelerate launch`` the same loop runs under DDP or FSDP2 on many devices (with the run directory on a shared disk); a
batch is then divided among the processes, so the run takes the same steps as on one.

A run that is killed and resumed ends with the same bits on the CPU: a checkpoint holds model, optimizer, schedule,
random state and position, and what was logged after it is cut off again. SIGINT and SIGTERM end a run after the step
that it is in, with a checkpoint; a loss, metric or parameter that is not finite ends it without one.
"""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from xlayer_ext.memory import keep_freed_memory
from xlayer_systems.data.batches import epoch_batches
from xlayer_systems.errors import DivergenceError, InterruptionError, UserError
from xlayer_systems.training.checkpoints import TrainingState, is_divided, whole
from xlayer_systems.training.directory import Record, RunDirectory, flatten
from xlayer_systems.training.model import TrainingModel
from xlayer_systems.training.optim import linear_schedule
from xlayer_systems.training.options import DTYPES, LoopOptions
from xlayer_systems.training.regions import region

LOG = logging.getLogger(__name__)
ANNOUNCED = ("loss", "accuracy", "r2_mean", "lm_loss")  # metrics in the line about an evaluation
EMA_DECAY = 0.98


class TrainingData(Protocol):
    """Is the interface of a data set."""

    @property
    def train(self) -> Sequence[Any]:
        """Returns the training examples."""

    @property
    def validation(self) -> Sequence[Any]:
        """Returns the validation examples."""

    def lengths(self) -> list[int]:
        """Returns the number of tokens of each training example."""

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Returns a batch, to be passed to the model as keyword arguments."""

    def score(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """Returns what is summed over validation, ``[B, m]`` float64, one row per example."""

    def summarize(self, sums: Tensor) -> dict[str, float | int]:
        """Returns the metrics from the sum ``[m]`` over all validation examples."""


@dataclass
class Progress:
    """Holds the position of a run; part of its checkpoints. ``window`` has the losses that were not logged yet."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    metrics_size: int = 0
    epoch_loss: float = 0.0
    loss_ema: float = 0.0
    is_stopped: bool = False
    last_evaluation: Record = field(default_factory=dict)
    window: list[float] = field(default_factory=list)

    def to_dict(self) -> Record:
        """Returns a JSON-able dict; `from_dict` is the inverse."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Progress:
        """Reads a checkpoint's progress; other names, other types and negative counts raise ValueError."""
        expected = vars(cls())
        if state.keys() != expected.keys():
            raise ValueError(f"progress must have {', '.join(expected)}, got {', '.join(map(str, state))}")
        for name, value in state.items():
            wanted = type(expected[name])
            if type(value) is not wanted or (wanted is int and value < 0):
                raise ValueError(f"{name} of the progress must be of type {wanted.__name__}, got {value!r}")
        if not all(type(loss) is float for loss in state["window"]):
            raise ValueError("window of the progress must hold numbers")
        return cls(**state)


class StopSignals:
    """Catches SIGINT and SIGTERM as a request, in ``caught``, instead of the end of the process.

    Only in the main thread and inside ``with``; the handlers are afterwards what they were. A second SIGINT ends the
    process at once. A second SIGTERM does not: launchers and schedulers may both send one.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # An ignored signal, as SIGINT in background jobs, stays so; None is a handler that is not Python's.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.caught = number
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def make_accelerator(options: LoopOptions) -> Any:
    """Returns an `accelerate.Accelerator` for these options; a second run in one process may use another precision."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(
        mixed_precision=DTYPES[options.dtype],
        gradient_accumulation_steps=options.accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=options.unused_parameters)],
    )


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, and asks torch for deterministic kernels where it has them."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Trainer:
    """Runs the loop once.

    Raises `InterruptionError` after SIGINT or SIGTERM and a checkpoint, `DivergenceError` where numbers are not finite.

    Args:
        accelerator: from `make_accelerator`.
        model: the model, on any device.
        groups: parameter groups for AdamW.
        data: training and validation examples.
        options: how to train.
        run: where to log and to keep checkpoints.
        seed: order of the examples and dropout.
        name: shown beside the progress bar.
    """

    handles_signals = True

    def __init__(
        self,
        accelerator: Any,
        model: TrainingModel,
        groups: list[dict[str, Any]],
        data: TrainingData,
        options: LoopOptions,
        run: RunDirectory,
        seed: int,
        name: str = "training",
    ) -> None:
        self.accelerator, self.data, self.options, self.run = accelerator, data, options, run
        self.seed, self.name = seed, name
        self.lengths = data.lengths()
        self.micro_batch = options.micro_batch(accelerator.num_processes)
        self.steps_per_epoch = len(self.lengths) // options.batch_size
        if options.epochs and not self.steps_per_epoch:
            raise UserError(f"batch_size {options.batch_size} is more than the {len(self.lengths)} training examples")
        self.total_steps = options.epochs * self.steps_per_epoch
        if options.max_steps is not None:
            self.total_steps = min(self.total_steps, options.max_steps)
        if accelerator.distributed_type.value == "FSDP" and not accelerator.is_fsdp2:
            raise UserError("checkpoints need FSDP2; choose it with fsdp_version: 2 in the config of accelerate")
        if options.gradient_checkpointing:
            try:
                model.gradient_checkpointing_enable()
            except ValueError as error:
                raise UserError(str(error)) from error
        if accelerator.device.type == "cpu":
            # Fresh pages for every large tensor can cost more than the kernel that fills it.
            keep_freed_memory()
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.schedule = linear_schedule(optimizer, self.total_steps, options.warmup)
        self.progress = Progress()
        self.gradient_norms: dict[str, float] = {}
        self.state = TrainingState(accelerator, self.model, self.optimizer, self.schedule)
        self.signals = StopSignals()
        self._agreed_signal: int | None = None
        self._announced = (0, 0.0)  # step and time of the last line
        self._shown_loss = ""
        # After the model was built, so that its parameters do not depend on the number of processes.
        seed_everything(seed * 1000 + accelerator.process_index)

    def resume(self) -> None:
        """Goes back to the newest checkpoint, or to the start when there is none; a damaged one raises `UserError`."""
        checkpoint = self.run.latest_checkpoint()
        if checkpoint is not None:
            try:
                self.progress = Progress.from_dict(self.state.load(checkpoint))
            except ValueError as error:
                raise UserError(f"the checkpoint {checkpoint} is damaged: {error}") from error
        self.run.cut_metrics(self.progress.metrics_size)

    def train(self) -> Record:
        """Trains to the end and returns the last evaluation."""
        if self.options.tensorboard:
            self.run.open_tensorboard(self.progress.step)
        self._announced = (self.progress.step, time.perf_counter())
        with nullcontext() if not self.handles_signals else self.signals, self._progress_bar() as advance:
            while self.progress.step < self.total_steps and not self.progress.is_stopped:
                self._train_epoch(advance)
                self._end_if_asked()
        if not self.total_steps:
            self._evaluate()
        self.accelerator.wait_for_everyone()
        self.run.close_tensorboard()
        return self.progress.last_evaluation

    def _train_epoch(self, advance: Any) -> None:
        progress, options = self.progress, self.options
        batches = epoch_batches(self.lengths, options.batch_size, self.seed, progress.epoch)
        batches = batches[: progress.batch + self.total_steps - progress.step]
        started, first_batch = time.perf_counter(), progress.batch
        window = [torch.tensor(loss, dtype=torch.float64, device=self.accelerator.device) for loss in progress.window]
        progress.window = []
        self.model.train()
        for batch in batches[progress.batch :]:
            is_last = progress.batch + 1 == len(batches)
            is_checkpoint = self._is_due(options.checkpoint_every) and not is_last
            is_evaluation = self._is_due(options.eval_every) or is_last
            self._begin_step()
            window.append(self._step(batch, watch=is_evaluation))
            progress.step += 1
            progress.batch += 1
            if progress.step % options.log_every == 0 or is_checkpoint or is_evaluation:
                self._log_window(window)
                window.clear()
            if is_evaluation:
                self._evaluate_on_time(progress.batch - first_batch, started)
                started, first_batch = time.perf_counter(), progress.batch
            is_asked = self._stop_signal() is not None and not is_last
            if is_checkpoint or is_asked:
                self._save_checkpoint(window)
            advance()
            if is_asked:
                self._end_if_asked()
        accuracy = progress.last_evaluation.get("accuracy")
        if options.stop_below is not None and progress.epoch == 0 and accuracy is not None:
            progress.is_stopped = accuracy < options.stop_below
        if progress.is_stopped:
            self.run.log({"event": "stopped", "step": progress.step, "epoch": 1, "below": options.stop_below})
        progress.epoch, progress.batch, progress.epoch_loss = progress.epoch + 1, 0, 0.0
        self._save_checkpoint()

    def _stop_signal(self) -> int | None:
        """Returns the signal to stop for now; processes that train together agree on it whenever they log."""
        return self._agreed_signal if self.accelerator.num_processes > 1 else self.signals.caught

    def _end_if_asked(self) -> None:
        """Leaves the loop after a checkpoint, when a signal asked for it."""
        number = self._stop_signal()
        if number is not None:
            self.accelerator.wait_for_everyone()
            self.run.close_tensorboard()
            name = signal.Signals(number).name
            raise InterruptionError(
                f"{self.run.path}: {name} after step {self.progress.step} of {self.total_steps}; the checkpoint is "
                "written, go on with --resume",
                number,
            )

    def _is_due(self, every: int | None) -> bool:
        """Tells whether a periodic action is due after this step."""
        return every is not None and (self.progress.step + 1) % every == 0

    def _begin_step(self) -> None:
        self.accelerator.unwrap_model(self.model).begin_step(self.progress.step)

    def _step(self, batch: list[int], watch: bool = False) -> Tensor:
        """Takes one optimizer step on the examples ``batch``; returns this process's mean loss without synchronizing.

        ``watch`` keeps the norms of the layers' gradients.
        """
        losses = []
        for part in range(self.options.accumulate):
            start = (part * self.accelerator.num_processes + self.accelerator.process_index) * self.micro_batch
            with region("data"):
                examples = [self.data.train[index] for index in batch[start : start + self.micro_batch]]
                inputs = self._on_device(self.data.collate(examples))
            with self.accelerator.accumulate(self.model):
                with region("forward"):
                    loss = self.model(**inputs).loss
                with region("backward"):
                    self.accelerator.backward(loss)
                with region("optimizer"):
                    if self.accelerator.sync_gradients:
                        norm = self.accelerator.clip_grad_norm_(self.parameters, self.options.clip)
                        if watch:
                            self.gradient_norms = self._layer_gradient_norms(norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            losses.append(loss.detach().double())
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        return torch.stack(losses).mean()

    def _log_window(self, window: list[Tensor]) -> None:
        # This reduction carries any process's signal to all of them, where they synchronize anyway.
        asked = torch.tensor(float(self.signals.caught or 0), dtype=torch.float64, device=self.accelerator.device)
        *losses, asked_by_any = self.accelerator.reduce(torch.stack([*window, asked]), "mean").tolist()
        if asked_by_any:
            self._agreed_signal = self.signals.caught or signal.SIGTERM
        progress = self.progress
        for step, loss in enumerate(losses, progress.step + 1 - len(losses)):
            if not math.isfinite(loss):
                self._diverged(f"the training loss of step {step} is {loss}")
        for loss in losses:
            progress.loss_ema = EMA_DECAY * progress.loss_ema + (1 - EMA_DECAY) * loss
        progress.epoch_loss += sum(losses)
        self.run.log(
            {
                "event": "train",
                "step": progress.step,
                "epoch": progress.epoch + 1,
                "loss": sum(losses) / len(losses),
                "loss_ema": progress.loss_ema / (1 - EMA_DECAY**progress.step),
                "learning_rate": max(self.schedule.get_last_lr()),
            }
        )
        self._announce(sum(losses) / len(losses))

    def _announce(self, loss: float) -> None:
        """Shows the training loss: beside the progress bar, or in a line of its own where there is no terminal."""
        self._shown_loss = f"loss {loss:.4f}"
        if _has_terminal():
            return
        (step, then), now = self._announced, time.perf_counter()
        speed = (self.progress.step - step) / max(now - then, 1e-9)
        LOG.info(
            "%s: step %d of %d, loss %.4f, %.3g steps/s", self.name, self.progress.step, self.total_steps, loss, speed
        )
        self._announced = (self.progress.step, now)

    def _diverged(self, what: str) -> NoReturn:
        self.run.close_tensorboard()
        checkpoint = self.run.latest_checkpoint()
        kept = f"its last checkpoint is {checkpoint.name}" if checkpoint is not None else "it has no checkpoint yet"
        raise DivergenceError(f"{self.run.path} diverged: {what}; {kept}; smaller learning rates may help")

    def _check_parameters(self) -> None:
        """Ends the run when a trained parameter is not finite: a step may break what its own loss does not show."""
        local = [p.detach().to_local() if is_divided(p) else p.detach() for p in self.parameters]
        broken = torch.stack([~torch.isfinite(p).all() for p in local]).sum().double()
        if self.accelerator.reduce(broken, "sum").item():
            self._diverged(f"parameters are not finite after step {self.progress.step}")

    def _layer_gradient_norms(self, total: Any) -> dict[str, float]:
        """Returns the gradient norm of each layer, before it was clipped from the norm ``total``; {} without layers."""
        groups = self.accelerator.unwrap_model(self.model).gradient_groups()
        if not groups:
            return {}
        scale = max(1.0, float(whole(total)) / self.options.clip)
        return {name: scale * gradient_norm(parameters) for name, parameters in groups.items()}

    def _evaluate_on_time(self, steps: int, started: float) -> None:
        trained = time.perf_counter()
        self._evaluate()
        timing = {"epoch": self.progress.epoch, "steps": steps, "train_seconds": trained - started}
        self.run.log_time({**timing, "eval_seconds": time.perf_counter() - trained})

    def _evaluate(self) -> None:
        model, progress = self.accelerator.unwrap_model(self.model), self.progress
        model.usage(reset=True)
        started = time.perf_counter()
        with region("eval"):
            try:
                metrics = evaluate(self.accelerator, self.model, self.data, self.options.eval_batch_size)
            except DivergenceError as error:
                self._diverged(f"after step {progress.step} {error}")
        record: Record = {"event": "eval", "step": progress.step, "epoch": progress.epoch + 1, **metrics}
        if progress.batch:
            record["train_loss"] = progress.epoch_loss / progress.batch
        # Gathered over validation, not over training: then it does not depend on where a run was interrupted.
        usage = model.usage(reset=True)
        if usage is not None:
            record["usage"] = usage
        if self.gradient_norms:
            record["gradient_norms"] = self.gradient_norms
        self.run.log(record)
        progress.last_evaluation = record
        now = time.perf_counter()
        found = ", ".join(f"{name} {metrics[name]:.4f}" for name in ANNOUNCED if name in metrics)
        LOG.info(
            "%s: step %d, %d validation examples: %s (%.1f s)",
            self.name, progress.step, len(self.data.validation), found or "no loss", now - started,
        )  # fmt: skip
        self._announced = (progress.step, self._announced[1] + now - started)  # evaluations are no training time

    def _save_checkpoint(self, window: Sequence[Tensor] = ()) -> None:
        """Writes a checkpoint; ``window`` has the losses that were not logged yet."""
        self._check_parameters()
        self.progress.metrics_size = self.run.metrics_size()
        progress = {**self.progress.to_dict(), "window": [float(loss) for loss in window]}
        self.run.save_checkpoint(
            self.progress.step, lambda folder: self.state.save(folder, progress), self.accelerator.wait_for_everyone
        )

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.accelerator.device, non_blocking=True) for key, value in batch.items()}

    @contextmanager
    def _progress_bar(self) -> Iterator[Any]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        described, loss = TextColumn("{task.description}"), TextColumn("{task.fields[loss]}")
        columns = (described, BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())
        is_hidden = not (self.accelerator.is_main_process and _has_terminal())
        console = Console(stderr=True)
        with Bar(*columns, console=console, disable=is_hidden, transient=True, redirect_stdout=False) as bar:
            task = bar.add_task(self.name, total=self.total_steps, completed=self.progress.step, loss="")
            yield lambda: bar.update(task, advance=1, loss=self._shown_loss)


def _has_terminal() -> bool:
    """Tells whether the progress bar has a terminal; announcements go where it would be."""
    return sys.stderr.isatty()


def evaluate_alone(model: nn.Module, data: TrainingData, batch_size: int) -> dict[str, float | int]:
    """Computes the metrics as `evaluate` does, in this process alone, on the device of the model's parameters."""
    device = next(model.parameters()).device
    alone = SimpleNamespace(num_processes=1, process_index=0, device=device, reduce=lambda sums, how: sums)
    return evaluate(alone, model, data, batch_size)


def evaluate(accelerator: Any, model: nn.Module, data: TrainingData, batch_size: int) -> dict[str, float | int]:
    """Computes the metrics of ``model`` over the whole validation set, divided among the processes; each example counts
    once."""
    total = len(data.validation)
    was_training = model.training
    model.eval()
    sums: Tensor | None = None
    with torch.no_grad():
        for start in range(0, total, batch_size * accelerator.num_processes):
            # Every process runs the same number of batches (FSDP needs that); positions past the end do not count.
            first = start + accelerator.process_index * batch_size
            positions = range(first, min(first + batch_size, max(total, first + 1)))
            examples = [data.validation[min(position, total - 1)] for position in positions]
            batch = {key: value.to(accelerator.device) for key, value in data.collate(examples).items()}
            scores = data.score(model(**batch), batch)
            kept = torch.tensor([position < total for position in positions], device=scores.device)
            part = (scores * kept[:, None]).sum(0)
            sums = part if sums is None else sums + part
    model.train(was_training)
    if sums is None:
        raise UserError("the validation set is empty")
    sums = accelerator.reduce(sums, "sum").cpu()
    if not sums.isfinite().all():
        raise DivergenceError("sums over the validation set are not finite")
    metrics = data.summarize(sums)
    for name, value in flatten(metrics):
        if isinstance(value, float) and not math.isfinite(value):
            raise DivergenceError(f"the metric {name} is {value}")
    return metrics


def gradient_norm(parameters: Sequence[Tensor]) -> float:
    """Returns the norm of the gradients of ``parameters``, divided by FSDP2 or not; every process must ask."""
    squares = [whole(p.grad.detach().float().square().sum()) for p in parameters if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
