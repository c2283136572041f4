"""Describes a run as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RunSpec:
    """Holds everything that defines a run; `xlayer_systems.runs.system.System.make_spec` fills it in.

    Attributes:
        system: name of the system, by which the registry finds it.
        preset, dataset, backbone: names that the system understands.
        seed: of the initial parameters, the order of the examples and dropout.
        config: the system's config dataclass, or None for a backbone alone.
        options: the `LoopOptions` of its kind of training.
        backbone_weights: identifies the weights that the run starts from.
    """

    system: str
    preset: str
    dataset: str
    backbone: str
    seed: int
    config: Any
    options: Any
    backbone_weights: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON-able description that config.json holds."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        config = None if self.config is None else dataclasses.asdict(self.config)
        return {**fields, "config": config, "options": dataclasses.asdict(self.options)}
