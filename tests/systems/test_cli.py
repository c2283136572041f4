"""The ``xlayer`` command: a run, a sweep, their files; and one line, exit code 2, nothing overwritten on bad input."""

from __future__ import annotations

import json

import pytest

import xlayer_ext
from training_tools import contents, finish, run_xlayer, save_backbone, save_rte, start_xlayer
from xlayer_systems.runs.sweep import parse_variants

FAST = ["--set", "encoder_lr=1e-3", "--set", "batch_size=8", "--epochs", "1"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Returns command-line options for the tiny backbone and data set."""
    folder = tmp_path_factory.mktemp("places")
    return ["--dataset", save_rte(folder / "rte"), "--backbone", save_backbone(folder / "backbone"), *FAST]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, options):
    """Makes a run directory by the command in a process of its own; returns it and the printed text."""
    run = tmp_path_factory.mktemp("runs") / "run"
    return run, finish(start_xlayer("train", "xlrb", "--preset", "A12", *options, "--run-dir", run))


def test_a_run_leaves_everything_that_its_directory_promises(finished):
    run, printed = finished
    assert "majority" in printed and "lexical overlap" in printed and "xlrb A12" in printed
    files = contents(run)
    assert {"config.json", "metrics.jsonl", "timings.jsonl", "report.md", "result.json"} <= set(files)
    assert files["plots/curves.png"][:4] == files["plots/usage.png"][:4] == b"\x89PNG"
    assert any(name.startswith("tensorboard/events") for name in files)
    assert any(name.startswith("checkpoints/step-00000008/") for name in files)
    assert any(name.startswith("model/") and name.endswith(".safetensors") for name in files)
    config = json.loads(files["config.json"])
    assert config["run"]["config"]["top_k"] == 2 and config["run"]["options"]["encoder_lr"] == 1e-3
    assert config["environment"]["python"].count(".") == 2 and config["environment"]["data_hash"]
    assert "| epoch |" in files["report.md"].decode()


def test_eval_repeats_the_result(finished, monkeypatch, capsys):
    run, printed = finished
    assert run_xlayer(monkeypatch, "eval", run) == 0
    assert capsys.readouterr().out.splitlines() == printed.splitlines()[:4]


def test_resuming_a_finished_run_changes_nothing(finished, options, monkeypatch, capsys):
    run, printed = finished
    before = contents(run)
    assert run_xlayer(monkeypatch, "train", "xlrb", "--preset", "A12", *options, "--run-dir", run, "--resume") == 0
    assert contents(run) == before
    assert capsys.readouterr().out == printed


def test_a_sweep_prints_its_table_and_goes_on_from_finished_runs(tmp_path, options, monkeypatch, capsys):
    out = tmp_path / "sweep"
    sweep = ["sweep", "xlrb", *options, "--out", out, "--seeds", "0,1"]
    presets = "plain,H9:router_weight=full_softmax"
    assert run_xlayer(monkeypatch, *sweep, "--presets", presets) == 0
    printed = capsys.readouterr().out
    names = [line.split("  ")[0] for line in printed.splitlines()]
    assert {"majority", "lexical overlap", "plain", "H9:router_weight=full_softmax"} <= set(names)
    assert "Student's t over 2 seeds" in printed and "published" not in printed  # nothing of a changed H9
    results = json.loads((out / "results.json").read_text())
    row = results["rows"][2]
    accuracies = [run["accuracy"]["mean"] for run in results["runs"]["plain"]]
    assert row["accuracy"] == pytest.approx(sum(accuracies) / 2) and row["low"] <= row["accuracy"] <= row["high"]
    assert (out / "curves.png").exists() and (out / "usage-H9-router_weight_full_softmax.png").exists()
    config = json.loads((out / "H9-router_weight_full_softmax-seed1" / "config.json").read_text())
    assert config["run"]["config"]["router_weight"] == "full_softmax" and config["run"]["seed"] == 1
    assert results["environment"] == config["environment"]
    before = contents(out / "plain-seed0")
    assert run_xlayer(monkeypatch, *sweep, "--presets", f"{presets},A3", "--resume") == 0
    assert contents(out / "plain-seed0") == before
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("A3 ")).endswith("  85.9 %")
    assert not next(line for line in lines if line.startswith("plain ")).endswith("%")
    assert any(line.startswith("published: RoBERTa-large on GLUE RTE") for line in lines)


def test_variants_are_presets_with_overrides():
    plain, variant = parse_variants("plain, H9:top_k=2:router_weight=full_softmax")
    assert (plain.preset, plain.overrides) == ("plain", {})
    assert (variant.preset, variant.overrides) == ("H9", {"top_k": "2", "router_weight": "full_softmax"})


BAD_TRAIN = [
    (["--preset", "H99"], "unknown preset 'H99'; expected plain, H1 to H30 or A1 to A20"),
    (["--preset", "H21", "--dataset", "stdlib-topics"], "preset H21 reads sentence pairs, and stdlib-topics has"),
    (["--dataset", "no-such-data"], "cannot load data set 'no-such-data'; expected stdlib-topics, stdlib-pairs"),
    (["--dataset", "stdlib-lm"], "expected a classification data set"),
    (["--backbone", "no-such-model"], "cannot load backbone 'no-such-model'; expected small, small-scratch"),
    (["--set", "dtype=float8"], "unknown dtype 'float8'; expected one of float32, bfloat16, float16"),
    (["--set", "colour=red"], "unknown setting 'colour'; expected one of accumulate, activation"),
    (["--set", "top_k"], "expected key=value, got 'top_k'"),
    (["--set", "top_k=0"], "top_k"),
    (["--set", "router_weight=hard"], "router_weight"),
    (["--set", "batch_size=0"], "batch_size must be at least 1, got 0"),
    (["--set", "accumulate=3"], "batch_size 8 must be a multiple of processes x accumulate = 1 x 3"),
    (["--set", "max_length=x"], "max_length takes a value of type int, got 'x'"),
    (["--set", "encoder_lr=inf"], "encoder_lr must be finite and not negative, got inf"),
    (["--set", "head_lr=nan"], "head_lr must be finite and not negative, got nan"),
    (["--set", "bridge_lr=-1e-3"], "bridge_lr must be finite and not negative, got -0.001"),
    (["--set", "weight_decay=-1"], "weight_decay must be finite and not negative, got -1.0"),
    (["--set", "warmup=1.5"], "warmup must be between 0 and 1, got 1.5"),
    (["--set", "warmup=nan"], "warmup must be between 0 and 1, got nan"),
    (["--set", "head_dropout=-0.1"], "head_dropout must be between 0 and 1, got -0.1"),
    (["--set", "clip=0"], "clip must be finite and more than 0, got 0.0"),
    (["--set", "stop_below=nan"], "stop_below must be finite, got nan"),
    (["--seed", "-1"], "a seed must be between 0 and 4294967295, got -1"),
    (["--seed", str(2**70)], "a seed must be between 0 and 4294967295, got 1180591620717411303424"),
    (["--seed", "x"], "Invalid value for '--seed'"),
    (["--preset", ""], "preset must be a name, got ''"),
    (["--dataset", " "], "dataset must be a name, got ' '"),
    (["--no-such-option"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_TRAIN, ids=[" ".join(a) for a, _ in BAD_TRAIN])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, options, monkeypatch, capsys, arguments, message):
    run = tmp_path / "run"
    assert run_xlayer(monkeypatch, "train", "xlrb", *options, *arguments, "--run-dir", run) == 2
    check_error(capsys, message)
    assert not run.exists()


def check_error(capsys, message: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert message in captured.err


def test_an_unknown_system_is_refused(tmp_path, monkeypatch, capsys):
    assert run_xlayer(monkeypatch, "train", "lstm", "--run-dir", tmp_path / "run") == 2
    check_error(capsys, "unknown system 'lstm'; expected one of xlrb")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "A12"], "exists"),
        (["--preset", "H9", "--resume"], "its config/"),
        (["--preset", "A12", "--resume", "--set", "clip=2.0"], "its options/clip is 1.0, this command's is 2.0"),
        (["--preset", "A12", "--resume", "--seed", "3"], "its seed is 0, this command's is 3"),
    ],
)
def test_a_run_directory_is_never_overwritten(finished, options, monkeypatch, capsys, arguments, message):
    run, _ = finished
    before = contents(run)
    assert run_xlayer(monkeypatch, "train", "xlrb", *options, *arguments, "--run-dir", run) == 2
    check_error(capsys, message)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("data_hash", "0" * 16, "its corpus hash is 0000"), ("python", "2.7.18", "its Python version is 2.7.18")],
)
def test_a_run_of_another_corpus_or_python_is_not_resumed(
    tmp_path, finished, options, monkeypatch, capsys, key, value, message
):
    run = tmp_path / "run"
    run.mkdir()
    config = json.loads((finished[0] / "config.json").read_text())
    config["environment"][key] = value
    (run / "config.json").write_text(json.dumps(config))
    before = contents(run)
    assert run_xlayer(monkeypatch, "train", "xlrb", "--preset", "A12", *options, "--run-dir", run, "--resume") == 2
    check_error(capsys, message)
    assert contents(run) == before


def test_eval_of_what_is_no_finished_run(tmp_path, finished, monkeypatch, capsys):
    assert run_xlayer(monkeypatch, "eval", tmp_path) == 2
    check_error(capsys, "is not a run directory: expected a readable config.json")
    (tmp_path / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    assert run_xlayer(monkeypatch, "eval", tmp_path) == 2
    check_error(capsys, "is not finished")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,x"], "expected seeds such as 0,1,2, got '0,x'"),
        (["--seeds", "1,1"], "a seed is named twice"),
        (["--seeds", ""], "expected seeds such as 0,1,2, got ''"),
        (["--seeds", "0,-1"], "a seed must be between 0 and 4294967295, got -1"),
        (["--presets", ""], "expected presets separated by commas, such as plain,H9, got ''"),
        (["--presets", "H9,H9"], "a preset is named twice"),
        (["--presets", "H9,,A3"], "expected presets separated by commas"),
        (["--presets", "plain,H31"], "unknown preset 'H31'"),
        (["--presets", "plain:top_k=2"], "unknown setting 'top_k'"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_runs(tmp_path, options, monkeypatch, capsys, arguments, message):
    out = tmp_path / "sweep"
    assert run_xlayer(monkeypatch, "sweep", "xlrb", *options, *arguments, "--out", out) == 2
    check_error(capsys, message)
    assert not out.exists()


def test_an_existing_sweep_is_refused(tmp_path, options, monkeypatch, capsys):
    assert run_xlayer(monkeypatch, "sweep", "xlrb", *options, "--out", tmp_path) == 2
    check_error(capsys, "exists; choose another --out")


def test_help_teaches_by_examples(monkeypatch, capsys):
    for arguments in ([], ["train"], ["sweep"], ["pretrain", "encoder"]):
        assert run_xlayer(monkeypatch, *arguments, "--help") == 0
        assert "xlayer " in capsys.readouterr().out


def test_info_says_what_is_in_use(monkeypatch, capsys):
    assert run_xlayer(monkeypatch, "info") == 0
    assert "torch" in capsys.readouterr().out
    assert run_xlayer(monkeypatch, "info", "--json") == 0
    assert "torch" in json.loads(capsys.readouterr().out)


def test_the_version_is_printed(monkeypatch, capsys):
    assert run_xlayer(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"xlayer-ext {xlayer_ext.__version__}\n"
