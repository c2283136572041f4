"""Runs of the bypass from the command: both stages, resuming, evaluation, sweeps; and on two processes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from bypass_tools import LAYERS, make_ids, make_model, save_decoder
from processes import join_processes
from training_tools import contents, evaluate_run, finish, make_spec, read_metrics, run_xlayer, start_xlayer, train_run
from xlayer_systems.bypass import BypassConfig, attach
from xlayer_systems.bypass.reconstruction import Reconstruction
from xlayer_systems.bypass.system import BypassSystem
from xlayer_systems.bypass.task import BypassLanguageModel
from xlayer_systems.data.blocks import IGNORED
from xlayer_systems.registry import SYSTEMS, get_system
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.training.trainer import Trainer

FAST = {
    "max_steps": "6", "reconstruct_steps": "6", "batch_size": "4", "max_length": "32", "eval_every": "3",
    "tensorboard": "false", "latent": "12", "reconstruct_rate": "2e-2", "calibration_tokens": "500",
    "pca_tokens": "4000", "eval_blocks": "8", "compare_blocks": "12",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoder")


def spec_of(folder: Path, preset: str = "full", **overrides: str) -> RunSpec:
    decoder, text = save_decoder(folder)
    # The adapter adds nothing that most tests are about.
    settings = {key: value for key, value in FAST.items() if preset != "plain" or key != "latent"}
    return make_spec(
        "bypass", preset, dataset=text, backbone=decoder, overrides={**settings, "compare": "false", **overrides}
    )


def arguments(folder: Path, **overrides: str) -> list[str]:
    decoder, text = save_decoder(folder)
    settings = [part for key, value in {**FAST, **overrides}.items() for part in ("--set", f"{key}={value}")]
    return ["--dataset", text, "--backbone", decoder, *settings]


# ---- one run ---------------------------------------------------------------------------------------------------------


def test_one_command_does_it_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    run = tmp_path / "run"
    options = arguments(folder, reconstruct_steps="150")
    assert run_xlayer(monkeypatch, "train", "bypass", *options, "--run-dir", run) == 0
    printed = capsys.readouterr().out
    result = json.loads((run / "result.json").read_text())
    stage = result["reconstruction"]
    assert len(stage["r2"]) == len(stage["pca"]) == LAYERS and 0 < min(stage["pca"]) < max(stage["pca"]) < 1
    assert min(mine / theirs for mine, theirs in zip(stage["r2"], stage["pca"], strict=True)) > 0.9
    assert stage["latent"] == 12 and stage["parameters"] == 2 * LAYERS * 12 * 24
    rows = result["compared"]["rows"]
    assert list(rows) == ["model alone", "full", "lora"]
    assert rows["full"]["parameters"] == LAYERS * 12 * 24 == result["parameters"]
    assert 0.5 < rows["lora"]["parameters"] / rows["full"]["parameters"] < 2
    assert rows["full"]["difference"]["low"] < rows["full"]["difference"]["mean"] < rows["full"]["difference"]["high"]
    assert result["loss"] == pytest.approx(rows["full"]["loss"]["mean"])
    for name in ("R² of the latent", "R² of 12 components", "model alone", "full - lora"):
        assert name in printed and name in (run / "report.md").read_text()
    for picture in ("plots/curves.png", "plots/usage.png", "reconstruction/plots/reconstruction.png"):
        assert (run / picture).read_bytes()[:4] == b"\x89PNG" and picture in (run / "report.md").read_text()
    stages = [record["stage"] for record in read_metrics(run)]
    assert sorted(set(stages), key=stages.index) == ["reconstruction", "task", "lora"]
    before = contents(run)
    assert run_xlayer(monkeypatch, "train", "bypass", *options, "--run-dir", run, "--resume") == 0
    assert contents(run) == before and capsys.readouterr().out == printed
    assert run_xlayer(monkeypatch, "eval", run) == 0
    assert "nats per token" in capsys.readouterr().out


def test_projectors_learn_the_task_and_the_model_keeps_its_bits(folder: Path, tmp_path: Path) -> None:
    spec = spec_of(folder, max_steps="60", reconstruct_steps="30", learning_rate="1e-2")
    kept: list[tuple[Any, dict[str, Tensor]]] = []

    class Watching(BypassSystem):
        def build(self, backbone: Any, *rest: Any) -> nn.Module:
            kept.append((backbone, {name: p.clone() for name, p in backbone.state_dict().items()}))
            made: nn.Module = super().build(backbone, *rest)
            return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SYSTEMS, "bypass", Watching())
        result = train_run(spec, tmp_path / "run")
    assert len(kept) == 2  # of either stage
    for backbone, state in kept:
        assert all(torch.equal(state[name], p) for name, p in backbone.state_dict().items())
    assert result["compared"]["rows"]["full"]["difference"]["high"] < 0
    again = evaluate_run(tmp_path / "run")
    assert again["validation_tokens"] >= result["validation_tokens"] and again["loss"] > 0


@pytest.mark.parametrize("preset", ["plain", "offset"])
def test_other_presets(folder: Path, tmp_path: Path, preset: str) -> None:
    result = train_run(spec_of(folder, preset), tmp_path / "run")
    assert result["compared"]["rows"].keys() == {"model alone", preset} - {"plain"}
    assert ("reconstruction" in result) == (preset == "offset")
    assert result["parameters"] == {"plain": 0, "offset": (LAYERS - 1) * 12 * 24}[preset]
    assert evaluate_run(tmp_path / "run")["preset"] == preset


def test_a_stage_by_itself(folder: Path, tmp_path: Path) -> None:
    first = train_run(spec_of(folder, stage="reconstruct", max_steps="6"), tmp_path / "first")
    assert len(first["r2"]) == len(first["pca"]) == LAYERS and "r2_mean" in first
    again = evaluate_run(tmp_path / "first")
    assert again["validation_tokens"] >= first["validation_tokens"]
    encoder = str(tmp_path / "first" / "model")
    second = train_run(spec_of(folder, stage="task", encoder=encoder), tmp_path / "second")
    assert second["loss"] > 0 and not (tmp_path / "second" / "reconstruction").exists()
    both = spec_of(folder, encoder=encoder)
    assert list(get_system("bypass").parts(both, tmp_path)) == ["task"]


@pytest.mark.parametrize("dies_at", [4, 10, 16], ids=["in stage 1", "in stage 2", "in the LoRA"])
def test_an_interrupted_run_resumes_to_the_same_bits(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, dies_at: int
) -> None:
    pytest.importorskip("peft")
    spec = spec_of(folder, compare="true", checkpoint_every="3")
    whole = whole_run(spec, tmp_path_factory)
    step, calls = Trainer._step, iter(range(100))

    def dying(self: Trainer, batch: list[int], watch: bool = False) -> Tensor:
        if next(calls) == dies_at:
            raise KeyboardInterrupt
        return step(self, batch, watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train_run(spec, tmp_path / "cut")
    assert not (tmp_path / "cut" / "result.json").exists()
    train_run(spec, tmp_path / "cut", resume=True)
    for part in ("reconstruction", "task", "lora"):
        mine, theirs = contents(tmp_path / "cut" / part / "model"), contents(whole / part / "model")
        kept = [name for name in theirs if name.endswith(".safetensors")]
        assert kept and all(mine[name] == theirs[name] for name in kept)
    assert read_metrics(tmp_path / "cut") == read_metrics(whole)
    results = [json.loads((path / "result.json").read_text()) for path in (tmp_path / "cut", whole)]
    assert results[0]["compared"] == results[1]["compared"]


_WHOLE: dict[str, Path] = {}


def whole_run(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes, once, the run that nothing interrupts."""
    if "run" not in _WHOLE:
        path = tmp_path_factory.mktemp("whole") / "run"
        train_run(spec, path)
        _WHOLE["run"] = path
    return _WHOLE["run"]


def test_a_sweep_against_the_model_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder, text = save_decoder(folder)
    settings = [p for key, value in FAST.items() if key != "latent" for p in ("--set", f"{key}={value}")]
    command = ("sweep", "bypass", "--presets", "plain,full:latent=8", "--seeds", "0,1", "--dataset", text)
    out = tmp_path / "sweep"
    assert run_xlayer(monkeypatch, *command, "--backbone", decoder, *settings, "--out", out) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["plain", "full:latent=8"]
    assert rows[0]["loss"]["low"] == rows[0]["loss"]["high"] and "difference" not in rows[0]
    difference = rows[1]["difference"]
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert "full:latent=8" in capsys.readouterr().out
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_wrong_input_ends_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = arguments(folder)
    capsys.readouterr()
    for options, message in (
        (("--preset", "half"), "unknown preset 'half'; expected one of plain, lora, full, offset"),
        (("--set", "latent=0"), "latent must be at least 1, got 0"),
        (("--set", "layers=9"), "layers must be different numbers from 0 to 2, got [9]"),
        (("--set", "encoder=nowhere"), "no bypass in nowhere"),
        (("--set", "stage=third"), "unknown stage 'third'"),
        (("--set", "model=other"), "the model is named by --backbone"),
    ):
        command = ("train", "bypass", *settings, *options, "--run-dir", tmp_path / options[1][:9])
        assert run_xlayer(monkeypatch, *command) == 2
        *announced, error = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and message in error
        assert not any("error" in line for line in announced)


# ---- two processes ---------------------------------------------------------------------------------------------------

CASES = [(wrapper, stage, variant) for wrapper in ("ddp", "fsdp") for stage in ("reconstruct", "task")
         for variant in ("full", "offset")]  # fmt: skip


def trainee(stage: Any, variant: Any) -> nn.Module:
    """Makes a stage's model in float64, its projectors away from 0."""
    base = make_model("llama").double()
    bypass = attach(base, BypassConfig(latent=6, stage=stage, variant=variant))
    bypass.calibrate([{"input_ids": make_ids(4)}])
    nn.init.normal_(bypass.projectors, std=0.1, generator=torch.Generator().manual_seed(3))
    nn.init.normal_(bypass.encoder, std=0.1, generator=torch.Generator().manual_seed(4))
    model = Reconstruction(base, bypass) if stage == "reconstruct" else BypassLanguageModel(base, bypass)
    return model.double().train()


def batch_of(rows: slice) -> dict[str, Tensor]:
    ids = make_ids(8, 11)[rows]
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].contiguous()}


def worker(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    join_processes(rank, folder)
    found = {}
    for wrapper, stage, variant in CASES:
        model = trainee(stage, variant)
        outer = nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else fully_shard(model)
        for _ in range(2):  # the second step meets what the first left behind
            outer.zero_grad()
            outer(**batch_of(slice(rank, None, 2))).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[wrapper, stage, variant] = {
            n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()
        }
    if rank == 0:
        torch.save({case: {n: g.clone() for n, g in grads.items()} for case, grads in found.items()}, f"{folder}/g.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    for (wrapper, stage, variant), gradients in torch.load(tmp_path / "g.pt").items():
        model = trainee(stage, variant)
        model(**batch_of(slice(None))).loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected.keys() and expected
        for name, grad in expected.items():
            torch.testing.assert_close(
                gradients[name], grad, rtol=1e-5, atol=1e-10, msg=lambda m, c=(wrapper, stage, variant): f"{c}: {m}"
            )


@pytest.mark.slow
def test_the_command_on_two_processes_takes_the_same_steps(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    options = ("train", "bypass", *arguments(folder, max_steps="4", reconstruct_steps="4"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    finish(start_xlayer(*options, "--run-dir", tmp_path / "two", launcher=launcher))
    finish(start_xlayer(*options, "--run-dir", tmp_path / "one"))
    two, one = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("two", "one"))
    assert two["reconstruction"]["r2"] == pytest.approx(one["reconstruction"]["r2"], abs=1e-4)
    for name, row in one["compared"]["rows"].items():
        assert two["compared"]["rows"][name]["loss"]["mean"] == pytest.approx(row["loss"]["mean"], abs=1e-4)


def test_padded_tokens_do_not_count_in_reconstruction() -> None:
    model = trainee("reconstruct", "full").eval()
    batch = batch_of(slice(2))
    cut = {name: value[:, :6] for name, value in batch.items()}
    padded = {**batch, "labels": batch["labels"].clone()}
    padded["labels"][:, 6:] = IGNORED
    for mine, theirs in zip(model(**padded), model(**cut), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert dataclasses.is_dataclass(model.bypass.config)


def test_rates_are_the_backbones_and_not_quicks() -> None:
    """At the small decoder's rates the biases of thirty layers soon lose what the model knew."""

    def rates(backbone: str, quick: bool) -> tuple[float, float, float]:
        options = make_spec("bypass", dataset="stdlib-lm", backbone=backbone, quick=quick).options
        return options.learning_rate, options.reconstruct_rate, options.lora_rate

    for quick in (False, True):
        assert rates("decoder-sender", quick) == (1e-3, 1e-2, 5e-3)
        assert rates("a/deep-model", quick) == (1e-5, 1e-3, 1e-3)
