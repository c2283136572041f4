"""The shared loop: the same bits every time, after kill -9 too, and the same steps however a batch is divided."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from training_tools import (
    Line,
    Numbers,
    finish,
    make_spec,
    read_metrics,
    save_backbone,
    save_rte,
    start_xlayer,
    train_run,
)
from xlayer_systems.errors import UserError
from xlayer_systems.training.directory import RunDirectory, flatten
from xlayer_systems.training.options import TrainOptions, apply_overrides
from xlayer_systems.training.trainer import Trainer, evaluate, linear_schedule, make_accelerator

QUIET = {"tensorboard": "false", "encoder_lr": "1e-3", "batch_size": "8", "log_every": "1", "head_dropout": "0"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Returns the paths of a backbone without dropout, of one with it, and of a data set."""
    folder = tmp_path_factory.mktemp("places")
    return {
        "plain": save_backbone(folder / "plain", dropout=0.0),
        "dropout": save_backbone(folder / "dropout", dropout=0.1),
        "data": save_rte(folder / "rte"),
    }


def train(places, path: Path, preset: str = "plain", backbone: str = "plain", seed: int = 0, **overrides) -> list[dict]:
    spec = make_spec(
        "xlrb",
        preset,
        dataset=str(places["data"]),
        backbone=str(places[backbone]),
        seed=seed,
        overrides={**QUIET, "epochs": "2", **{key: str(value) for key, value in overrides.items()}},
    )
    train_run(spec, path)
    return read_metrics(path)


def test_same_seed_same_bits_other_seed_other_bits(places, tmp_path):
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(places, tmp_path / name, "H9", "dropout", seed=seed)
        runs[name] = (tmp_path / name / "metrics.jsonl").read_bytes()
    assert runs["a"] == runs["b"] != runs["c"]


def test_it_learns(places, tmp_path):
    metrics = train(places, tmp_path / "run", epochs=20, label_smoothing=0, encoder_lr=3e-3)
    losses = [record["train_loss"] for record in metrics if record["event"] == "eval"]
    assert losses[-1] < 0.35 < 0.6 < losses[0]


def test_metrics_have_no_times_and_timings_have(places, tmp_path):
    metrics = train(places, tmp_path / "run", "A12")
    names = {name for record in metrics for name, _ in flatten(record)}
    assert not [name for name in names if "second" in name or "time" in name.replace("times", "")]
    assert {record["event"] for record in metrics} == {"train", "eval"}
    last = metrics[-1]
    assert last["epoch"] == 2 and last["step"] == 16 and last["total"] == 23
    assert set(last["usage"]["layers"]) == {"1", "2", "3"}
    assert "train_seconds" in (tmp_path / "run" / "timings.jsonl").read_text()


def test_accumulation_takes_the_same_steps(places, tmp_path):
    whole = train(places, tmp_path / "whole")
    parts = train(places, tmp_path / "parts", accumulate=4)
    assert_close(whole, parts, tolerance=1e-3)


def test_recomputing_activations_changes_nothing(places, tmp_path):
    kept = train(places, tmp_path / "kept", "A12", "dropout")
    recomputed = train(places, tmp_path / "recomputed", "A12", "dropout", gradient_checkpointing=True)
    assert_close(kept, recomputed, tolerance=1e-6)


def assert_close(first: list[dict], second: list[dict], tolerance: float) -> None:
    assert [record["event"] for record in first] == [record["event"] for record in second]
    for left, right in zip(first, second, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=tolerance)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(places, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    one = train(places, tmp_path / "one", "H9", router_weight="full_softmax", dropout=0)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    settings = {**QUIET, "epochs": "2", "router_weight": "full_softmax", "dropout": "0"}
    arguments = ["train", "xlrb", "--preset", "H9", "--dataset", places["data"], "--backbone", places["plain"]]
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]
    finish(start_xlayer(*arguments, "--run-dir", tmp_path / "two", launcher=launcher))
    two = read_metrics(tmp_path / "two")
    assert one != two  # there were two processes: sums are not made in the same order
    assert_close(one, two, tolerance=1e-3)
    first, second = (RunDirectory(tmp_path / name).result() for name in ("one", "two"))
    assert first["accuracy"] == second["accuracy"] and first["parameters"] == second["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["H9", "A12"])
def test_a_killed_run_resumes_to_the_same_bits(places, tmp_path, preset):
    arguments = ["train", "xlrb", "--preset", preset, "--dataset", places["data"], "--backbone", places["dropout"]]
    for setting in ("epochs=5", "batch_size=8", "encoder_lr=1e-3", "checkpoint_every=3", "log_every=2", "stop_below=0"):
        arguments += ["--set", setting]
    undisturbed = start_xlayer(*arguments, "--run-dir", tmp_path / "undisturbed")
    killed = start_xlayer(*arguments, "--run-dir", tmp_path / "killed")
    stop_when_logged(killed, tmp_path / "killed" / "metrics.jsonl", 12, signal.SIGKILL)
    finish(undisturbed)
    assert RunDirectory(tmp_path / "killed").result() is None
    before = (tmp_path / "killed" / "metrics.jsonl").read_bytes()
    finish(start_xlayer(*arguments, "--run-dir", tmp_path / "killed", "--resume"))
    expected = (tmp_path / "undisturbed" / "metrics.jsonl").read_bytes()
    assert len(before) < len(expected)
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == expected


@pytest.mark.slow
def test_a_run_ended_by_sigterm_says_so_and_resumes_to_the_same_bits(places, tmp_path):
    arguments = ["train", "xlrb", "--preset", "H9", "--dataset", places["data"], "--backbone", places["dropout"]]
    for setting in ("epochs=5", "batch_size=8", "encoder_lr=1e-3", "checkpoint_every=1000", "log_every=3"):
        arguments += ["--set", setting]
    undisturbed = start_xlayer(*arguments, "--run-dir", tmp_path / "undisturbed")
    ended = start_xlayer(*arguments, "--run-dir", tmp_path / "ended")
    output, errors = stop_when_logged(ended, tmp_path / "ended" / "metrics.jsonl", 6, signal.SIGTERM)
    finish(undisturbed)
    last = errors.splitlines()[-1]
    assert ended.returncode == 143 and output == "" and "Traceback" not in errors
    assert last.startswith(f"error: {tmp_path / 'ended'}: SIGTERM after step") and "--resume" in last
    assert RunDirectory(tmp_path / "ended").result() is None
    finish(start_xlayer(*arguments, "--run-dir", tmp_path / "ended", "--resume"))
    expected = (tmp_path / "undisturbed" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "ended" / "metrics.jsonl").read_bytes() == expected


def stop_when_logged(process, metrics: Path, lines: int, number: int) -> tuple[str, str]:
    deadline = time.monotonic() + 100
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, number)
    printed = process.communicate(timeout=100)
    assert process.returncode != 0
    return printed


def test_a_run_killed_before_its_first_checkpoint_starts_again(places, tmp_path):
    expected = train(places, tmp_path / "whole", "H9", "dropout")
    spec = make_spec(
        "xlrb", "H9", dataset=str(places["data"]), backbone=str(places["dropout"]), overrides={**QUIET, "epochs": "2"}
    )
    train_run(spec, tmp_path / "cut")
    for name in ("result.json", "report.md"):
        (tmp_path / "cut" / name).unlink()
    for path in sorted((tmp_path / "cut" / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    train_run(spec, tmp_path / "cut", resume=True)
    assert read_metrics(tmp_path / "cut") == expected


def test_the_stop_rule_ends_a_poor_run_after_its_first_epoch(places, tmp_path):
    stopped = train(places, tmp_path / "stopped", stop_below=1.01)
    assert [record["event"] for record in stopped][-2:] == ["eval", "stopped"] and stopped[-1]["epoch"] == 1
    assert "Stopped after epoch 1" in (tmp_path / "stopped" / "report.md").read_text()
    going_on = train(places, tmp_path / "going-on", stop_below=0.0)
    assert going_on[-1]["epoch"] == 2


def test_mixed_precision_trains(places, tmp_path):
    metrics = train(places, tmp_path / "run", "H9", dtype="bfloat16")
    assert all(record["loss"] < 2 for record in metrics)


def test_the_schedule_rises_then_falls_to_zero():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = linear_schedule(optimizer, steps=20, warmup=0.2)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([1 - k / 16 for k in range(1, 16)])
    assert schedule.get_last_lr() == [0.0]


def test_the_loop_knows_no_system(tmp_path):
    options = TrainOptions(epochs=20, batch_size=4, tensorboard=False)
    accelerator, model, run = make_accelerator(options), Line(), RunDirectory(tmp_path / "run")
    run.create({}, {})
    groups = [{"params": list(model.parameters()), "lr": 0.1}]
    last = Trainer(accelerator, model, groups, Numbers(21), options, run, seed=0).train()
    assert last["seen"] == 21 and last["step"] == 100
    assert model.weight.item() == pytest.approx(3, abs=0.05)


def test_accumulated_gradients_are_the_mean_over_the_batch(tmp_path):
    moments = []
    for accumulate in (1, 2, 4):
        options = TrainOptions(epochs=1, batch_size=4, accumulate=accumulate, clip=1e9, tensorboard=False)
        model, run = Line(), RunDirectory(tmp_path / f"run{accumulate}")
        run.create({}, {})
        groups = [{"params": list(model.parameters()), "lr": 0.1}]
        trainer = Trainer(make_accelerator(options), model, groups, Numbers(4), options, run, seed=0)
        trainer.train()
        moments.append(trainer.optimizer.state[model.weight]["exp_avg"].item())
    gradient = sum(-2 * 3 * x * x for x in (1, 2, 3, 4)) / 4
    assert moments == pytest.approx([0.1 * gradient] * 3, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7, 100])
def test_evaluation_sees_each_example_once(batch_size):
    accelerator = make_accelerator(TrainOptions())
    assert evaluate(accelerator, Line(), Numbers(21), batch_size) == {"seen": 21}


def test_options_are_checked():
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        TrainOptions(dtype="int8")
    with pytest.raises(UserError, match="batch_size 6 must be a multiple of processes x accumulate = 2 x 2"):
        TrainOptions(batch_size=6, accumulate=2).micro_batch(2)
    with pytest.raises(UserError, match="epochs takes a value of type int, got 'two'"):
        apply_overrides(TrainOptions(), {"epochs": "two"})
    with pytest.raises(UserError, match="tensorboard is true or false"):
        apply_overrides(TrainOptions(), {"tensorboard": "maybe"})
    changed = apply_overrides(TrainOptions(), {"bridge_lr": "1e-3", "stop_below": "none", "tensorboard": "false"})
    assert (changed.bridge_lr, changed.stop_below, changed.tensorboard) == (1e-3, None, False)


def test_too_little_data_is_refused(places, tmp_path):
    with pytest.raises(UserError, match="batch_size 128 is more than the 64 training examples"):
        train(places, tmp_path / "run", batch_size=128)
    assert not (tmp_path / "run").exists()
