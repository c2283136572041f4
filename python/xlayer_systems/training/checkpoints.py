"""Checkpoints: all that a run needs to go on with the same bits, as data.

::

    checkpoint.json         where the run stands: progress, schedule, learning rates, loss scale, number of processes
    model.safetensors       parameters, put together from all processes, and the main process's buffers; each once
    optimizer.safetensors   ``<number of the parameter>.<name>``, in the order of the parameter groups
    random-<process>.json   the random states of each process: Python, NumPy, torch, and its CUDA device

Reading one executes nothing that is in it. Checkpoints of earlier versions were pickles; they are read with torch's
loader of weights, which takes tensors and plain values only.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xlayer_systems.errors import UserError

FORMAT = 1
STATE_FILE, MODEL_FILE, OPTIMIZER_FILE = "checkpoint.json", "model.safetensors", "optimizer.safetensors"
EARLIER_MODEL_FILE = "pytorch_model.bin"
MERSENNE_WORDS = 624  # of NumPy's generator; it trusts the position that it is given


def whole(value: Tensor) -> Tensor:
    """Gathers a tensor that FSDP2 divided; every process must ask."""
    gathered: Tensor = value.full_tensor() if is_divided(value) else value  # type: ignore[attr-defined]
    return gathered


def is_divided(value: Tensor) -> bool:
    """Tells whether FSDP2 has divided a tensor among the processes."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


@dataclass
class Checkpoint:
    """Holds the checkpoint of one process. ``schedule`` counts the steps that the schedule has taken."""

    processes: int
    progress: dict[str, Any]
    schedule: int
    rates: list[float]
    scaler: dict[str, Any] | None
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Any]


class TrainingState:
    """Holds model, optimizer, schedule, loss scale and random states of a run, to be saved and loaded.

    Args:
        accelerator: what ``model`` and ``optimizer`` were prepared by.
        model: the prepared model: plain, under DDP, or under FSDP2.
        optimizer: the prepared optimizer.
        schedule: of its learning rates.
    """

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: Any, schedule: Any) -> None:
        self.accelerator, self.model, self.optimizer, self.schedule = accelerator, model, optimizer, schedule

    def save(self, folder: Path, progress: Mapping[str, Any]) -> None:
        """Writes a checkpoint into ``folder``, which exists; every process must call this."""
        accelerator, is_main = self.accelerator, self.accelerator.is_main_process
        states = self.optimizer.state_dict()["state"]
        named = {f"{index}.{name}": value for index, values in states.items() for name, value in values.items()}
        model, optimizer = _gathered(self._tensors(), is_main), _gathered(named, is_main)
        if is_main:
            save_file(model, folder / MODEL_FILE)
            save_file(optimizer, folder / OPTIMIZER_FILE)
            content = {
                "format": FORMAT,
                "processes": accelerator.num_processes,
                "progress": progress,
                "schedule": self.schedule.last_epoch,
                "rates": [group["lr"] for group in self.optimizer.param_groups],
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            }
            (folder / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")
        (folder / _random_file(accelerator.process_index)).write_text(json.dumps(random_states(accelerator.device)))

    def load(self, folder: Path) -> dict[str, Any]:
        """Takes everything from the checkpoint in ``folder`` and returns the progress that it was saved with.

        Raises `UserError` where files are missing, damaged or of another model, in one line.
        """
        accelerator = self.accelerator
        stored = read_checkpoint(folder, accelerator.process_index)
        if stored.processes != accelerator.num_processes:
            raise UserError(
                f"the checkpoint {folder} was written by {stored.processes} process(es), and this run has "
                f"{accelerator.num_processes}; resume it with as many as before"
            )
        with _refusing(folder, "it"):
            self._load_model(stored.model)
            self._load_optimizer(stored.optimizer, stored.rates)
            state = {"last_epoch": stored.schedule, "_step_count": stored.schedule + 1, "_last_lr": stored.rates}
            self.schedule.load_state_dict({**self.schedule.state_dict(), **state})
            if accelerator.scaler is not None:
                if stored.scaler is None:
                    raise ValueError("no loss scale")
                accelerator.scaler.load_state_dict(stored.scaler)
        with _refusing(folder, _random_file(accelerator.process_index)):
            set_random_states(stored.random, accelerator.device)
        return stored.progress

    def _tensors(self) -> dict[str, Tensor]:
        """Returns parameters and buffers that are saved, each under the first of its names."""
        found: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self._state().items():
            found.setdefault(id(tensor), (name, tensor))
        return dict(found.values())

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.accelerator.unwrap_model(self.model).state_dict(keep_vars=True)
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"the state of a model must be tensors, got {type(value).__name__} for {name}")
        return state

    def _load_model(self, stored: dict[str, Tensor]) -> None:
        tensors, state = self._tensors(), self._state()
        first = {id(tensor): name for name, tensor in tensors.items()}
        # Earlier versions wrote a shared tensor under each of its names.
        stored = {name: tensor for name, tensor in stored.items() if name in tensors or name not in state}
        _check_tensors(stored, tensors)
        values = {name: _spread(stored[first[id(tensor)]], tensor) for name, tensor in state.items()}
        self.accelerator.unwrap_model(self.model).load_state_dict(values)

    def _load_optimizer(self, stored: dict[str, Tensor], rates: list[float]) -> None:
        groups = self.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        if len(rates) != len(groups):
            raise ValueError(f"learning rates of {len(rates)} groups of parameters, not of {len(groups)}")
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in stored.items():
            index, _, name = key.partition(".")
            parameter = parameters[int(index)]
            if value.ndim:
                _check_tensors({key: value}, {key: parameter}, with_dtype=False)
            states.setdefault(int(index), {})[name] = _spread(value, parameter) if value.ndim else value
        state = self.optimizer.state_dict()
        for group, rate in zip(state["param_groups"], rates, strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict({**state, "state": states})


def read_checkpoint(folder: Path, process: int) -> Checkpoint:
    """Reads what the checkpoint in ``folder`` holds for ``process``; `UserError` names a file that cannot be used."""
    if not (folder / STATE_FILE).exists() and (folder / EARLIER_MODEL_FILE).exists():
        return _read_earlier(folder, process)
    if not (folder / STATE_FILE).exists() and any(folder.glob("*_fsdp_*")):
        raise UserError(
            f"the checkpoint {folder} was written under FSDP by an earlier version of xlayer; finish this run with "
            "that version, or start it again in another --run-dir"
        )
    state = _read_json(folder, STATE_FILE)
    with _refusing(folder, STATE_FILE):
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r}; this version reads {FORMAT}")
        fields = {name: state[name] for name in ("processes", "progress", "schedule", "rates", "scaler")}
        counts = [fields["processes"], fields["schedule"]]
        if not all(isinstance(count, int) for count in counts) or not all(
            isinstance(rate, float | int) for rate in fields["rates"]
        ):
            raise ValueError("numbers expected")
    model, optimizer = (_read_tensors(folder, name) for name in (MODEL_FILE, OPTIMIZER_FILE))
    if process >= fields["processes"]:
        return Checkpoint(**fields, model=model, optimizer=optimizer, random={})
    return Checkpoint(**fields, model=model, optimizer=optimizer, random=_read_json(folder, _random_file(process)))


def random_states(device: torch.device) -> dict[str, Any]:
    """Returns the states of this process's random generators, JSON-able."""
    version, words, gauss = random.getstate()
    generator: tuple[Any, ...] = numpy.random.get_state(legacy=True)  # type: ignore[assignment]
    kind, keys, *rest = generator
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
    }
    if device.type == "cuda":
        states["cuda"] = _hex(torch.cuda.get_rng_state(device))
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Sets the generators as `random_states` found them; raises an exception of some kind on anything else."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    if kind != "MT19937" or not 0 <= position <= MERSENNE_WORDS:
        raise ValueError("no state of NumPy's generator")
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_hex(states["torch"]))
    if device.type == "cuda":
        torch.cuda.set_rng_state(_from_hex(states["cuda"]), device)


def _read_earlier(folder: Path, process: int) -> Checkpoint:
    """Reads a checkpoint as Accelerate's ``save_state`` wrote it for earlier versions, under DDP or in one process."""
    model = _read_weights(folder, EARLIER_MODEL_FILE)
    optimizer = _read_weights(folder, "optimizer.bin")
    schedule, progress = (_read_weights(folder, f"custom_checkpoint_{number}.pkl") for number in (0, 1))
    states = _read_weights(folder, f"random_states_{process}.pkl")
    scaler = _read_weights(folder, "scaler.pt") if (folder / "scaler.pt").exists() else None
    with _refusing(folder, "it"):
        if all(name.startswith("module.") for name in model):  # DDP
            model = {name.removeprefix("module."): value for name, value in model.items()}
        kind, keys, *rest = states["numpy_random_seed"]
        version, words, gauss = states["random_state"]
        generators = {
            "python": [version, list(words), gauss],
            "numpy": [kind, keys.tolist(), *rest],
            "torch": _hex(states["torch_manual_seed"]),
        }
        if torch.cuda.is_available() and "torch_cuda_manual_seed" in states:
            generators["cuda"] = _hex(states["torch_cuda_manual_seed"][torch.cuda.current_device()])
        return Checkpoint(
            processes=len(list(folder.glob("random_states_*.pkl"))),
            progress={**progress, "window": []},
            schedule=int(schedule["last_epoch"]),
            rates=[float(group["lr"]) for group in optimizer["param_groups"]],
            scaler=scaler,
            model=model,
            optimizer={
                f"{index}.{name}": value
                for index, values in optimizer["state"].items()
                for name, value in values.items()
            },
            random=generators,
        )


def _read_weights(folder: Path, name: str) -> dict[str, Any]:
    """Reads a pickle of tensors, plain values and NumPy's arrays; anything else in it is refused, not called."""
    from _codecs import encode  # what pickle writes bytes with

    _check_present(folder, name)
    reconstruct: Any = numpy.zeros(0).__reduce__()[0]
    allowed: list[Any] = [encode, reconstruct, numpy.ndarray, numpy.dtype, type(numpy.dtype(numpy.uint32))]
    with _refusing(folder, name), torch.serialization.safe_globals(allowed):
        content: dict[str, Any] = torch.load(folder / name, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError("no mapping")
        return content


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    _check_present(folder, name)
    with _refusing(folder, name):
        tensors: dict[str, Tensor] = load_file(folder / name)
        return tensors


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    _check_present(folder, name)
    with _refusing(folder, name):
        content: dict[str, Any] = json.loads((folder / name).read_text())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content


def _check_present(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise UserError(f"the checkpoint {folder} is damaged: {name} is missing")


@contextmanager
def _refusing(folder: Path, name: str) -> Iterator[None]:
    """Turns whatever a reader raises about broken or hostile content into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0][:160]
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise UserError(
            f"the checkpoint {folder} cannot be used: {name} does not hold what it should ({reason})"
        ) from error


def _check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], with_dtype: bool = True) -> None:
    for name in sorted(found.keys() ^ expected.keys()):
        raise ValueError(f"{name} is {'unknown to this model' if name in found else 'missing'}")
    for name, tensor in found.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, this model's has {list(wanted.shape)}")
        if with_dtype and tensor.dtype != wanted.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, this model's is {wanted.dtype}")


def _gathered(tensors: Mapping[str, Tensor], is_kept: bool) -> dict[str, Tensor]:
    """Returns whole tensors on the CPU, each with memory of its own, for safetensors; {} where not ``is_kept``."""
    kept: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if is_kept:
            value = value.cpu().contiguous()
            storage = value.untyped_storage()
            if storage.data_ptr() in used or storage.nbytes() != value.nbytes:
                value = value.clone()
            used.add(value.untyped_storage().data_ptr())
            kept[name] = value
    return kept


def _spread(value: Tensor, like: Tensor) -> Tensor:
    """Divides ``value``, which every process has, among the processes as ``like`` is."""
    if not is_divided(like):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _random_file(process: int) -> str:
    return f"random-{process}.json"


def _hex(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
