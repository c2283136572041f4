"""What a run announces while it works, how bounds hold for all of its parts, and names of run directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bypass_tools import save_decoder
from training_tools import contents, make_spec, run_xlayer, save_backbone, save_rte, train_run
from xlayer_systems.bypass.report import format_compared
from xlayer_systems.cli.runs import run_name
from xlayer_systems.errors import UserError
from xlayer_systems.registry import get_system
from xlayer_systems.telepathy.config import BASELINES, TelepathyOptions

SHORT = ["--set", "batch_size=4", "--set", "max_length=16", "--set", "log_every=2", "--set", "tensorboard=false"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    decoder, text = save_decoder(tmp_path_factory.mktemp("decoder"))
    return ["--dataset", text, "--backbone", decoder]


def test_a_bound_on_steps_bounds_every_part(
    decoder: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    bounds = ["--set", "max_steps=5", "--set", "eval_blocks=6", "--set", "latent=4"]
    assert run_xlayer(monkeypatch, "train", "bypass", *decoder, *SHORT, *bounds, "--quick", "--run-dir", run) == 0
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert "part 1/3: reconstruction" in lines and "part 3/3: lora" in lines
    assert "PCA of 320 tokens" in lines and "statistics of 320 tokens" in lines  # 5 steps of 4 blocks of 16
    assert "loss of the model alone on 6 blocks" in lines
    steps = [line for line in lines if "steps/s" in line]
    assert [line.split(",")[0] for line in steps[:3]] == [
        f"reconstruction seed 0: step {step} of 5" for step in (2, 4, 5)
    ]
    assert all("loss " in line for line in steps)
    assert any(line.startswith("task seed 0: step 5, 6 validation examples: loss ") for line in lines)
    result = json.loads((run / "result.json").read_text())
    assert result["compared"]["blocks"] == 6 and result["total_seconds"] > 0
    assert f"run directory: {run}  ({result['total_seconds']:.0f} s)" in printed.out
    assert "steps/s" not in printed.out
    assert any(line.startswith("warning: full is ") for line in lines) == ("warning: full is " in printed.out)


def test_a_run_from_before_the_bounds_goes_on_as_it_began(
    decoder: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [*SHORT, "--set", "max_steps=3", "--set", "reconstruct_steps=4", "--set", "latent=4"]
    chosen += ["--set", "compare=false", "--set", "eval_blocks=2"]
    overrides = dict(setting.split("=") for setting in chosen[1::2])
    names = {"dataset": decoder[1], "backbone": decoder[3], "quick": True}
    before = make_spec("bypass", overrides=overrides, bounded=False, **names)
    assert before.options.pca_tokens > make_spec("bypass", overrides=overrides, **names).options.pca_tokens
    run = tmp_path / "run"
    train_run(before, run)
    kept = contents(run)
    command = ["train", "bypass", *decoder, *chosen, "--quick", "--run-dir", run, "--resume"]
    assert run_xlayer(monkeypatch, *command) == 0
    assert contents(run) == kept
    assert run_xlayer(monkeypatch, *command, "--set", "latent=5") != 0
    assert "cannot resume" in capsys.readouterr().err


def test_what_the_user_names_is_not_lowered() -> None:
    chosen = {"max_steps": "10", "reconstruct_steps": "30", "batch_size": "4", "max_length": "8"}
    options = make_spec("bypass", "full", quick=True, overrides=chosen).options
    assert (options.reconstruct_steps, options.pca_tokens, options.compare_blocks) == (30, 320, 256)
    kept = make_spec("bypass", "full", quick=True, options={"max_steps": "10"}).options  # as in a run's own run.yaml
    assert kept.reconstruct_steps == 250
    free = make_spec("bypass", "full", quick=True).options
    assert (free.reconstruct_steps, free.pca_tokens, free.compare_blocks) == (250, 65536, 256)
    assert make_spec("bypass", "full", overrides={"eval_blocks": "5"}).options.compare_blocks == 5


def test_a_bound_on_steps_bounds_the_probe_of_telepathy() -> None:
    options = make_spec("telepathy", quick=True, overrides={"max_steps": "10"}).options
    assert options.probe_examples == 10 * options.batch_size
    assert make_spec("telepathy", quick=True).options.probe_examples is None


def test_baselines_by_name() -> None:
    assert TelepathyOptions().baseline_names() == BASELINES
    assert TelepathyOptions(baselines="noise, majority").baseline_names() == ("majority", "noise")
    assert TelepathyOptions(baselines="none").baseline_names() == ()
    assert TelepathyOptions(baselines="false") == TelepathyOptions(baselines="none")  # as it was written before
    with pytest.raises(ValueError, match="baselines must be all, none or names of majority"):
        TelepathyOptions(baselines="noise,noises")
    assert not make_spec("lformer", overrides={"baseline": "false"}).options.baseline


def test_eval_takes_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--dataset", save_rte(tmp_path / "rte"), "--backbone", save_backbone(tmp_path / "backbone")]
    run = tmp_path / "run"
    assert run_xlayer(monkeypatch, "train", "xlrb", *places, *SHORT, "--epochs", "1", "--run-dir", run) == 0
    before = contents(run)
    capsys.readouterr()
    assert run_xlayer(monkeypatch, "eval", run, "--limit", "7") == 0
    printed = capsys.readouterr()
    assert "on 7 of 23 validation examples" in printed.err and "7" in printed.out
    assert contents(run) == before
    assert run_xlayer(monkeypatch, "eval", run, "--limit", "0") == 2


def test_run_directories_name_a_backbone_that_is_not_the_default(tmp_path: Path) -> None:
    system = get_system("xlrb")

    def name(backbone: str) -> str:
        return run_name(system, make_spec("xlrb", backbone=backbone), quick=False)

    assert name("small") == "xlrb-H9-stdlib-topics-seed0"
    assert name("org/model-1.5") == "xlrb-H9-org-model-1.5-stdlib-topics-seed0"
    deep = "/".join(["folder"] * 20)
    assert name(f"/a/{deep}") != name(f"/b/{deep}") and len(name(f"/a/{deep}")) < 100


def test_a_wrong_backbone_is_reported_before_a_directory_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    for system, backbone in (("xlrb", missing), ("bypass", missing), ("telepathy", f"{missing},{missing}")):
        arguments = ["train", system, "--backbone", backbone, "--run-dir", tmp_path]
        assert run_xlayer(monkeypatch, *arguments) == 2
        assert "cannot load" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown size"):
        get_system("hyper_lm").check_backbone("enormous")


def test_a_side_path_that_is_worse_than_none_is_a_warning() -> None:
    def row(mean: float, low: float) -> dict[str, dict[str, float]]:
        interval = {"mean": mean, "low": low, "high": 2 * mean - low}
        return {"loss": interval, "difference": interval, "parameters": 1}

    rows = {"model alone": {"loss": {"mean": 2.0, "low": 1.9, "high": 2.1}}, "full": row(10.9, 10.1)}
    compared = {"rows": {**rows, "lora": row(0.1, -0.2)}, "blocks": 8, "base_parameters": 10}
    (text,) = get_system("bypass").warnings({"compared": compared})
    assert text.startswith("full is 10.9000 nats per token worse than the model alone; it needs more steps")
    assert f"  warning: {text}" in format_compared(compared)
    single = {**compared, "rows": {**rows, "full": row(0.5, float("nan"))}}
    assert len(get_system("bypass").warnings({"compared": single})) == 1
    mine, head = ({"mean": mean, "low": mean - 0.05, "high": mean + 0.05} for mean in (0.5, 0.7))
    assert get_system("lformer").warnings({"accuracy": mine, "baseline": {"accuracy": head}})
    assert not get_system("lformer").warnings({"accuracy": head, "baseline": {"accuracy": mine}})
