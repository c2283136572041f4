"""Run directories: everything that one run leaves behind, in a form that survives ``kill -9``.

::

    config.json      what was run, and the environment that it ran in
    metrics.jsonl    one record per line, no times: the same bits for the same config on the same CPU
    timings.jsonl    wall-clock times
    checkpoints/     the newest complete checkpoint
    tensorboard/     the same metrics as event files
    plots/*.png      curves; for bridges, gates and routing
    model/           the trained parameters (safetensors)
    report.md        the result in words
    result.json      written last: the run is finished
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from xlayer_systems.errors import UserError

Record = dict[str, Any]
RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "safetensors", "peft")


def environment(data_hash: str) -> Record:
    """What a result depends on beside its config: Python, the hash of the data, the versions of the packages."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    machine = platform.machine()
    return {"python": platform.python_version(), "data_hash": data_hash, "machine": machine, "packages": versions}


class RunDirectory:
    """One run on disk. Only the main process writes; on the others every method that writes does nothing."""

    def __init__(self, path: Path, is_writer: bool = True) -> None:
        self.path = path
        self.is_writer = is_writer
        self._tensorboard: Any = None

    def create(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Make the directory; one that exists is refused, whatever is in it."""
        if self.is_writer:  # the other processes may look when this one has made it already
            if self.path.exists():
                raise UserError(
                    f"run directory {self.path} exists; choose another --run-dir, or continue it with --resume"
                )
            # Under another name until it is whole: a directory that exists can then always be resumed.
            unfinished = RunDirectory(self.path.with_name(f".{self.path.name}.tmp"))
            shutil.rmtree(unfinished.path, ignore_errors=True)
            (unfinished.path / "checkpoints").mkdir(parents=True)
            (unfinished.path / "plots").mkdir()
            unfinished.write_json("config.json", {"run": config, "environment": environment})
            os.rename(unfinished.path, self.path)

    def check_resumable(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Refuse to continue a run of another config, another Python version or other data."""
        stored = self.read_config()
        wanted = json.loads(json.dumps(config))
        for key, (found, expected) in _differences(stored["run"], wanted).items():
            raise UserError(f"cannot resume {self.path}: its {key} is {found!r}, this command's is {expected!r}")
        for key, name in (("python", "Python version"), ("data_hash", "corpus hash")):
            found, expected = stored["environment"][key], environment[key]
            if found != expected:
                raise UserError(f"cannot resume {self.path}: its {name} is {found}, this machine's is {expected}")

    def read_config(self) -> Record:
        """config.json: ``{"run": ..., "environment": ...}``."""
        try:
            config: Record = json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} is not a run directory: expected a readable config.json in it") from error
        return config

    def result(self) -> Record | None:
        """result.json, or None while the run is unfinished."""
        path = self.path / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a whole file or nothing: to a temporary name first, then renamed."""
        if self.is_writer:
            self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """As `write_json`, for text."""
        if self.is_writer:
            temporary = self.path / f".{name}.tmp"
            temporary.write_text(text)
            _sync(temporary)
            os.replace(temporary, self.path / name)

    def log(self, record: Record) -> None:
        """Append to metrics.jsonl; numbers go to TensorBoard too when that is open."""
        self._append("metrics.jsonl", record)
        if self._tensorboard is not None:
            for name, value in flatten(record):
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self._tensorboard.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def log_time(self, record: Record) -> None:
        """Append to timings.jsonl."""
        self._append("timings.jsonl", record)

    def metrics(self) -> list[Record]:
        """All records of metrics.jsonl so far."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl, all of them on disk."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return 0
        _sync(path)
        return path.stat().st_size

    def cut_metrics(self, size: int) -> None:
        """Drop what was logged after a checkpoint that saw ``size`` bytes."""
        path = self.path / "metrics.jsonl"
        if self.is_writer and path.exists():
            os.truncate(path, size)

    def open_tensorboard(self, step: int) -> None:
        """Start an event file; events of an earlier attempt from ``step`` on are hidden."""
        if self.is_writer:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        found = sorted((self.path / "checkpoints").glob("step-*"))
        return found[-1] if found else None

    def save_checkpoint(self, step: int, save: Callable[[Path], None], barrier: Callable[[], None]) -> None:
        """Write a checkpoint so that a kill at any moment leaves a complete one.

        ``save(folder)`` runs on every process; ``barrier`` waits for all of them.
        """
        folder = self.path / "checkpoints"
        temporary, final = folder / f"tmp-{step:08d}", folder / f"step-{step:08d}"
        if self.is_writer:
            shutil.rmtree(temporary, ignore_errors=True)
        barrier()
        save(temporary)
        barrier()
        if self.is_writer:
            for path in temporary.rglob("*"):
                _sync(path)
            os.replace(temporary, final)
            _sync(folder)
            for old in folder.iterdir():
                if old != final:
                    shutil.rmtree(old)
        barrier()

    def _append(self, name: str, record: Record) -> None:
        if self.is_writer:
            with (self.path / name).open("a") as stream:
                stream.write(json.dumps(record) + "\n")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings with their paths, ``a/b/c``."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    left, right = dict(flatten(found)), dict(flatten(expected))
    keys = sorted(left.keys() | right.keys())
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
