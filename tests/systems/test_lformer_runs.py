"""Runs of L-Former from the command: both phases, the baseline, resuming, sweeps, data of one's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lformer_tools import (
    WORDS,
    make_trainee,
    save_base,
    toy_base,
    toy_corpus,
    toy_data,
    toy_examples,
    toy_tokenizer,
    use_toy_task,
)
from training_tools import (
    contents,
    evaluate_run,
    finish,
    format_result,
    make_spec,
    read_metrics,
    run_xlayer,
    start_xlayer,
    train_run,
)
from xlayer_systems.lformer import AGGREGATORS, LFormer
from xlayer_systems.lformer.data import BLOCK_EVERY
from xlayer_systems.training.trainer import Trainer

FAST = {
    "max_steps": "8", "phase_a_steps": "4", "batch_size": "16", "max_length": "16", "lm_length": "12",
    "eval_every": "4", "baseline": "false", "tensorboard": "false", "side_size": "8", "aggregator_heads": "2",
    "log_every": "1", "learning_rate": "1e-2", "last_k_unfreeze": "1", "base_lr": "1e-3",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy_task(monkeypatch)


def toy_spec(base: str, preset: str = "ema", **overrides: str) -> Any:
    return make_spec("lformer", preset, dataset="toy", backbone=base, overrides=FAST | overrides)


def save_rows(folder: Path) -> str:
    """Saves the toy task as files, without values and plans."""
    names = tuple(WORDS)
    for name, count, seed in (("train", 64, 0), ("validation", 9, 7)):
        rows = [{"text": e.text, "tool": names[e.tool]} for e in toy_examples(count, seed)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["event"] == "eval"]


def test_a_bound_on_examples_holds_for_the_baseline_too(base: str, tmp_path: Path) -> None:
    result = train_run(toy_spec(base, max_steps="2", eval_examples="5", baseline="true"), tmp_path / "run")
    assert result["accuracy"]["total"] == result["baseline"]["accuracy"]["total"] == 5
    assert result["total_seconds"] > result["seconds"]  # the baseline's run is a part of it
    assert evaluate_run(tmp_path / "run")["accuracy"]["total"] == 23


@pytest.mark.parametrize("preset", AGGREGATORS)
def test_a_run_of_every_preset(base: str, tmp_path: Path, preset: str) -> None:
    result = train_run(toy_spec(base, preset), tmp_path / "run")
    found = evaluations(tmp_path / "run")
    assert [r["step"] for r in found] == [4, 6, 8]  # the end of the first epoch is one as well
    assert all(0 <= r["accuracy"] <= 1 and 0 < r["lm_loss"] < 20 and r["value_error"] > 0 for r in found)
    usage = found[0].get("usage", {})
    assert set(usage) == {"ema": {"gates", "movement"}, "head_only": set()}.get(preset, {"movement"})
    if preset != "head_only":
        assert sum(usage["movement"].values()) == pytest.approx(1)
    if preset == "ema":
        assert all(abs(gate - 0.1192) < 0.01 for gate in usage["gates"].values()) and len(usage["gates"]) == 4
    for name in ("curves", "usage"):
        assert (tmp_path / "run" / "plots" / f"{name}.png").stat().st_size > 1000
    assert "| 4 | A |" in (tmp_path / "run" / "report.md").read_text()
    again = evaluate_run(tmp_path / "run")
    assert again["accuracy"] == result["accuracy"] and again["lm_loss"] == pytest.approx(result["lm_loss"], rel=1e-6)
    total = result["accuracy"]["total"]
    assert total == 23 and result["per_tool"] and sum(there for _, there in result["per_tool"].values()) == total
    assert f"lformer {preset}" in format_result(result) and "one keyword" in format_result(result)


def test_phase_a_leaves_the_base_alone_and_phase_b_trains_its_end(base: str, tmp_path: Path) -> None:
    before = toy_base().state_dict()
    for name, phase_a in (("a", "8"), ("b", "4")):
        train_run(toy_spec(base, phase_a_steps=phase_a), tmp_path / name)
        saved = load_file(tmp_path / name / "model" / "lformer.safetensors")
        layers = {key.removeprefix("base."): value for key, value in saved.items() if key.startswith("base.")}
        assert layers and all(".layers.3." in key for key in layers)
        changed = {key for key, value in layers.items() if not torch.equal(value, before[key])}
        assert changed == (set() if name == "a" else set(layers))
    losses = {r["step"]: r["lm_loss"] for r in evaluations(tmp_path / "b")}
    assert losses[4] != losses[8]
    assert len({r["lm_loss"] for r in evaluations(tmp_path / "a")}) == 1
    loaded = LFormer.from_pretrained(tmp_path / "b" / "model", toy_base())
    assert loaded.config.num_tools == 3 and loaded.config.plan_length == 3


@pytest.mark.parametrize(
    "overrides",
    [{"blend_into_lm": "true", "dropout": "0.2"}, {"tree_checkpoint": "2", "gate_l1": "0.01", "accumulate": "2"}],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    base: str, tmp_path: Path, overrides: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = toy_spec(base, checkpoint_every="2", **overrides)
    train_run(spec, tmp_path / "whole")
    step = Trainer._step
    for name, killed_at in (("a", 3), ("b", 5)):  # in either phase
        calls = iter(range(100))

        def dying(self: Trainer, batch: list[int], watch: bool = False, at: int = killed_at, calls: Any = calls):
            if next(calls) == at:
                raise KeyboardInterrupt
            return step(self, batch, watch)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", dying)
            with pytest.raises(KeyboardInterrupt):
                train_run(spec, tmp_path / name)
        train_run(spec, tmp_path / name, resume=True)
        assert contents(tmp_path / name / "model") == contents(tmp_path / "whole" / "model")
        assert read_metrics(tmp_path / name) == read_metrics(tmp_path / "whole")


def test_it_learns_tool_value_and_plan_beside_a_baseline(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy_task(monkeypatch, train=640, validation=60)
    settings = {"max_steps": "200", "phase_a_steps": "120", "eval_every": "120", "epochs": "99", "side_size": "16"}
    result = train_run(toy_spec(base, **settings, baseline="true"), tmp_path / "run")
    assert result["accuracy"]["low"] > max(result["majority"]["high"], 0.7)
    assert result["value_error"] < 0.5 * result["value_error_of_mean"] and result["plan"]["low"] > 0.7
    baseline = result["baseline"]
    assert baseline["accuracy"]["total"] == 60 and baseline["accuracy"]["low"] > result["majority"]["high"]
    assert baseline["path_parameters"] == pytest.approx(result["path_parameters"], rel=0.03)
    # Phase A without blending leaves the language model as it was.
    assert evaluations(tmp_path / "run")[0]["lm_loss"] == pytest.approx(result["base_lm_loss"], rel=1e-6)
    text = format_result(result)
    assert "head only" in text and "LM loss of the base before training" in text
    assert baseline["phase_a"]["accuracy"]["total"] == 60
    assert baseline["phase_a"]["lm_loss"] == pytest.approx(result["base_lm_loss"], rel=1e-6)
    assert "Tools at the end of phase A: ema " in (tmp_path / "run" / "report.md").read_text()


def test_the_baseline_is_trained_as_a_run_of_head_only_is(base: str, tmp_path: Path) -> None:
    beside = train_run(toy_spec(base, baseline="true"), tmp_path / "ema")["baseline"]
    alone = train_run(toy_spec(base, "head_only"), tmp_path / "head_only")
    assert alone["path_parameters"] == beside["path_parameters"] and "baseline" not in alone
    assert alone["accuracy"] == beside["accuracy"]
    assert alone["loss"] == pytest.approx(beside["loss"], rel=1e-5)
    assert alone["lm_loss"] == pytest.approx(beside["lm_loss"], rel=1e-5)


def test_a_sweep_over_aggregators(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [part for key, value in FAST.items() if key != "baseline" for part in ("--set", f"{key}={value}")]
    arguments = ("--presets", "ema,gru,attn", "--seeds", "0,1", "--dataset", "toy", "--backbone", base)
    assert run_xlayer(monkeypatch, "sweep", "lformer", *arguments, *settings, "--out", tmp_path / "sweep") == 0
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["majority", "one keyword", "ema", "gru", "attn"]
    assert all(len(row["per_seed"]) == 2 and row["lm_loss"] > 0 for row in results["rows"][2:])
    assert not any("baseline" in run for runs in results["runs"].values() for run in runs)
    assert {"curves.png", "usage-ema.png", "report.md"} <= {path.name for path in (tmp_path / "sweep").iterdir()}
    assert "tools on 23 validation requests" in capsys.readouterr().out


# ---- The data under a tokenizer --------------------------------------------------------------------------------------


def test_batches_and_their_scores() -> None:
    data = toy_data()
    batch = data.collate(data.train[:17])
    assert batch["lm_input_ids"].shape == (math.ceil(17 / BLOCK_EVERY), 12) and batch["plan"].shape == (17, 3)
    assert torch.equal(batch["lm_input_ids"][:, 1:], batch["lm_labels"][:, :-1])
    assert batch["tools"].tolist() == [example.tool for example in data.task.train[:17]]
    read = toy_tokenizer().decode(batch["input_ids"][3][batch["attention_mask"][3].bool()], skip_special_tokens=True)
    assert read.strip() == data.task.train[3].text
    trainee = make_trainee(data).eval()
    wanted = data.collate(data.validation)
    with torch.no_grad():
        output = trainee(**wanted)
        metrics = data.summarize(data.score(output, wanted).sum(0))
    assert metrics["correct"] == int((output.logits_tools.argmax(-1) == wanted["tools"]).sum())
    assert metrics["loss"] == pytest.approx(float(output.losses["tool"]), rel=1e-5)
    assert metrics["lm_loss"] == pytest.approx(float(output.losses["lm"]), rel=1e-5)
    assert metrics["value_error"] == pytest.approx(math.sqrt(float(output.losses["value"])), rel=1e-4)
    assert metrics["plans_correct"] == int((output.plan == wanted["plan"]).all(1).sum())


def test_blocks_are_read_only_where_their_loss_teaches() -> None:
    data = toy_data()
    batch = data.collate(data.train[:16])
    for options, in_phase in (
        ({}, {"a": False, "b": True}),
        ({"last_k_unfreeze": 0}, {"a": False, "b": False}),
        ({"lambda_lm": 0.0}, {"a": False, "b": False}),
        ({"blend_into_lm": True, "last_k_unfreeze": 0}, {"a": True, "b": True}),
    ):
        trainee = make_trainee(data, phase_a_steps=1, **options).train()
        for number, phase in enumerate("ab"):
            trainee.begin_step(number)
            assert trainee.model.phase == phase
            assert ("lm" in trainee(**batch).losses) == in_phase[phase]
            assert "lm" in trainee.eval()(**batch).losses
            trainee.train()


def test_requests_from_a_folder_without_values_and_plans(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xlayer_systems.data.tools import load_tool_task
    from xlayer_systems.lformer import system

    monkeypatch.setattr(system, "load_tool_task", load_tool_task)
    spec = make_spec("lformer", dataset=save_rows(tmp_path), backbone=base, overrides=FAST | {"max_steps": "3"})
    result = train_run(spec, tmp_path / "run")
    assert result["accuracy"]["total"] == 9 and "plan" not in result and "value_error" not in result
    assert "lformer ema" in format_result(result)


def test_wrong_input_ends_in_one_line(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    short = ("--backbone", base, "--set", "lm_length=12")
    for arguments, message in (
        (("--preset", "lstm"), "unknown preset 'lstm'; expected one of ema, gru, attn, head_only"),
        (("--set", "pooling=cls"), "unknown pooling 'cls'; expected one of mean, first, last, attention"),
        (("--set", "phase_a_steps=-1"), "phase_a_steps must be at least 0, got -1"),
        (("--set", "blend_into_lm=true", "--set", "sequence_wise=true"), "blend_into_lm needs sequence_wise=False"),
        ((*short, "--set", "last_k_unfreeze=9"), "last_k_unfreeze must be at most the base's 4 layers"),
        (
            (*short, "--set", "aggregator_heads=3", "--preset", "attn"),
            "hidden_size must be a multiple of num_heads = 3",
        ),
    ):
        assert run_xlayer(monkeypatch, "train", "lformer", *arguments, "--run-dir", tmp_path / "x") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_another_base_is_refused_at_loading(base: str, tmp_path: Path) -> None:
    from xlayer_systems.registry import get_system

    train_run(toy_spec(base, max_steps="1"), tmp_path / "run")
    with pytest.raises(ValueError, match="was made for a model with weights"):
        get_system("lformer").load(tmp_path / "run" / "model", toy_base(seed=5))


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    corpus = toy_corpus()
    for name, texts in (("train", corpus.train), ("validation", corpus.validation)):
        (tmp_path / "text" / f"{name}.txt").write_text("\n".join(texts))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    settings = FAST | {"dropout": "0", "lm_dataset": str(tmp_path / "text"), "baseline": "true"}
    arguments = ["train", "lformer", "--dataset", save_rows(tmp_path), "--backbone", base]
    arguments += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    finish(start_xlayer(*arguments, "--run-dir", tmp_path / "two", launcher=launcher))
    finish(start_xlayer(*arguments, "--run-dir", tmp_path / "one"))
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert one != two  # to the last bit: there were two
    for key in ("loss", "lm_loss", "train_loss"):
        values = [[record[key] for record in records if key in record] for records in (one, two)]
        assert values[0] and values[0] == pytest.approx(values[1], rel=1e-4)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["baseline"]["loss"] == pytest.approx(results[1]["baseline"]["loss"], rel=1e-4)
