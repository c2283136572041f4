"""Options of the systems: their JSON schemas, the list that the command prints, and run files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from training_tools import contents, read_metrics, run_xlayer, save_backbone, save_rte
from xlayer_systems.cli.runs import run_of
from xlayer_systems.errors import UserError
from xlayer_systems.registry import PRETRAINING, SYSTEMS, get_system
from xlayer_systems.runs.run_file import as_text, read_run_file, write_run_file
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.training.options import LoopOptions, TrainOptions, check_fields, json_schema, nearest

ALL = {**SYSTEMS, **PRETRAINING}
KEYWORDS = {
    "$schema", "title", "description", "type", "additionalProperties", "properties", "presets", "quick", "enum",
    "default", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "items",
}  # fmt: skip
PYTHON: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Tells whether a value is valid under a schema, of the keywords that the systems use."""
    if "enum" in schema:
        return value in schema["enum"]
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    found = [name for name in types if isinstance(value, PYTHON[name])]
    if not found or (isinstance(value, bool) and "boolean" not in types):
        return False
    if isinstance(value, list):
        return all(fits(item, schema["items"]) for item in value)
    if isinstance(value, dict):
        return value.keys() <= schema["properties"].keys() and all(
            fits(item, schema["properties"][name]) for name, item in value.items()
        )
    bounds = {"minimum": float.__ge__, "maximum": float.__le__, "exclusiveMinimum": float.__gt__,
              "exclusiveMaximum": float.__lt__}  # fmt: skip
    return all(
        compare(float(value), float(schema[name]))
        for name, compare in bounds.items()
        if name in schema and not isinstance(value, str) and value is not None
    )


def keywords(schema: dict[str, Any]) -> set[str]:
    """Returns the keywords of a schema and of those inside it."""
    found = set(schema)
    for inner in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
        found |= keywords(inner)
    return found


@pytest.mark.parametrize(("name", "preset"), [(name, p) for name, s in ALL.items() for p in (None, *s.presets()[:3])])
def test_a_schema_has_help_for_all_options_and_its_defaults_are_valid(name: str, preset: str | None) -> None:
    schema = get_system(name).schema(preset)
    assert json.loads(json.dumps(schema)) == schema
    assert keywords(schema) <= KEYWORDS
    for section in (schema, *(schema["properties"][s] for s in ("options", "config"))):
        for found in section.get("properties", {}).values():
            if "default" in found:
                assert found["description"] and fits(found["default"], found)
    spec = get_system(name).make_spec(preset)
    for section, settings in (("options", spec.options), ("config", spec.config)):
        if settings is not None:
            values = json.loads(json.dumps(dataclasses.asdict(settings)))
            assert values.keys() == schema["properties"][section]["properties"].keys()
            assert fits(values, schema["properties"][section])


@pytest.mark.parametrize("name", ALL)
def test_what_a_schema_forbids_is_refused(name: str) -> None:
    spec = get_system(name).make_spec()
    for settings in (spec.options, spec.config):
        for key, found in json_schema(settings)["properties"].items():
            wrong: list[Any] = ["no such choice", 3.5j] if "enum" in found else []
            wrong += [found[bound] - 1 for bound in ("minimum", "exclusiveMinimum") if bound in found]
            wrong += [found[bound] + 1 for bound in ("maximum", "exclusiveMaximum") if bound in found]
            wrong += [found[bound] for bound in ("exclusiveMinimum", "exclusiveMaximum") if bound in found]
            for value in wrong:
                assert not fits(value, found)
                with pytest.raises(ValueError, match=f"{key} must be "):
                    dataclasses.replace(settings, **{key: value})


@pytest.mark.parametrize("name", ALL)
def test_presets_are_what_they_change(name: str) -> None:
    system = get_system(name)
    schema = system.schema()
    spec = system.make_spec()
    for preset, changes in schema["presets"].items():
        made = system.make_spec(preset)
        options = dataclasses.replace(spec.options, **changes.get("options", {}))
        assert made.options == options
        if changes.get("config", {}) is None:
            assert made.config is None
        elif type(made.config) is type(spec.config):
            assert made.config == dataclasses.replace(spec.config, **changes.get("config", {}))
    quick = dataclasses.replace(spec.options, **schema["quick"].get("options", {}))
    assert system.make_spec(quick=True).options == quick


def test_violations_are_told_in_one_form() -> None:
    for changes, message in (
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"epochs": True}, "epochs must be an integer, got True"),
        ({"warmup": "x"}, "warmup must be a number, got 'x'"),
        ({"clip": 0.0}, "clip must be finite and more than 0, got 0.0"),
        ({"tensorboard": 1}, "tensorboard must be true or false, got 1"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError) as caught:
            LoopOptions(**changes)  # type: ignore[arg-type]
        assert str(caught.value) == message
    check_fields(TrainOptions(bridge_lr=None))
    assert nearest("batchsize", ["batch_size", "clip"]) == " (did you mean batch_size?)"
    assert nearest("qqq", ["batch_size", "clip"]) == ""


def test_the_command_lists_the_options(monkeypatch, capsys) -> None:
    assert run_xlayer(monkeypatch, "options", "hyper_lm") == 0
    printed = capsys.readouterr().out
    assert "  expansion_rate = 4  (integer, ≥ 1)" in printed and "  plain            residual=plain" in printed
    assert run_xlayer(monkeypatch, "options", "bypass", "--preset", "lora", "--json") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["config"]["properties"]["rank"]["default"] is None
    assert run_xlayer(monkeypatch, "options") == 0
    assert "\nhyper_lm   " in capsys.readouterr().out
    assert run_xlayer(monkeypatch, "options", "lstm") == 2
    assert "unknown system 'lstm'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sweep", "profile"])
def test_the_keys_of_set_are_listed_by_help(monkeypatch, capsys, command: str) -> None:
    assert run_xlayer(monkeypatch, "options", "hyper_lm", "--quick") == 0
    listed = capsys.readouterr().out
    assert run_xlayer(monkeypatch, command, "hyper_lm", "--quick", "--set", "help") == 0
    assert capsys.readouterr().out == listed


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    return {
        "dataset": str(save_rte(folder / "rte")),
        "backbone": str(save_backbone(folder / "backbone")),
    }


def test_the_run_file_of_a_run_directory_reproduces_the_run(places, tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "mine.yaml"
    content = {"system": "xlrb", "preset": "A12", **places, "seed": 3, "epochs": 1, "batch_size": 8,
               "options": {"encoder_lr": 1e-3}, "config": {"route_last_n": 2}, "set": {"proj_dim": 8}}  # fmt: skip
    file.write_text(yaml.safe_dump(content))
    assert run_xlayer(monkeypatch, "train", "--config", file, "--run-dir", tmp_path / "first") == 0
    config = json.loads((tmp_path / "first" / "config.json").read_text())["run"]
    assert (config["preset"], config["seed"], config["options"]["encoder_lr"]) == ("A12", 3, 1e-3)
    assert (config["config"]["proj_dim"], config["config"]["route_last_n"], config["options"]["batch_size"]) == (
        8,
        2,
        8,
    )
    kept = tmp_path / "first" / "run.yaml"
    assert run_xlayer(monkeypatch, "train", "--config", kept, "--run-dir", tmp_path / "again") == 0
    first, again = contents(tmp_path / "first"), contents(tmp_path / "again")
    for name in ("config.json", "run.yaml", "metrics.jsonl", "model/xlrb.safetensors"):
        assert first[name] == again[name], name
    capsys.readouterr()


def test_the_command_line_wins_over_a_run_file(places, tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "mine.yaml"
    content = {"system": "xlrb", "preset": "A12", **places, "seed": 3, "run_dir": str(tmp_path / "unused"),
               "options": {"max_steps": 1, "batch_size": 8, "epochs": 1}}  # fmt: skip
    file.write_text(yaml.safe_dump(content))
    command = ["train", "--config", file, "--preset", "plain", "--seed", 4, "--set", "max_steps=2", "--run-dir"]
    assert run_xlayer(monkeypatch, *map(str, command), tmp_path / "run") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert (config["preset"], config["seed"], config["options"]["max_steps"]) == ("plain", 4, 2)
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2 and not (tmp_path / "unused").exists()
    capsys.readouterr()


def of_command_line(file: Path, **command: Any) -> RunSpec:
    """Returns the run of a run file and the options of a command."""
    names = ("system", "preset", "dataset", "backbone", "seed", "epochs", "quick", "run_dir", "resume")
    return run_of({**dict.fromkeys(names), **command}, {}, {}, file)[1]


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes the run file of a run."""

    def write(system: str, *given: str, **changes: Any) -> Path:
        file = tmp_path / "run.yaml"
        file.write_text(write_run_file(get_system(system).make_spec(*given, **changes)))
        return file

    return write


@pytest.mark.parametrize(
    ("system", "changed"),
    [
        ("xlrb", {"preset": "A12"}),
        ("xlrb", {"preset": "plain"}),
        ("xlrb", {"quick": True}),
        ("hyper_lm", {"preset": "plain"}),
        ("hyper_lm", {"preset": "mhc", "backbone": "small"}),
        ("bypass", {"preset": "lora"}),
        ("telepathy", {"backbone": "gpt2,gpt2"}),
        ("lformer", {"preset": "gru", "quick": True}),
    ],
)
def test_another_name_on_the_command_line_brings_its_own_defaults(run_file, monkeypatch, system, changed) -> None:
    """Another preset, backbone or quick settings than a run's give the same as with these names alone."""
    monkeypatch.setattr(type(get_system(system)), "fingerprint", lambda self, backbone: backbone)
    assert of_command_line(run_file(system), **changed) == get_system(system).make_spec(**changed)


def test_values_that_a_run_file_changes_stay_under_another_preset(run_file) -> None:
    file = run_file("hyper_lm", "dhc", quick=True, overrides={"expansion_rate": "2", "learning_rate": "0.5"})
    spec = of_command_line(file, preset="mhc")
    assert (spec.preset, spec.config.residual, spec.config.expansion_rate) == ("mhc", "mhc", 2)
    assert (spec.options.learning_rate, spec.options.max_steps) == (0.5, 600)


def test_a_value_that_another_preset_does_not_have_is_refused(run_file) -> None:
    file = run_file("xlrb", "H9", overrides={"proj_dim": "8"})
    with pytest.raises(UserError, match=r"^the preset plain has no proj_dim, which .*run.yaml sets in config: remove"):
        of_command_line(file, preset="plain")


def test_a_flag_of_a_system_may_stand_in_a_run_file(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("system: hyper_lm\npreset: dhc\nstreams: 2\n")
    names = ("system", "preset", "dataset", "backbone", "seed", "epochs", "quick", "run_dir", "resume")
    command = dict.fromkeys(names)
    assert run_of(command, {}, {}, file)[1].config.expansion_rate == 2
    assert run_of(command, {"streams": "3"}, {}, file)[1].config.expansion_rate == 3
    assert run_of(command, {}, {"expansion_rate": "5"}, file)[1].config.expansion_rate == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("system: xlrb\nbatchsize: 8\n", "unknown key 'batchsize' of the run file {file} (did you mean batch_size?)"),
        ("system: xlrb\nconfig: {batch_size: 8}\n", "unknown key 'batch_size' in config of the run file {file}"),
        ("system: xlrb\noptions: 3\n", "options in {file} must hold options as `name: value`, got 3"),
        ("system: xlrb\nseed: one\n", "seed in {file} must be an integer, got 'one'"),
        ("system: xlrb\nquick: 3\n", "quick in {file} must be true or false, got 3"),
        ("- a list\n", "the run file {file} must hold options as `name: value`"),
        ("preset: [\n", "cannot read the run file {file}: "),
        ("preset: H9\n", "name the system to train"),
        ("system: xlrb\noptions: {batch_size: 0}\n", "batch_size must be at least 1, got 0"),
    ],
)
def test_a_wrong_run_file_is_one_line(tmp_path, monkeypatch, capsys, content: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert run_xlayer(monkeypatch, "train", "--config", file, "--run-dir", tmp_path / "run") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message.format(file=file)}") and printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name, s in SYSTEMS.items() for preset in s.presets()])
def test_every_run_is_what_its_run_file_says(name: str, preset: str, tmp_path: Path) -> None:
    system = get_system(name)
    spec = system.make_spec(preset, seed=5, quick=True)
    (tmp_path / "run.yaml").write_text(write_run_file(spec))
    content = read_run_file(tmp_path / "run.yaml")
    sections = {section: as_text(content.get(section) or {}) for section in ("options", "config")}
    names = {key: content[key] for key in ("dataset", "backbone", "seed")}
    assert content["system"] == name and system.make_spec(content["preset"], **names, **sections) == spec


def test_a_flag_of_another_system_is_refused(tmp_path, monkeypatch, capsys) -> None:
    assert run_xlayer(monkeypatch, "train", "xlrb", "--streams", "2", "--run-dir", tmp_path / "run") == 2
    assert capsys.readouterr().err == "error: xlrb has no option --streams; see `xlayer options xlrb`\n"
    with pytest.raises(UserError, match=r"unknown setting 'batchsize' \(did you mean batch_size\?\); expected one of"):
        get_system("xlrb").make_spec(overrides={"batchsize": "3"})
