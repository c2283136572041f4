"""Steps of the shared loop under a profiler: the loop itself, cut short, with its regions and those of its modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from xlayer_systems.errors import UserError
from xlayer_systems.runs.execute import build_model
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import System
from xlayer_systems.training.directory import RunDirectory
from xlayer_systems.training.regions import WINDOW, listening, module_regions, nvtx_region, region, torch_region
from xlayer_systems.training.trainer import Trainer, make_accelerator

EVAL_BATCHES = 1


class Capture(Protocol):
    """Is the interface of a profiler: entered before the first step, left after the evaluation."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> Any: ...

    def warm_up(self) -> None:
        """Ends a step that does not count; the step after the last of them does."""

    def open(self, name: str) -> AbstractContextManager[Any]:
        """Returns a region that it records."""


class TorchCapture:
    """Profiles with `torch.profiler`, which writes a Chrome trace to ``trace``."""

    def __init__(self, trace: Path, warmup: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(
            activities=activities,
            # All steps that count are one step of the profiler, so that its marks do not cut the regions.
            schedule=torch.profiler.schedule(wait=warmup - 1, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
            record_shapes=True,
        )

    def __enter__(self) -> None:
        self.profiler.start()

    def __exit__(self, *_: object) -> None:
        self.profiler.stop()

    def warm_up(self) -> None:
        self.profiler.step()

    def open(self, name: str) -> AbstractContextManager[Any]:
        return torch_region(name)


class NsightCapture:
    """Marks the capture range ``cudaProfilerApi`` in a process that Nsight Systems or Nsight Compute has started."""

    def __init__(self, warmup: int) -> None:
        self.left = warmup

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        torch.cuda.profiler.stop()

    def warm_up(self) -> None:
        self.left -= 1
        if not self.left:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()

    def open(self, name: str) -> AbstractContextManager[Any]:
        return nvtx_region(name)


class ShortValidation:
    """Restricts ``data`` to the first ``count`` of its validation examples."""

    def __init__(self, data: Any, count: int) -> None:
        self._data = data
        self.validation: Sequence[Any] = data.validation[:count]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


class ProfiledTrainer(Trainer):
    """Runs the loop with steps that count for ``capture`` after ``warmup`` of them. It keeps no checkpoints."""

    handles_signals = False

    def __init__(self, *arguments: Any, capture: Capture, warmup: int) -> None:
        super().__init__(*arguments)
        self.capture, self.warmup = capture, warmup
        self._window = ExitStack()

    def train(self) -> dict[str, Any]:
        """Trains as the loop does, under the profiler."""
        with self.capture, self._window:
            return super().train()

    def _step(self, batch: list[int], watch: bool = False) -> Tensor:
        step = self.progress.step
        if step == self.warmup:
            self._open_window()
        with region("step"):
            loss = super()._step(batch, watch)
        if step < self.warmup:
            self.capture.warm_up()
        return loss

    def _open_window(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        self._window.enter_context(listening(self.capture.open))
        self._window.enter_context(module_regions(model))
        for index, frozen in enumerate(model.frozen):  # held by the model, but no submodules of it
            self._window.enter_context(module_regions(frozen, f"frozen{index}."))
        self._window.enter_context(region(WINDOW))
        if torch.cuda.is_available():
            self._window.callback(torch.cuda.synchronize)  # what was queued in the window belongs to it

    def _evaluate(self) -> None:
        if self.progress.step == self.total_steps:  # not at the end of every epoch, which may be a few steps
            super()._evaluate()

    def _save_checkpoint(self, window: Sequence[Tensor] = ()) -> None:
        return


def run_steps(
    system: System, spec: RunSpec, data: Any, run: RunDirectory, capture: Capture, steps: int, warmup: int
) -> None:
    """Takes ``warmup`` steps, then ``steps`` of them and an evaluation on `EVAL_BATCHES` that count."""
    total = warmup + steps
    # An epoch has at least one step; whatever the options say, the loop ends after these steps.
    options = dataclasses.replace(
        spec.options, epochs=total, max_steps=total, eval_every=None, stop_below=None, tensorboard=False
    )
    accelerator = make_accelerator(options)
    if accelerator.num_processes > 1:
        raise UserError(f"a profile is taken of one process, not of {accelerator.num_processes}")
    model = build_model(system, spec, data)
    groups = system.parameter_groups(model, options)
    short = ShortValidation(data, EVAL_BATCHES * options.eval_batch_size)
    trainer = ProfiledTrainer(
        accelerator, model, groups, short, options, run, spec.seed, "profiling", capture=capture, warmup=warmup
    )
    trainer.train()
