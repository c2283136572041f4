"""Runs that do not end well: divergence and signals end them in one line, with a checkpoint."""

from __future__ import annotations

import math
import os
import signal
import threading

import pytest
import torch

from run_tools import (
    make_trainer,
    train,
)
from training_tools import Numbers, read_metrics
from xlayer_systems.errors import DivergenceError, InterruptionError
from xlayer_systems.training.directory import RunDirectory
from xlayer_systems.training.trainer import StopSignals

# ---- runs that diverge ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(DivergenceError, match=r"the training loss of step \d+ is (nan|inf)") as caught:
        train(tmp_path / "run", rate=1e25)
    assert caught.value.exit_code == 3 and "it has no checkpoint yet" in str(caught.value)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_parameter_that_is_not_finite_is_not_kept(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    broken = trainer.model.unused  # no loss shows it

    def spoil(step: int) -> None:
        if step == 7:
            broken.data[1] = math.inf

    trainer.model.on_step = spoil
    with pytest.raises(DivergenceError, match=r"parameters are not finite after step 10; .* step-00000006"):
        trainer.train()
    assert all(math.isfinite(record["loss"]) for record in read_metrics(tmp_path / "run") if "loss" in record)


class BrokenMetric(Numbers):
    def summarize(self, sums):
        return {"seen": int(sums[0]), "loss": math.nan}


class BrokenScore(Numbers):
    def score(self, output, batch):
        return super().score(output, batch) * math.inf


@pytest.mark.parametrize(("data", "message"), [(BrokenMetric, "the metric loss is nan"), (BrokenScore, "sums over")])
def test_a_metric_that_is_not_finite_ends_the_run(tmp_path, data, message):
    with pytest.raises(DivergenceError, match=f"after step 6 {message}"):
        train(tmp_path / "run", data=data(25))
    kept = RunDirectory(tmp_path / "run").latest_checkpoint()
    assert kept is not None and kept.name == "step-00000005"


# ---- signals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sigint_is_heard():
    """Restores SIGINT, which a shell ignores in background jobs and their children, such as this suite's processes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("step", [2, 4, 5, 11], ids="in step {}".format)
@pytest.mark.usefixtures("sigint_is_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_a_run_after_its_step_and_it_resumes_to_the_same_bits(tmp_path, number, step):
    expected = train(tmp_path / "whole")
    trainer = make_trainer(tmp_path / "run")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    trainer.model.on_step = lambda now: os.kill(os.getpid(), number) if now == step else None
    with pytest.raises(InterruptionError, match=rf"{number.name} after step {step + 1} of 12; .*--resume") as caught:
        trainer.train()
    trainer.run.close()
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    kept = trainer.run.latest_checkpoint()
    assert kept is not None and kept.name == f"step-{step + 1:08d}"
    found = train(tmp_path / "run", resume=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.usefixtures("sigint_is_heard")
def test_a_second_sigint_ends_the_process_at_once_and_a_second_sigterm_does_not(tmp_path):
    child = os.fork()
    if not child:
        try:
            with StopSignals() as signals:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
                if signals.caught == signal.SIGTERM:
                    (tmp_path / "alive").touch()
                os.kill(os.getpid(), signal.SIGINT)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGINT
    assert (tmp_path / "alive").exists()


def test_ignored_signals_stay_ignored_and_other_threads_leave_handlers_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and signals.caught is None
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def look() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
