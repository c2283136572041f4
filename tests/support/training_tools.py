"""A tiny backbone, a data set with RTE's columns, and ways to call the ``xlayer`` command."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaModel

from xlayer_systems import cli
from xlayer_systems.hf.encoders import start_as_average
from xlayer_systems.hf.tokenizer import train_tokenizer
from xlayer_systems.registry import get_system, open_run
from xlayer_systems.runs import execute
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.training.model import TrainingModel

NOUNS = ("cat", "dog", "bird", "fish", "horse", "mouse")
VERBS = ("eats", "sees", "hears", "likes", "finds", "draws")


def save_backbone(folder: Path, dropout: float = 0.1) -> Path:
    """Saves a random RoBERTa of four layers with its tokenizer."""
    torch.manual_seed(0)
    texts = [f"the {noun} {verb} the {other}" for noun in NOUNS for verb in VERBS for other in NOUNS]
    tokenizer = train_tokenizer(texts, vocabulary=320, max_length=64)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=66,
        type_vocab_size=1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    start_as_average(RobertaModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rte_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Makes sentence pairs with label 0 where both name the same animal first."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        noun, other = draw.sample(NOUNS, 2)
        second = noun if index % 2 == 0 else other
        rows.append(
            {
                "sentence1": f"the {noun} {draw.choice(VERBS)} the {draw.choice(NOUNS)}",
                "sentence2": f"the {second} {draw.choice(VERBS)}",
                "label": index % 2,
                "idx": index,
            }
        )
    return rows


def save_rte(folder: Path, train: int = 64, validation: int = 23) -> Path:
    """Saves a folder with train.jsonl and validation.jsonl."""
    folder.mkdir(parents=True)
    for name, count, seed in (("train", train, 0), ("validation", validation, 1)):
        lines = [json.dumps(row) for row in rte_rows(count, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_spec(system: str, *names: str, **settings: Any) -> RunSpec:
    """Calls `System.make_spec` of a system by name."""
    return get_system(system).make_spec(*names, **settings)


def train_run(spec: RunSpec, path: Path, resume: bool = False) -> dict[str, Any]:
    """Calls `execute.train_run` with the system that the spec names."""
    return execute.train_run(get_system(spec.system), spec, path, resume)


def evaluate_run(path: Path) -> dict[str, Any]:
    """Calls `execute.evaluate_run` with the system of the run in a directory."""
    system, spec = open_run(path)
    return execute.evaluate_run(system, spec, path)


def format_result(result: dict[str, Any]) -> str:
    """Calls `execute.format_result` with the system that the result names."""
    return execute.format_result(get_system(result["system"]), result)


def run_xlayer(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Runs the command inside this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["xlayer", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
        sys.exit(0)
    return int(exit_.value.code or 0)


def start_xlayer(*arguments: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Starts the command in a process of its own, on one thread per process."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "xlayer_systems.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for success and returns the printed text."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Returns the records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Output:
    loss: torch.Tensor


class Line(TrainingModel):
    """One weight, to be fitted to 3: a model of no system at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Output:
        return Output(((self.weight * x - 3 * x) ** 2).mean())


class Numbers:
    """Data of no system at all; the score of an example is 1, so the sum counts examples."""

    def __init__(self, count: int) -> None:
        self.train = self.validation = [float(number % 5 + 1) for number in range(count)]

    def lengths(self) -> list[int]:
        return [1] * len(self.train)

    def collate(self, examples):
        return {"x": torch.tensor(examples)}

    def score(self, output, batch):
        return torch.ones(len(batch["x"]), 1, dtype=torch.float64)

    def summarize(self, sums):
        return {"seen": int(sums[0])}
