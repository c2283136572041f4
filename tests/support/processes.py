"""Processes that train together."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

PATIENCE = timedelta(minutes=3)  # a process that fails alone would keep the other, and the suite, for half an hour


def join_processes(rank: int, folder: str, count: int = 2) -> None:
    """Makes this one of ``count`` processes that meet in ``folder``."""
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count, timeout=PATIENCE)


def run_processes(worker: Callable[[int, str], None], folder: Path, device: str, count: int = 2) -> list[Any]:
    """Runs ``worker(rank, folder)`` in ``count`` processes; returns what each has saved as ``rank<rank>.pt``."""
    if device != "cpu":
        pytest.skip("two processes on the CPU; a second GPU is not assumed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    mp.spawn(worker, (str(folder),), nprocs=count)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(count)]


def whole_gradients(net: nn.Module) -> dict[str, Tensor]:
    """Returns the gradients by parameter's name, whole under FSDP2, and without the prefix that DDP gives to names."""
    grads: dict[str, Any] = {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares gradients in float64 that were summed over processes with those of one."""
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
