"""Runs of telepathy from the command: training, sweeps, resuming, evaluation; and on two processes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from processes import join_processes
from telepathy_tools import SMALL, load_pair, make_data, make_model, save_pair, use_toy_task
from training_tools import contents, evaluate_run, make_spec, read_metrics, run_xlayer, train_run
from xlayer_systems.errors import UserError
from xlayer_systems.runs.sweep import cross_variants, parse_variants
from xlayer_systems.telepathy import TelepathyConfig
from xlayer_systems.telepathy.system import split_pair
from xlayer_systems.training.options import apply_overrides
from xlayer_systems.training.trainer import Trainer

KINDS = ("continuous", "vq", "fsq", "dit")
FAST = {
    "max_steps": "8", "batch_size": "8", "max_length": "32", "eval_every": "4", "baselines": "false",
    "tensorboard": "false", "num_layers": "1", "num_heads": "2", "soft_tokens": "2", "dit_steps": "2",
    "codebook_size": "16", "calibration_examples": "20", "learning_rate": "1e-2",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pair")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy_task(monkeypatch)


def toy_spec(folder: Path, **overrides: str):
    backbone = ",".join(save_pair(folder))
    return make_spec("telepathy", dataset="toy", backbone=backbone, overrides=FAST | overrides)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_every_kind(folder: Path, tmp_path: Path, kind: str) -> None:
    spec = toy_spec(folder, bridge=kind, keep_states=str(kind == "fsq"))
    result = train_run(spec, tmp_path / "run")
    evaluations = [r for r in read_metrics(tmp_path / "run") if r["event"] == "eval"]
    assert [r["step"] for r in evaluations] == [4, 8]
    assert all(0 < r["loss"] < 10 and "similarity" in r["usage"] for r in evaluations)
    assert ("perplexity" in result["usage"]) == (kind in ("vq", "fsq"))
    assert result["accuracy"]["total"] == 23 and result["bridge"] == kind
    assert (tmp_path / "run" / "plots" / "usage.png").stat().st_size > 1000
    report = (tmp_path / "run" / "report.md").read_text()
    assert "majority" in report and f"bridge {kind} with 2 soft tokens" in report
    again = evaluate_run(tmp_path / "run")
    assert again["accuracy"] == result["accuracy"] and again["loss"] == pytest.approx(result["loss"], rel=1e-6)


@pytest.mark.usefixtures("toy")
def test_named_baselines_answer_the_examples_of_the_evaluations(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = [part for item in {**FAST, "max_steps": "2", "eval_examples": "5"}.items() if item[0] != "baselines"
                for part in ("--set", "=".join(item))]  # fmt: skip
    backbone = ",".join(save_pair(folder))
    command = ["train", "telepathy", "--dataset", "toy", "--backbone", backbone, *settings, "--run-dir", run]
    assert run_xlayer(monkeypatch, *command, "--baselines", "noise,receiver_text") == 0
    lines = capsys.readouterr().err.splitlines()
    assert "baseline 1/2: receiver_text on 5 examples" in lines and "baseline 2/2: noise on 5 examples" in lines
    assert any(line.startswith("latency of the bridge") and line.endswith(" on 5 examples") for line in lines)
    assert any(line.startswith("statistics of ") for line in lines)
    result = json.loads((run / "result.json").read_text())
    assert result["accuracy"]["total"] == 5 and result["total_seconds"] >= result["seconds"]
    assert {name: row["total"] for name, row in result["baselines"].items()} == {"receiver_text": 5, "noise": 5}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_resumes_to_the_same_bits(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = toy_spec(folder, bridge=kind, checkpoint_every="3", threshold_ema_dead_code="0.5")
    train_run(spec, tmp_path / "whole")
    step = Trainer._step
    calls = iter(range(100))

    def dying(self: Trainer, batch: list[int], watch: bool = False):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(self, batch, watch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train_run(spec, tmp_path / "cut")
    train_run(spec, tmp_path / "cut", resume=True)
    assert contents(tmp_path / "cut" / "model") == contents(tmp_path / "whole" / "model")
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


@pytest.mark.usefixtures("toy")
def test_kept_states_change_nothing_but_the_time(folder: Path, tmp_path: Path) -> None:
    losses = []
    for keep in ("false", "true"):
        result = train_run(toy_spec(folder, keep_states=keep), tmp_path / keep)
        losses.append(result["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_bridge_learns_to_say_the_answer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy_task(monkeypatch, train=256, validation=60)
    settings = {"max_steps": "300", "eval_every": "300", "epochs": "99", "soft_tokens": "4", "num_layers": "2"}
    result = train_run(toy_spec(folder, **settings), tmp_path / "run")
    assert result["accuracy"]["low"] > result["majority"]["high"]
    assert result["usage"]["similarity"] < 0.9 and result["invalid"] < 0.1


@pytest.mark.usefixtures("toy")
def test_a_sweep_over_bridges_and_soft_tokens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [part for key, value in FAST.items() if key != "soft_tokens" for part in ("--set", f"{key}={value}")]
    pair = ",".join(save_pair(folder))
    arguments = ("--dataset", "toy", "--backbone", pair, "--bridge", "continuous,vq", "--soft-tokens", "2,4")
    assert run_xlayer(monkeypatch, "sweep", "telepathy", *arguments, *settings, "--out", tmp_path / "sweep") == 0
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    assert names[0] == "majority" and names[-1] == "classification:bridge=vq:soft_tokens=4"
    assert len(names) == 5 and results["rows"][-1]["perplexity"] >= 1
    assert {"curves.png", "soft_tokens.png", "report.md"} <= {p.name for p in (tmp_path / "sweep").iterdir()}
    assert re.search(r"classification:bridge=vq:soft_tokens=4 +\d", capsys.readouterr().out)


def test_wrong_input_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments, message in (
        (("--backbone", "one"), "telepathy needs two models, SENDER,RECEIVER; got 'one'"),
        (("--bridge", "radio"), "unknown bridge 'radio'; expected one of continuous, vq, fsq, dit"),
        (("--preset", "v99"), "unknown preset 'v99'"),
        (("--soft-tokens", "few"), "soft_tokens takes a value of type int, got 'few'"),
    ):
        assert run_xlayer(monkeypatch, "train", "telepathy", *arguments, "--run-dir", tmp_path / "x") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_variants_are_crossed() -> None:
    base = parse_variants("classification")
    crossed = cross_variants(base, bridge="vq,fsq", soft_tokens="4,8")
    assert [v.name for v in crossed] == [
        f"classification:bridge={bridge}:soft_tokens={count}" for bridge in ("vq", "fsq") for count in (4, 8)
    ]
    assert crossed[1].overrides == {"bridge": "vq", "soft_tokens": "8"}
    assert cross_variants(base, bridge=None) == base
    with pytest.raises(UserError, match="different values of bridge"):
        cross_variants(base, bridge="vq,vq")


def test_levels_from_the_command_line() -> None:
    assert apply_overrides(TelepathyConfig(), {"levels": "8x5x5"}).levels == (8, 5, 5)
    with pytest.raises(UserError, match="levels takes a value of type int, got 'a'"):
        apply_overrides(TelepathyConfig(), {"levels": "8xa"})
    assert split_pair("a, b") == ("a", "b")


# ---- two processes ---------------------------------------------------------------------------------------------------


def ddp_config(kind: str) -> TelepathyConfig:
    # Losses that are means over examples: those between the examples of a batch cover their own process's alone.
    return dataclasses.replace(SMALL, bridge=kind, batch_diversity=0.0, scaling="rms", anchor=0.5)


def batches(folder: Path):
    data = make_data(load_pair(folder))
    chosen = [e for e in data.train if len(e.target_ids) == len(data.train[0].target_ids)][:16]
    return data, chosen


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_processes(rank, folder)
    data, chosen = batches(Path(folder))
    found = {}
    for kind in ("continuous", "vq", "fsq"):
        model = make_model(load_pair(Path(folder)), ddp_config(kind), data).train()
        outer = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        for _ in range(2):
            outer.zero_grad()
            outer(**data.collate(chosen[rank::2])).loss.backward()
        found[kind] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(folder: Path) -> None:
    save_pair(folder)
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    found = torch.load(folder / "gradients.pt")
    data, chosen = batches(folder)
    for kind, gradients in found.items():
        model = make_model(load_pair(folder), ddp_config(kind), data).train()
        for _ in range(2):
            model.zero_grad()
            model(**data.collate(chosen)).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(
                    gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name, k=kind: f"{k} {n}: {m}"
                )
