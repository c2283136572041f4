"""Run directories: everything that one run leaves behind, in a form that survives ``kill -9``.

::

    config.json      what was run, and the environment that it ran in; locked by the process that the run is in
    run.yaml         the run file that reproduces it
    metrics.jsonl    one record per line, no times: the same bits for the same config on the same CPU
    timings.jsonl    wall-clock times
    checkpoints/     the newest complete checkpoint (safetensors and JSON)
    tensorboard/     the same metrics as event files
    plots/*.png      curves; for bridges, gates and routing
    model/           the trained parameters (safetensors)
    report.md        the result in words
    result.json      written last: the run is finished

A run directory is data: nothing in it is executed, whoever wrote it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from xlayer_systems.errors import UserError

Record = dict[str, Any]
Upgrade = Callable[[Mapping[str, Any]], Mapping[str, Any]]
# Errors of disks and paths, which are not errors of the program.
DISK_ERRORS = (
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.EROFS, errno.ESTALE,
)  # fmt: skip
RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "safetensors", "peft")


def environment(data_hash: str) -> Record:
    """Returns what a result depends on beside its config: Python, the data's hash, the versions of the packages."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    machine = platform.machine()
    return {"python": platform.python_version(), "data_hash": data_hash, "machine": machine, "packages": versions}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what a full, read-only or missing disk does to the writing of ``path`` into one line, a `UserError`."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        at = "" if error.filename is None or str(error.filename) == str(path) else f" ({error.filename})"
        raise UserError(f"cannot write {path}: {error.strerror}{at}") from error
    except SafetensorError as error:
        raise UserError(f"cannot write {path}: {error}") from error


class RunDirectory:
    """Is one run on disk. Only the main process writes; on the others every method that writes does nothing.

    The process that makes or continues a run holds a lock on its config.json, until `close` or its death.
    """

    def __init__(self, path: Path, is_writer: bool = True) -> None:
        self.path = path
        self.is_writer = is_writer
        self._tensorboard: Any = None
        self._locked: IO[bytes] | None = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create(
        self, config: Mapping[str, Any], environment: Mapping[str, Any], files: Mapping[str, str] | None = None
    ) -> None:
        """Makes the directory, with texts by name in ``files``, and holds its lock; one that exists is refused."""
        if self.is_writer:  # the other processes may look when this one has made it already
            self._check_new()
            # Under another name until it is whole: a directory that exists can then always be resumed. The name has
            # this process's number, so that two commands at once do not build in one place.
            unfinished = RunDirectory(self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp"))
            shutil.rmtree(unfinished.path, ignore_errors=True)
            try:
                (unfinished.path / "checkpoints").mkdir(parents=True)
                (unfinished.path / "plots").mkdir()
                unfinished.write_json("config.json", {"run": config, "environment": environment})
                for name, text in (files or {}).items():
                    unfinished.write_text(name, text)
                unfinished.lock()
                self._check_new()
                os.rename(unfinished.path, self.path)  # fails where another command was faster
            except OSError as error:
                shutil.rmtree(unfinished.path, ignore_errors=True)
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                    self._check_new()
                raise
            except UserError:
                shutil.rmtree(unfinished.path, ignore_errors=True)
                raise
            self._locked = unfinished._locked

    def _check_new(self) -> None:
        if self.path.exists():
            raise UserError(f"run directory {self.path} exists; choose another --run-dir, or continue it with --resume")

    def lock(self) -> None:
        """Holds the run, so that no other process writes into it; one that another process holds is refused."""
        if not self.is_writer or self._locked is not None:
            return
        stream = (self.path / "config.json").open("r+b")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.close()
            raise UserError(f"another process is at work in {self.path}; wait until it ends, or end it") from error
        except OSError:
            pass  # a file system without locks: as safe as the user is careful
        self._locked = stream

    def hold(self, config: Mapping[str, Any], environment: Mapping[str, Any], upgrade: Upgrade = dict) -> Record | None:
        """Takes an interrupted run, to go on with it, or returns the result of a finished one.

        A run that another process holds is refused, and so is one of another config, Python version or other data.
        """
        self.check_resumable(config, environment, upgrade)
        finished = self.result()
        if finished is None:
            self.lock()
            finished = self.result()  # it may have ended in between
        return finished

    def check_resumable(
        self, config: Mapping[str, Any], environment: Mapping[str, Any], upgrade: Upgrade = dict
    ) -> None:
        """Refuses to continue a run of another config, another Python version or other data.

        ``upgrade`` translates a config that an earlier version wrote.
        """
        stored = self.read_config()
        wanted = json.loads(json.dumps(config))
        for key, (found, expected) in _differences(upgrade(stored["run"]), wanted).items():
            raise UserError(f"cannot resume {self.path}: its {key} is {found!r}, this command's is {expected!r}")
        for key, name in (("python", "Python version"), ("data_hash", "corpus hash")):
            found, expected = stored["environment"].get(key), environment[key]
            if found != expected:
                raise UserError(f"cannot resume {self.path}: its {name} is {found}, this machine's is {expected}")

    def read_config(self) -> Record:
        """Reads config.json: ``{"run": ..., "environment": ...}``."""
        try:
            config: Record = json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is not a run directory: expected a readable config.json in it") from error
        parts = [config.get(name) for name in ("run", "environment")] if isinstance(config, dict) else []
        if not parts or not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{self.path} is damaged: its config.json has no objects run and environment")
        return config

    def result(self) -> Record | None:
        """Reads result.json, or returns None while the run is unfinished."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        try:
            result: Record = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            result = {}
        if not isinstance(result, dict) or not result:
            raise UserError(f"{self.path} is damaged: its result.json holds no result; remove it, then --resume")
        return result

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a whole file or nothing: to a temporary name first, then renamed."""
        if self.is_writer:
            self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a whole text file or nothing, as `write_json` does."""
        if self.is_writer:
            temporary = self.path / f".{name}.tmp"
            temporary.write_text(text)
            _sync(temporary)
            os.replace(temporary, self.path / name)

    def log(self, record: Record) -> None:
        """Appends to metrics.jsonl; numbers go to TensorBoard too when that is open."""
        self._append("metrics.jsonl", record)
        if self._tensorboard is not None:
            for name, value in flatten(record):
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self._tensorboard.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def log_time(self, record: Record) -> None:
        """Appends to timings.jsonl."""
        self._append("timings.jsonl", record)

    def metrics(self) -> list[Record]:
        """Returns all records of metrics.jsonl so far."""
        path = self.path / "metrics.jsonl"
        return self._parse(path.read_bytes()) if path.exists() else []

    def metrics_size(self) -> int:
        """Flushes metrics.jsonl to disk; returns its size in bytes."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return 0
        _sync(path)
        return path.stat().st_size

    def cut_metrics(self, size: int) -> None:
        """Drops what was logged after a checkpoint that saw ``size`` bytes, which metrics.jsonl must have, whole."""
        path = self.path / "metrics.jsonl"
        if not self.is_writer or (size == 0 and not os.path.lexists(path)):
            return
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{self.path} is damaged: metrics.jsonl is {'no file' if path.exists() else 'missing'}")
        found = path.stat().st_size
        if found < size:
            raise UserError(
                f"{self.path} is damaged: metrics.jsonl has {found} bytes, its checkpoint was written after {size}"
            )
        with path.open("rb") as stream:
            self._parse(stream.read(size))
        os.truncate(path, size)

    def _parse(self, text: bytes) -> list[Record]:
        records: list[Record] = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("no JSON object")
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.path} is damaged: line {number} of metrics.jsonl is no record") from error
            records.append(record)
        return records

    def open_tensorboard(self, step: int) -> None:
        """Starts an event file; events of an earlier attempt from ``step`` on are hidden."""
        if self.is_writer:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)

    def close_tensorboard(self) -> None:
        """Flushes and closes the event file."""
        tensorboard, self._tensorboard = self._tensorboard, None
        if tensorboard is not None:
            tensorboard.close()

    def close(self) -> None:
        """Closes the event file and releases the lock."""
        locked, self._locked = self._locked, None
        if locked is not None:
            locked.close()
        self.close_tensorboard()

    def latest_checkpoint(self) -> Path | None:
        """Returns the newest complete checkpoint."""
        folder = self.path / "checkpoints"
        if not folder.is_dir():
            raise UserError(f"{self.path} is damaged: its folder checkpoints is missing")
        found = sorted(folder.glob("step-*"))
        return found[-1] if found else None

    def save_checkpoint(self, step: int, save: Callable[[Path], None], barrier: Callable[[], None]) -> None:
        """Writes a checkpoint so that a kill at any moment leaves a complete one.

        ``save(folder)`` runs on every process, with the folder there; ``barrier`` waits for all of them.
        """
        folder = self.path / "checkpoints"
        temporary, final = folder / f"tmp-{step:08d}", folder / f"step-{step:08d}"
        if self.is_writer:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        barrier()
        save(temporary)
        barrier()
        if self.is_writer:
            for path in temporary.rglob("*"):
                _sync(path)
            os.replace(temporary, final)
            _sync(folder)
            for old in [*folder.glob("step-*"), *folder.glob("tmp-*")]:
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
        barrier()

    def _append(self, name: str, record: Record) -> None:
        if self.is_writer:
            with (self.path / name).open("a") as stream:
                stream.write(json.dumps(record) + "\n")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested mappings with their paths, ``a/b/c``."""
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
