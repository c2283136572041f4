"""From the command line and a run file to a run: its system, spec and directory's name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlayer_systems.errors import UserError

if TYPE_CHECKING:
    from xlayer_systems.runs.spec import RunSpec

MAX_BACKBONE_NAME = 48  # characters in the name of a run directory


def run_of(
    command: Mapping[str, Any],
    flags: Mapping[str, str | None],
    overrides: dict[str, str],
    file: Path | None,
    bounded: bool = True,
) -> tuple[Any, RunSpec, dict[str, Any]]:
    """Returns the system, the run, and the merged values of the command line and the run file."""
    from xlayer_systems.registry import get_system
    from xlayer_systems.runs.run_file import NAMES, SECTIONS, as_text, check_run_file, chosen_values, read_run_file
    from xlayer_systems.training.options import current_overrides

    stored = {} if file is None else read_run_file(file)
    given = {name: stored.get(name) if value is None else value for name, value in command.items()}
    if not isinstance(given["system"], str):
        raise UserError("name the system to train, or a run file with its name by --config")
    chosen = get_system(given["system"])
    names: dict[str, Any] = {
        name: None if given[name] is None else str(given[name]) for name in ("preset", "dataset", "backbone")
    }
    seed, quick = given["seed"] or 0, given["quick"] or False
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UserError(f"seed in {file} must be an integer, got {seed!r}")
    for name in ("quick", "resume"):
        if not isinstance(given[name] or False, bool):
            raise UserError(f"{name} in {file} must be true or false, got {given[name]!r}")
    sections: dict[str, dict[str, str]] = {name: {} for name in SECTIONS}
    if file is not None:
        of_run = chosen.defaults(**names, quick=quick)
        of_file = of_run if stored.get("system", chosen.name) != chosen.name else _defaults_of(chosen, stored)
        config, options = (_field_names(*kinds) for kinds in zip(of_file, of_run, strict=True))
        own = {name.replace("-", "_"): key for name, key in chosen.flags.items()}
        targets = (*of_file, *of_run)
        stored = current_overrides(stored, *targets)
        for name in SECTIONS:
            stored[name] = current_overrides(stored.get(name) or {}, *targets)
        overrides = current_overrides(overrides, *targets)
        check_run_file(file, stored, options, config, own)
        sections = {"set": as_text(stored.get("set") or {}), **chosen_values(of_file, of_run, stored)}
        plain = {own.get(key, key): value for key, value in stored.items() if key not in {*NAMES, *SECTIONS}}
        sections["set"] = {**as_text(plain), **sections["set"]}
    by_command = {**as_overrides(epochs=given["epochs"]), **own_flags(chosen, flags), **overrides}
    for section in ("options", "config"):
        sections[section] = {key: value for key, value in sections[section].items() if key not in by_command}
    if file is not None:
        for key in sorted(sections["config"].keys() - _field_names(of_run[0])):
            preset = names["preset"] or chosen.default_preset
            raise UserError(f"the preset {preset} has no {key}, which {file} sets in config: remove it there")
    spec = chosen.make_spec(
        **names,
        seed=seed,
        quick=quick,
        overrides={**sections["set"], **by_command},
        options=sections["options"],
        config=sections["config"],
        bounded=bounded,
    )
    return chosen, spec, given


def _defaults_of(system: Any, stored: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns config and options by default of the names in a run file."""
    names = {name: str(stored[name]) for name in ("preset", "dataset", "backbone") if stored.get(name) is not None}
    found: tuple[Any, Any] = system.defaults(**names, quick=stored.get("quick") is True)
    return found


def _field_names(*settings: Any) -> set[str]:
    """Returns the names of the fields of dataclasses, any of which may be None."""
    return {field.name for one in settings if one is not None for field in dataclasses.fields(one)}


def own_flags(system: Any, flags: Mapping[str, str | None]) -> dict[str, str]:
    """Returns the overrides that the flags of systems set; flags of another system are refused."""
    known = {name.replace("-", "_"): key for name, key in system.flags.items()}
    given = {name: value for name, value in flags.items() if value is not None}
    for name in given:
        if name not in known:
            raise UserError(
                f"{system.name} has no option --{name.replace('_', '-')}; see `xlayer options {system.name}`"
            )
    words = {name.replace("-", "_"): found for name, found in system.flag_words.items()}
    return {known[name]: words.get(name, {}).get(value, value) for name, value in given.items()}


def as_overrides(**values: int | str | None) -> dict[str, str]:
    return {key: str(value) for key, value in values.items() if value is not None}


def run_name(system: Any, spec: RunSpec, quick: bool) -> str:
    dataset = spec.dataset.strip("/").replace("/", "-")
    backbone = backbone_part(system, spec.backbone)
    return f"{spec.system}-{spec.preset}-{backbone}{dataset}-seed{spec.seed}{'-quick' * quick}"


def backbone_part(system: Any, backbone: str) -> str:
    """Returns the part of a directory's name for a backbone; empty for the system's default."""
    if backbone == system.default_backbone:
        return ""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", backbone).strip("-.")
    if len(name) > MAX_BACKBONE_NAME:  # the end of a path says most; the hash keeps two of them apart
        name = f"{name[-MAX_BACKBONE_NAME:].strip('-.')}-{sha256(backbone.encode()).hexdigest()[:6]}"
    return f"{name}-"
