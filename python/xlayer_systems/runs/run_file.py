"""Run files: a YAML file that can hold every option of ``xlayer train``.

::

    system: hyper_lm
    preset: dhc
    dataset: stdlib-lm
    seed: 1
    quick: true
    run_dir: runs/mine
    max_steps: 400           # any option or field of the config, as in --set
    streams: 2               # any flag of the system
    options: {clip: 0.5}     # the same as --set, of the training options alone
    config: {dropout: 0.1}   # or of the config alone

Every run directory holds the run file that reproduces it, with all options and the whole config. Where the command line
names another preset, data set or backbone, or asks for quick settings, only those values of ``options`` and ``config``
count that differ from the defaults of the file's own names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xlayer_systems.errors import UserError
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.training.options import nearest, plain

NAME = "run.yaml"
NAMES = ("system", "preset", "dataset", "backbone", "seed", "quick", "epochs", "run_dir", "resume", "set")
SECTIONS = ("options", "config", "set")

Defaults = tuple[Any, Any]  # a system's config (None: a backbone alone) and its training options


def read_run_file(path: Path) -> dict[str, Any]:
    """Reads a run file as it is; `check_run_file` checks its keys once the system is known.

    Raises:
        UserError: it cannot be read, or holds no mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the run file {path}: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"the run file {path} must hold options as `name: value`")
    for name in SECTIONS:
        section = content.get(name)
        if section is not None and not isinstance(section, dict):
            raise UserError(f"{name} in {path} must hold options as `name: value`, got {section!r}")
    return content


def check_run_file(
    path: Path, content: Mapping[str, Any], options: Iterable[str], config: Iterable[str], flags: Iterable[str] = ()
) -> None:
    """Checks the keys of a run file.

    Args:
        options, config: names of the system's training options and of the fields of its config.
        flags: names of its own flags.

    Raises:
        UserError: a key is unknown; the message names the nearest known one.
    """
    options, config = set(options), set(config)
    top = {*NAMES, *SECTIONS, *options, *config, *flags}
    expected = {"": top, "options": options, "config": config, "set": options | config}
    for section, known in expected.items():
        found = content if section == "" else content.get(section) or {}
        for key in found:
            if key not in known:
                at = f" in {section}" if section else ""
                raise UserError(f"unknown key {key!r}{at} of the run file {path}{nearest(str(key), sorted(known))}")


def chosen_values(file: Defaults, run: Defaults, stored: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Returns, as text, the values of ``options`` and ``config`` that count.

    Args:
        file: config and options by default of the names in the file.
        run: those of the names that the run has.
        stored: content of the file.

    Where both are the same, all values count; else only those that are not merely defaults of the file's names.
    """
    found = {name: as_text(stored.get(name) or {}) for name in ("options", "config")}
    if file == run:
        return found
    defaults = {"config": {} if file[0] is None else plain(file[0]), "options": plain(file[1])}
    return {
        name: {key: value for key, value in values.items() if (key, value) not in as_text(defaults[name]).items()}
        for name, values in found.items()
    }


def as_text(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns options as the texts that ``--set`` takes."""
    return {key: _text(value) for key, value in values.items()}


def write_run_file(spec: RunSpec) -> str:
    """Returns the run file that reproduces ``spec``."""
    import yaml

    content = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    del content["backbone_weights"]
    content["options"] = plain(spec.options)
    if spec.config is None:
        del content["config"]
    else:
        content["config"] = plain(spec.config)
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    return text


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)
