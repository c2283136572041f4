"""Run directories survive a kill and overwrite nothing; the intervals of the reports have their textbook values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xlayer_systems.errors import UserError
from xlayer_systems.reporting.stats import student_interval, student_quantile, wilson_interval
from xlayer_systems.training.directory import RunDirectory, environment

SURROUNDINGS = {"python": "3.11.7", "data_hash": "abc", "packages": {}}


def make_run(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    run.create({"preset": "H9", "options": {"epochs": 3}}, SURROUNDINGS)
    return run


def test_an_existing_directory_is_refused_and_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        make_run(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("config", "surroundings", "message"),
    [
        ({"preset": "H9", "options": {"epochs": 4}}, SURROUNDINGS, "options/epochs is 3, this command's is 4"),
        ({"preset": "H9", "options": {"epochs": 3}, "seed": 1}, SURROUNDINGS, "seed is None"),
        ({"preset": "H9", "options": {"epochs": 3}}, {**SURROUNDINGS, "python": "3.12.1"}, "Python version is 3.11.7"),
        ({"preset": "H9", "options": {"epochs": 3}}, {**SURROUNDINGS, "data_hash": "x"}, "corpus hash is abc"),
    ],
)
def test_another_config_python_or_corpus_cannot_be_resumed(tmp_path, config, surroundings, message):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        run.check_resumable(config, surroundings)


def test_the_same_config_can_be_resumed(tmp_path):
    run = make_run(tmp_path / "run")
    other_torch = {**SURROUNDINGS, "packages": {"torch": "9"}}
    run.check_resumable({"preset": "H9", "options": {"epochs": 3}}, other_torch)


def test_a_folder_without_config_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        RunDirectory(tmp_path).read_config()


def test_metrics_are_cut_back_to_what_a_checkpoint_saw(tmp_path):
    run = make_run(tmp_path / "run")
    run.log({"event": "train", "step": 1, "loss": 0.5})
    size = run.metrics_size()
    run.log({"event": "train", "step": 2, "loss": 0.25})
    run.cut_metrics(size)
    run.log({"event": "train", "step": 2, "loss": 0.125})
    assert [record["loss"] for record in run.metrics()] == [0.5, 0.125]


def test_a_checkpoint_that_fails_half_way_leaves_the_one_before(tmp_path):
    run = make_run(tmp_path / "run")

    def save(folder: Path) -> None:
        (folder / "weights").write_text("good")

    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    run.save_checkpoint(5, save, lambda: None)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(10, fail, lambda: None)
    latest = run.latest_checkpoint()
    assert latest is not None and (latest / "weights").read_text() == "good"
    run.save_checkpoint(15, save, lambda: None)
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-00000015"]


def test_only_the_main_process_writes(tmp_path):
    run = RunDirectory(tmp_path / "run", is_writer=False)
    run.create({}, SURROUNDINGS)
    run.write_json("result.json", {})
    run.log({"event": "train"})
    assert not run.path.exists()


def test_the_environment_names_python_and_versions():
    found = environment("hash")
    assert json.loads(json.dumps(found)) == found
    assert found["data_hash"] == "hash" and found["python"].count(".") == 2 and "torch" in found["packages"]


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (50, 100, 0.4038, 0.5962), (20, 20, 0.8389, 1.0)],
)
def test_wilson_intervals_have_their_textbook_values(correct, total, low, high):
    interval = wilson_interval(correct, total)
    assert interval.mean == correct / total
    assert interval.low == pytest.approx(low, abs=5e-5) and interval.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(
    ("confidence", "degrees", "quantile"),
    [(0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 4, 2.7764), (0.95, 9, 2.2622), (0.99, 5, 4.0321), (0.9, 30, 1.6973)],
)
def test_student_quantiles_are_those_of_the_tables(confidence, degrees, quantile):
    assert student_quantile(confidence, degrees) == pytest.approx(quantile, abs=5e-5)


def test_student_interval_of_three_seeds():
    interval = student_interval([0.70, 0.72, 0.74])
    half = 4.302653 * 0.02 / 3**0.5
    assert interval.mean == pytest.approx(0.72)
    assert interval.high - interval.mean == pytest.approx(half, rel=1e-6)
    assert interval.mean - interval.low == pytest.approx(half, rel=1e-6)


def test_intervals_refuse_too_little_data():
    with pytest.raises(ValueError, match="two values"):
        student_interval([0.5])
    with pytest.raises(ValueError, match="total"):
        wilson_interval(0, 0)
