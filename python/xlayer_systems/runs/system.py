"""What kinds of training there are: the data, what is measured, and how it is reported. Systems share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xlayer_systems.reporting.tables import Records
from xlayer_systems.training.directory import Record
from xlayer_systems.training.trainer import TrainingData

if TYPE_CHECKING:
    from xlayer_systems.runs.execute import RunSpec


class RunData(TrainingData, Protocol):
    """Data of a run; ``fingerprint`` identifies them, so that no run is resumed on others."""

    fingerprint: str


class Objective(Protocol):
    """A kind of training."""

    def prepare(self, spec: RunSpec, whole: bool = False) -> Any:
        """The `RunData` of a run, cached, because the runs of a sweep share them; ``whole``: all validation data."""

    def result(self, spec: RunSpec, data: Any, metrics: Mapping[str, Any]) -> Record:
        """What result.json says of this kind of training."""

    def format(self, result: Mapping[str, Any]) -> str:
        """A result as a short table in plain text."""

    def report(self, spec: RunSpec, data: Any, result: Mapping[str, Any], records: Records, plots: Path) -> list[str]:
        """Draw the curves of a run into ``plots``; the lines of its report below the title."""

    def summarize(self, results: Mapping[str, list[Record]], records: Mapping[str, Sequence[Records]]) -> Record:
        """Results and metrics per variant, one per seed, as a sweep's ``title`` and ``rows``."""

    def format_sweep(self, summary: Mapping[str, Any]) -> str:
        """A sweep's table in plain text."""

    def plot_sweep(self, summary: Mapping[str, Any], records: Mapping[str, Sequence[Records]], out: Path) -> list[str]:
        """Draw a sweep's curves into ``out``; the lines of its report that show them."""
