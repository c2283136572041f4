"""The registry of all systems; no other file names them."""

from __future__ import annotations

from pathlib import Path

from xlayer_systems.bypass.system import BypassSystem
from xlayer_systems.errors import UserError
from xlayer_systems.hyper_lm.system import HyperLMSystem
from xlayer_systems.lformer.system import LFormerSystem
from xlayer_systems.pretraining.decoder import DecoderPretraining
from xlayer_systems.pretraining.encoder import EncoderPretraining
from xlayer_systems.runs.spec import RunSpec
from xlayer_systems.runs.system import System
from xlayer_systems.telepathy.system import TelepathySystem
from xlayer_systems.training.directory import RunDirectory
from xlayer_systems.xlrb.system import XLRBSystem

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (XLRBSystem(), HyperLMSystem(), TelepathySystem(), BypassSystem(), LFormerSystem())
}
PRETRAINING: dict[str, System] = {system.name: system for system in (EncoderPretraining(), DecoderPretraining())}


def get_system(name: str) -> System:
    """Returns the system of that name.

    Raises:
        UserError: there is none.
    """
    found = SYSTEMS.get(name) or PRETRAINING.get(name)
    if found is None:
        raise UserError(f"unknown system {name!r}; expected one of {', '.join(SYSTEMS)}")
    return found


def open_run(path: Path) -> tuple[System, RunSpec]:
    """Returns the system and the spec of the run in the directory ``path``.

    Raises:
        UserError: ``path`` is no run directory, or one that this version cannot read.
    """
    stored = RunDirectory(path).read_config()["run"]
    if not isinstance(stored.get("system"), str):
        raise UserError("this run's config.json does not fit this version of xlayer: it names no system")
    system = get_system(stored["system"])
    return system, system.read_spec(stored)
