"""Helpers of the tests of runs: a small model, its trainer, and runs that end early."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from training_tools import Numbers, Output
from xlayer_systems.errors import UserError
from xlayer_systems.training.checkpoints import TrainingState
from xlayer_systems.training.directory import RunDirectory
from xlayer_systems.training.model import TrainingModel
from xlayer_systems.training.options import TrainOptions
from xlayer_systems.training.trainer import Trainer, make_accelerator

FILES = ("checkpoint.json", "model.safetensors", "optimizer.safetensors", "random-0.json")
EARLIER_FILES = (
    "pytorch_model.bin", "optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "random_states_0.pkl"
)  # fmt: skip
ENVIRONMENT = {"python": "3", "data_hash": "x"}


class Net(TrainingModel):
    """A weight under two names, dropout, a buffer, and a parameter that no step reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.dropout, self.norm = nn.Dropout(0.2), nn.BatchNorm1d(16)
        self.unused = nn.Parameter(torch.ones(3))
        self.on_step = lambda step: None

    def begin_step(self, step: int) -> None:
        self.on_step(step)

    def forward(self, x: torch.Tensor) -> Output:
        hidden = self.norm(self.dropout(self.first(x[:, None].expand(-1, 16) / 5).relu()))
        return Output((self.second(hidden) - x[:, None]).square().mean())


def make_trainer(path: Path, resume: bool = False, rate: float = 1e-2, data: Numbers | None = None) -> Trainer:
    """Makes a trainer of 12 steps in 2 epochs, logged after every 4, with checkpoints after steps 5, 6, 10 and 12."""
    options = TrainOptions(epochs=2, batch_size=4, tensorboard=False, log_every=4, checkpoint_every=5)
    run, model = RunDirectory(path), Net()
    groups = [{"params": list(model.parameters()), "lr": rate}]
    trainer = Trainer(make_accelerator(options), model, groups, data or Numbers(25), options, run, seed=0)
    try:
        if resume:
            run.hold({}, ENVIRONMENT)
            trainer.resume()
        else:
            run.create({}, ENVIRONMENT)
    except BaseException:
        run.close()
        raise
    return trainer


def train(path: Path, **options) -> dict:
    """Trains all steps; returns the parameters and buffers."""
    trainer = make_trainer(path, **options)
    try:
        trainer.train()
    finally:
        trainer.run.close()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def fail_at(step: int):
    """Makes a hook for `Net.on_step` that raises as a crash in that step."""

    def hook(now: int) -> None:
        if now == step:
            raise RuntimeError("crash")

    return hook


def crash(path: Path, step: int = 8) -> Path:
    """Ends a run inside ``step``; returns its checkpoint."""
    trainer = make_trainer(path)
    trainer.model.on_step = fail_at(step)
    with pytest.raises(RuntimeError, match="crash"):
        trainer.train()
    trainer.run.close()
    found = trainer.run.latest_checkpoint()
    assert found is not None
    return found


def save_as_before(self: TrainingState, folder: Path, progress: dict) -> None:
    """Saves a checkpoint in the format of earlier versions."""

    class Kept:
        def state_dict(self):
            return {name: value for name, value in progress.items() if name != "window"}

        def load_state_dict(self, state):
            raise AssertionError

    self.accelerator._optimizers = self.accelerator._optimizers[-1:]
    self.accelerator._models = self.accelerator._models[-1:]
    self.accelerator._custom_objects = []
    self.accelerator.register_for_checkpointing(self.schedule, Kept())
    self.accelerator.save_state(str(folder), safe_serialization=False)


def refused(act, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    assert all(part in message for part in parts), message
